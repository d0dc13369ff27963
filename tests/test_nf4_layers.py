"""LinearNF4: numbers forward and backward, formats, errors; casts spare its codes and scales."""

import copy

import pytest
import torch
from law import bound, error
from nf4_layers import DTYPES, FORMATS, bits, dense, linear, same_bits, trained
from torch import nn

import peftops.functional as F
from peftops.nn import LinearNF4

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(3,), (2, 50), (0,), ()], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_trains_like_the_weight_it_stands_for(dtype, rows, bias):
    layer = LinearNF4.from_linear(linear(dtype=dtype, bias=bias))
    x = torch.randn(*rows, 64, dtype=dtype)
    exact = trained(dense(layer, torch.float64), x.double())
    same = trained(dense(layer, dtype), x)
    out = trained(layer, x)
    assert [tensor.dtype for tensor in out] == [tensor.dtype for tensor in same]
    assert [tensor.shape for tensor in out] == [tensor.shape for tensor in same]
    if x.numel():
        assert error(out, exact) <= bound(same, exact)


@pytest.mark.parametrize("k, n", [(33, 7), (96, 40), (1, 1), (70, 130)])
@pytest.mark.parametrize("quant_type, double, block", FORMATS)
def test_formats_and_odd_sizes(quant_type, double, block, k, n):
    layer = LinearNF4.from_linear(linear(k, n), block, double, quant_type)
    x = torch.randn(5, k)
    exact = trained(dense(layer, torch.float64), x.double())
    same = trained(dense(layer, torch.float32), x)
    assert error(trained(layer, x), exact) <= bound(same, exact)
    y = F.nf4_linear(x, layer.quantized, layer.bias)
    assert error(y, exact[0]) <= bound(same[0], exact[0])


def test_is_exact_in_double():
    layer = LinearNF4.from_linear(linear())
    x = torch.randn(4, 64, dtype=torch.float64)
    exact = trained(copy.deepcopy(layer).double(), x)
    same = trained(dense(layer, torch.float32), x.float())
    assert exact[0].dtype == torch.float64
    assert error(trained(layer, x.float()), exact) <= bound(same, exact)


class Cast(nn.Module):
    """A layer that is called in the dtype of its weight, and returns that of x."""

    def __init__(self, linear):
        super().__init__()
        self.call = lambda x: linear(x.to(linear.weight.dtype)).to(x.dtype)

    def forward(self, x):
        return self.call(x)


def test_compute_dtype_and_autocast():
    layer = LinearNF4.from_linear(linear(), compute_dtype=torch.bfloat16)
    x = torch.randn(4, 64)
    exact = trained(dense(layer, torch.float64), x.double())
    same = trained(Cast(dense(layer, torch.bfloat16)), x)
    out = trained(layer, x)
    assert out[0].dtype == torch.float32
    assert error(out[:2], exact[:2]) <= bound(same[:2], exact[:2])
    plain = LinearNF4.from_linear(linear())
    with torch.autocast("cpu", torch.bfloat16):
        assert plain(x).dtype == torch.bfloat16 and layer(x).dtype == torch.float32


@pytest.mark.parametrize("double", [True, False])
def test_no_cast_reaches_codes_or_scales(double):
    layer = LinearNF4.from_linear(linear(bias=False), double_quant=double)
    before = bits(layer)
    weight = layer.dequantize()
    for cast in (
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.to(torch.ones(1, dtype=torch.float16)),
        lambda m: nn.Sequential(m).bfloat16()[0],
    ):
        assert same_bits(bits(cast(layer)), before) and torch.equal(
            layer.dequantize(), weight
        )
    biased = LinearNF4.from_linear(linear()).bfloat16()
    assert (
        biased.bias.dtype == torch.bfloat16
        and biased.dequantize().dtype == torch.float32
    )
    assert not any(p.requires_grad or p.is_floating_point() for p in layer.parameters())


ERRORS = [
    (
        ValueError,
        "LinearNF4: features must be at least 1, got 0 and 4",
        lambda: LinearNF4(0, 4),
    ),
    (
        ValueError,
        "LinearNF4: quant_type must be nf4 or fp4, got 'int4'",
        lambda: LinearNF4(4, 4, quant_type="int4"),
    ),
    (ValueError, "nf4: block must be one of", lambda: LinearNF4(4, 4, blocksize=48)),
    (
        TypeError,
        "LinearNF4: linear must be nn.Linear or.*got GELU",
        lambda: LinearNF4.from_linear(nn.GELU()),
    ),
    (
        TypeError,
        "lora: w must be NF4Weight, got Tensor",
        lambda: F.nf4_linear(torch.ones(2, 4), torch.ones(3, 4)),
    ),
    (
        ValueError,
        r"lora: w must be \(n, k\), got \(64,\)",
        lambda: F.nf4_linear(torch.ones(2, 4), F.quantize_nf4(torch.ones(64))),
    ),
    (
        ValueError,
        r"LinearNF4: weight must be \(out_features, in_features\), got \(2, 3, 4\)",
        lambda: LinearNF4.of(F.quantize_nf4(torch.ones(2, 3, 4))),
    ),
    (
        ValueError,
        r"LinearNF4: weight must be \(4, 8\)",
        lambda: LinearNF4(8, 4).quantize(torch.ones(8, 4)),
    ),
]


@pytest.mark.parametrize(
    "error_class, message, call", ERRORS, ids=[message for _, message, _ in ERRORS]
)
def test_errors(error_class, message, call):
    with pytest.raises(error_class, match=message):
        call()


def test_says_what_it_is():
    text = repr(LinearNF4(8, 4, bias=False, compute_dtype=torch.bfloat16))
    assert text == (
        "LinearNF4(in_features=8, out_features=4, bias=False, nf4, blocksize=64, "
        "double_quant=True, compute_dtype=torch.bfloat16)"
    )


def test_is_initialised_like_linear():
    torch.manual_seed(3)
    layer = LinearNF4(64, 96)
    torch.manual_seed(3)
    expected = nn.Linear(64, 96)
    assert same_bits(bits(layer), bits(LinearNF4.from_linear(expected)))


@pytest.mark.parametrize("compiler", ["aot_eager"])
def test_compiles_whole(compiler):
    torch._dynamo.reset()
    layer = LinearNF4.from_linear(linear())
    x = torch.randn(70, 64)
    exact = trained(dense(layer, torch.float64), x.double())
    same = trained(dense(layer, torch.float32), x)
    layer.compile(fullgraph=True, backend=compiler)
    assert error(trained(layer, x), exact) <= bound(same, exact)
