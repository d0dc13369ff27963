"""bitsandbytes on our kernels: same bits, same products, and its own kernels back afterwards."""

import pytest
import torch
from law import bound, error

bnb = pytest.importorskip("bitsandbytes")

from peftops.integrations import bitsandbytes as integration

pytestmark = pytest.mark.usefixtures("one_thread")
FORMATS = [
    (quant_type, double, block)
    for quant_type in ("nf4", "fp4")
    for double in (True, False)
    for block in (64, 128)
]


@pytest.fixture
def enabled():
    integration.enable()
    yield
    integration.disable()


@pytest.fixture
def bodies(monkeypatch):
    """How often our functions ran."""
    calls = dict.fromkeys(integration.OPS, 0)

    def counted(name, function):
        def run(*args, **options):
            calls[name] += 1
            return function(*args, **options)

        return run

    for name, function in integration.OPS.items():
        monkeypatch.setitem(integration.OPS, name, counted(name, function))
    return calls


def quantized(w, quant_type, double, block):
    return bnb.functional.quantize_4bit(
        w,
        quant_type=quant_type,
        compress_statistics=double,
        blocksize=block,
    )


def bits(codes, state):
    return {"codes": codes, **state.as_dict(packed=True)}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("quant_type, double, block", FORMATS)
def test_quantizes_and_dequantizes_the_same_bits(
    quant_type, double, block, dtype, bodies
):
    w = torch.randn(48, 256, dtype=dtype)
    codes, state = quantized(w, quant_type, double, block)
    expected = bits(codes, state)
    dense = bnb.functional.dequantize_4bit(codes, state)
    integration.enable()
    try:
        codes, state = quantized(w, quant_type, double, block)
        out = bits(codes, state)
        assert list(out) == list(expected)
        assert all(torch.equal(out[key], expected[key]) for key in out)
        assert torch.equal(bnb.functional.dequantize_4bit(codes, state), dense)
        given = torch.empty_like(dense)
        bnb.functional.dequantize_4bit(codes, state, out=given)
        assert torch.equal(given, dense)
    finally:
        integration.disable()
    assert bodies["quantize_4bit"] == 1
    assert bodies["dequantize_4bit"] >= 1
    assert bodies["dequantize_4bit.out"] == 1


@pytest.mark.parametrize(
    "storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str
)
def test_other_storage(storage, enabled):
    w = torch.randn(32, 64)
    codes, state = bnb.functional.quantize_4bit(
        w, quant_type="nf4", quant_storage=storage
    )
    assert codes.dtype == storage and codes.shape == (
        32 * 64 // 2 // storage.itemsize,
        1,
    )
    x, back = torch.randn(3, 64), bnb.functional.dequantize_4bit(codes, state)
    exact = x.double() @ back.double().T
    assert error(bnb.matmul_4bit(x, codes, state), exact) <= bound(x @ back.T, exact)


def layer(dtype, double=True):
    """A Linear4bit."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 96, dtype=dtype)
    linear4bit = bnb.nn.Linear4bit(128, 96, compute_dtype=dtype)
    linear4bit.weight = bnb.nn.Params4bit(
        linear.weight.data, quant_type="nf4", compress_statistics=double
    ).to("cpu")
    linear4bit.bias = linear.bias
    return linear4bit


def trained(module, x):
    """y, and the gradients of x and of the bias."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, module.bias.grad.clone()]


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear4bit_trains(dtype, double, rows, bodies):
    module = layer(dtype, double)
    x = torch.randn(rows, 128, dtype=dtype)
    same = trained(module, x)
    wide = torch.nn.Linear(128, 96, dtype=torch.float64)
    wide.weight.data = bnb.functional.dequantize_4bit(
        module.weight, module.weight.quant_state
    ).double()
    wide.bias.data = module.bias.data.double()
    exact = trained(wide, x.double())
    integration.enable()
    try:
        out = trained(module, x)
        with torch.no_grad():
            assert error(module(x), exact[0]) <= bound(same[0], exact[0])
    finally:
        integration.disable()
    assert [t.dtype for t in out] == [t.dtype for t in same]
    assert error(out, exact) <= bound(same, exact)
    assert bodies["gemm_4bit"] == 2


def test_autocast(enabled):
    module, x = layer(torch.float32), torch.randn(5, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.float32


def test_undo_is_exact_and_repeats(bodies):
    w = torch.randn(8, 64)
    for _ in range(2):
        integration.enable()
        integration.enable()
        torch.ops.bitsandbytes.quantize_4bit(w, 64, "nf4", torch.uint8)
        integration.disable()
        integration.disable()
        torch.ops.bitsandbytes.quantize_4bit(w, 64, "nf4", torch.uint8)
    assert bodies["quantize_4bit"] == 2


def test_a_block_ends_what_it_began_and_no_more(bodies):
    w = torch.randn(8, 64)
    with integration.enable():
        with integration.enable():
            torch.ops.bitsandbytes.quantize_4bit(w, 64, "nf4", torch.uint8)
        torch.ops.bitsandbytes.quantize_4bit(w, 64, "nf4", torch.uint8)
    torch.ops.bitsandbytes.quantize_4bit(w, 64, "nf4", torch.uint8)
    assert bodies["quantize_4bit"] == 2


def test_the_ops_stand_their_checks(enabled):
    w = torch.randn(32, 64)
    codes, absmax = torch.ops.bitsandbytes.quantize_4bit(w, 64, "nf4", torch.uint8)
    checks = "test_schema", "test_faketensor"
    ops = torch.ops.bitsandbytes
    torch.library.opcheck(
        ops.quantize_4bit.default, (w, 64, "nf4", torch.uint8), test_utils=checks
    )
    args = codes, absmax, 64, "nf4", [32, 64], torch.float32
    torch.library.opcheck(ops.dequantize_4bit.default, args, test_utils=checks)
    args = torch.randn(3, 64), codes, [32, 64], absmax, 64, "nf4"
    torch.library.opcheck(ops.gemm_4bit.default, args, test_utils=checks)
