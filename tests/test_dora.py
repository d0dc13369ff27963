"""dora_linear and dora_weight_norm: their formulas; test_ops.py tests the ops."""

import pytest
import torch
from law import bound, error

import peftops.functional as F
from peftops import NF4Weight

MODES = [("lora", 0.0), ("lora", 0.4), ("peft", 0.4)]


def leaves(m=70, k=64, n=48, r=8, dtype=torch.float32, bias=1.0):
    generator = torch.Generator().manual_seed(m + k)
    x, a, b, dy = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((m, k), (r, k), (n, r), (m, n))
    )
    w = torch.randn(n, k, generator=generator).to(dtype)
    magnitude = torch.randn(n, generator=generator) * 8
    bias = bias * torch.randn(n, generator=generator)
    return [x, a, b, magnitude, bias], w, dy


def formula(x, w, a, b, magnitude, bias, keep, p, mode, detach=True):
    """The formula in the docstring of dora_linear, in torch."""
    norm = (w + 0.5 * b @ a).norm(dim=1)
    norm = norm.detach() if detach else norm
    dropped = x * keep / (1 - p)
    base = dropped if mode == "peft" else x
    y = (magnitude / norm * (base @ w.T + 0.5 * dropped @ a.T @ b.T) + bias).to(x.dtype)
    if mode == "peft":
        y = y + (x - dropped) @ w.T
    return y


def trained(call, tensors, dy):
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    y = call(*tensors)
    return [y.detach(), *torch.autograd.grad(y, tensors, dy.to(y.dtype))]


def compared(tensors, w, dy, mode, p, detach=True, weight=None):
    """Outputs and gradients of dora_linear, and of the formula in the same dtype and in double."""
    seed = torch.manual_seed(3) and torch.randint(2**62, (1,))
    keep = F.dropout_mask(seed, *tensors[0].shape, p)
    options = {
        "scaling": 0.5,
        "dropout_p": p,
        "dropout_mode": mode,
        "detach_norm": detach,
    }

    def ours(x, a, b, magnitude, bias):
        torch.manual_seed(3)
        base = w if weight is None else weight
        return F.dora_linear(x, base, a, b, magnitude, bias, **options)

    def plain(x, a, b, magnitude, bias):
        return formula(x, w.to(x.dtype), a, b, magnitude, bias, keep, p, mode, detach)

    exact = trained(plain, [tensor.double() for tensor in tensors], dy.double())
    return trained(ours, tensors, dy), trained(plain, tensors, dy), exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("mode, p", MODES)
def test_is_its_formula(mode, p, detach, dtype):
    out, same, exact = compared(*leaves(dtype=dtype), mode, p, detach)
    assert [tensor.dtype for tensor in out] == [dtype] * 4 + [torch.float32] * 2
    for ours, theirs, truth in zip(out, same, exact, strict=True):
        assert error(ours, truth) <= bound(theirs, truth)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("mode, p", MODES)
def test_over_a_4_bit_weight(mode, p, double_quant):
    tensors, w, dy = leaves(dtype=torch.bfloat16)
    q = NF4Weight.quantize(w, 64, double_quant)
    out, same, exact = compared(tensors, q.dequantize(), dy, mode, p, weight=q)
    for ours, theirs, truth in zip(out, same, exact, strict=True):
        assert error(ours, truth) <= bound(theirs, truth)


@pytest.mark.parametrize("mode", ["peft", "lora"])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p, detach, mode):
    (x, a, b, m, bias), w, _ = leaves(5, 8, 6, 3)
    w = w.double()
    tensors = [tensor.double().requires_grad_() for tensor in (x, a, b, m, bias)]
    norm = F.dora_weight_norm(w, tensors[1], tensors[2]).detach()

    def call(*tensors):
        torch.manual_seed(1)
        return F.dora_linear(
            tensors[0], w, *tensors[1:], dropout_p=p, dropout_mode=mode, **options
        )

    options = {"norm": norm} if detach else {"detach_norm": False}
    assert torch.autograd.gradcheck(call, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, tensors)


def test_a_magnitude_that_is_the_norm_is_lora():
    (x, a, b, _, bias), w, _ = leaves(dtype=torch.bfloat16)
    m = F.dora_weight_norm(w, a, b, scaling=0.5)
    exact = F.lora_linear(
        *(tensor.double() for tensor in (x, w, a, b)), bias.double(), scaling=0.5
    )
    same = F.lora_linear(x, w, a, b, bias, scaling=0.5)
    assert error(F.dora_linear(x, w, a, b, m, bias, scaling=0.5), exact) <= bound(
        same, exact
    )


@pytest.mark.parametrize(
    "dtype, most", [(torch.float32, 2e-7), (torch.bfloat16, 2e-7)], ids=str
)
@pytest.mark.parametrize("form", ["dense", "transposed", "nf4"])
def test_a_norm_is_right_to_a_rounding(form, dtype, most):
    w = torch.randn(40, 3000).to(dtype)
    a = torch.randn(16, 3000).to(dtype) / 55
    b = torch.randn(40, 16).to(dtype)
    weight = w
    if form == "transposed":
        weight = w.T.contiguous().T
    if form == "nf4":
        weight = NF4Weight.quantize(w)
        w = weight.dequantize()
    exact = (w.double() + 0.7 * b.double() @ a.double()).norm(dim=1)
    scale = torch.tensor([0.7], dtype=torch.float64).float()
    norm = F.dora_weight_norm(weight, a, b, scaling=scale, dtype=dtype).double()
    assert ((norm - exact).abs() / exact).max() <= most


def test_a_base_is_computed_in_its_own_dtype():
    w = torch.randn(40, 96).bfloat16()
    a = torch.randn(4, 96)
    b = torch.randn(40, 4)
    norm = F.dora_weight_norm(F.Base("dense", [w]), a, b)
    assert torch.equal(norm, F.dora_weight_norm(w, a, b))


def test_a_norm_survives_cancellation():
    """s·B·A ≈ -(1 - 1e-3)·W: expanding the square of the sum would leave no correct digit."""
    a = torch.randn(16, 2048).bfloat16()
    b = torch.randn(64, 16).bfloat16()
    w = (b.double() @ a.double()).bfloat16()
    scale = torch.tensor([-(1 - 1e-3)])
    exact = (w.double() + scale.double() * (b.double() @ a.double())).norm(dim=1)
    norm = F.dora_weight_norm(w, a, b, scaling=scale).double()
    assert exact.max() < 0.01 * w.double().norm(dim=1).min()
    assert ((norm - exact).abs() / exact).max() <= 5e-6


def test_a_large_bias_costs_the_magnitude_nothing():
    """The magnitude's gradient is a sum of dy·z, and z is kept, not recovered from y."""
    out, same, exact = compared(*leaves(dtype=torch.bfloat16, bias=0.0), "lora", 0.0)
    large, _, truth = compared(*leaves(dtype=torch.bfloat16, bias=6400.0), "lora", 0.0)
    assert error(large[4], truth[4]) <= bound(same[4], exact[4])
    assert torch.equal(large[4], out[4])


def test_rows_that_are_zero_and_magnitudes_that_are_not_positive():
    (x, a, b, m, bias), w, dy = leaves()
    w[3] = 0
    b[3] = 0
    m[4] = 0
    m[5] = -2.0
    x, a, b, m = (tensor.requires_grad_() for tensor in (x, a, b, m))
    y = F.dora_linear(x, w, a, b, m, bias)
    y.backward(dy)
    assert torch.equal(y[:, 3:5], bias[3:5].expand(len(y), 2))
    assert m.grad[3] == 0 and m.grad[4] != 0
    assert all(tensor.grad.isfinite().all() for tensor in (x, a, b, m))
    opposite = F.dora_linear(x, w, a, b, -m, None)
    assert torch.equal(opposite, -F.dora_linear(x, w, a, b, m, None))


def test_nan_stays_in_its_row():
    (x, a, b, m, bias), w, _ = leaves()
    w[7, 5] = b[9, 0] = float("nan")
    assert F.dora_weight_norm(w, a, b).isnan().nonzero().flatten().tolist() == [7, 9]
    y = F.dora_linear(x, w, a, b, m, bias)
    assert y.isnan().any(0).nonzero().flatten().tolist() == [7, 9]
    assert y[:, [7, 9]].isnan().all()


@pytest.mark.parametrize("mode, p", MODES)
def test_every_bit_is_determined(mode, p):
    once, twice = (
        compared(*leaves(dtype=torch.bfloat16), mode, p, False)[0] for _ in range(2)
    )
    assert all(map(torch.equal, once, twice))


@pytest.mark.parametrize("mode, p", MODES)
def test_saves_one_z_more_than_lora(mode, p):
    (x, a, b, m, bias), w, _ = leaves()
    trainable = [tensor.requires_grad_() for tensor in (a, b, m, bias)]
    saved = {}

    def save(tensor):
        return saved.setdefault(tensor.data_ptr(), tensor)

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        F.dora_linear(x, w, *trainable, dropout_p=p, dropout_mode=mode)
    own = {tensor.data_ptr() for tensor in (x, w, a, b, m, bias)}
    large = [
        tensor
        for pointer, tensor in saved.items()
        if pointer not in own and tensor.numel() > 48 * 8
    ]
    shapes = [
        tensor.shape
        for tensor in large
        if tensor.dtype is torch.float32 and tensor.shape[1:] != (8,)
    ]
    assert shapes == [(70, 48)]


def test_bad_input_is_named():
    (x, a, b, m, _), w, _ = leaves()
    with pytest.raises(
        ValueError, match=r"dora: magnitude must be \(48,\), got \(47,\)"
    ):
        F.dora_linear(x, w, a, b, m[1:])
    with pytest.raises(
        TypeError, match=r"dora: magnitude must be torch.float32, got torch.bfloat16"
    ):
        F.dora_linear(x, w, a, b, m.bfloat16())
    with pytest.raises(
        ValueError, match="dora: dropout_mode must be peft or lora, got 'both'"
    ):
        F.dora_linear(x, w, a, b, m, dropout_mode="both")
    with pytest.raises(
        ValueError, match="dora: w must be given itself, got a product of it"
    ):
        F.dora_linear(x, F.Base("given", [x @ w.T]), a, b, m)
    with pytest.raises(ValueError, match="lora: w must be frozen"):
        F.dora_linear(x, w.requires_grad_(), a, b, m)
