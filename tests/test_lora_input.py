"""lora_linear on inputs of every shape and layout, and the errors for bad input."""

import pytest
import torch
from lora_calls import DROPOUT, FORMS, linear, trained

import peftops.functional as F
from peftops.testing.cases import lora


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("n", [0, 24])
@pytest.mark.parametrize("k", [0, 16])
def test_nothing_along_a_side(k, n, lead):
    """Without rows, columns or inputs the gradients are zeros, and the output is the bias."""
    x, a, b, bias, m = (
        torch.randn(shape, requires_grad=True)
        for shape in ((*lead, k), (4, k), (n, 4), (n,), (n,))
    )
    w = torch.randn(n, k)
    for y in (
        F.lora_linear(x, w, a, b, bias),
        F.dora_linear(x, w, a, b, m, bias, dropout_p=DROPOUT),
    ):
        y.sum().backward()
        assert y.shape == (*lead, n) and (k or torch.equal(y, bias.expand_as(y)))
    leaves = [x, a, b, bias, m]
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert x.numel() * n or not any(leaf.grad.any() for leaf in leaves[:3])


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("form", [*FORMS, "nf4"])
def test_a_base_of_another_number_of_tensors(form, count):
    inputs = lora(5, 16, 24, 4, torch.float32)
    with pytest.raises(ValueError, match=f"lora: (w|base) must be .*, got {count}"):
        F.lora_linear(
            inputs["x"],
            F.Base(form, [inputs["base"][0]] * count, 64),
            inputs["a"],
            inputs["b"],
        )


def test_any_rank_and_strides():
    inputs = lora(70, 16, 24, 4, torch.float32, gain=True, experts=2)
    y, dx = trained(inputs, 0.0, "dense")[:2]
    shapes = {
        "3-d": lambda x: x.view(7, 10, -1),
        "2-d strided": lambda x: x.T.contiguous().T,
        "4-d": lambda x: x.view(7, 1, 5, 2, -1),
    }
    for name, view in shapes.items():
        x = inputs["x"].detach().requires_grad_()
        out = linear(inputs | {"x": view(x), "gate": view(inputs["gate"])})
        grad = torch.autograd.grad(out, x, view(inputs["dy"]))[0]
        assert out.shape == (*view(x).shape[:-1], 24), name
        assert torch.equal(out.reshape(y.shape), y) and torch.equal(grad, dx), name
    first = linear(inputs | {"x": inputs["x"][:1], "gate": inputs["gate"][:1]})
    x = inputs["x"][0].clone().requires_grad_()
    vector = inputs | {"x": x, "gate": inputs["gate"][0]}
    assert torch.equal(linear(vector), first[0])
    linear(vector).sum().backward()
    assert x.grad.shape == (16,)


def test_zero_rows():
    inputs = lora(0, 16, 24, 4, torch.float32, bias=True)
    y, dx, da, db, dbias = trained(inputs, DROPOUT, "dense")
    assert y.shape == (0, 24) and dx.shape == (0, 16)
    assert (
        not da.any()
        and not db.any()
        and not dbias.any()
        and da.shape == inputs["a"].shape
    )


def test_a_given_product_has_any_rank_and_a_gradient():
    inputs = lora(70, 16, 24, 4, torch.float32, form="given", gain=True)
    y0 = inputs["base"][0].view(7, 10, 24).clone().requires_grad_()
    x = inputs["x"].view(7, 10, 16).clone().requires_grad_()
    y = F.lora_linear(
        x,
        F.Base("given", [y0]),
        inputs["a"],
        inputs["b"],
        scaling=0.7,
        gain=inputs["gain"],
    )
    dy = inputs["dy"].view(7, 10, 24)
    dx, dy0 = torch.autograd.grad(y, [x, y0], dy)
    flat = trained(inputs, 0.0, "given")
    assert torch.equal(y.view(70, 24), flat[0]) and torch.equal(
        dx.view(70, 16), flat[1]
    )
    assert torch.equal(dy0, dy * inputs["gain"])


def test_scaling_is_a_number_or_a_tensor():
    inputs = lora(5, 16, 24, 4, torch.float32)
    assert torch.equal(linear(inputs), linear(inputs, scaling=torch.tensor([0.7])))
    half = linear(inputs, scaling=0.35)
    assert not torch.equal(half, linear(inputs)) and torch.equal(
        half, linear(inputs | {"b": inputs["b"] / 2})
    )


ERRORS = [
    (
        ValueError,
        r"lora: w must be \(24, 16\), got \(23, 16\)",
        lambda inputs: {"base": [inputs["base"][0][:23]]},
    ),
    (
        ValueError,
        r"lora: a must be \(4, 16\), got \(4, 15\)",
        lambda inputs: {"a": inputs["a"][:, :15]},
    ),
    (
        ValueError,
        r"lora: b must be \(24, 4\), got \(24, 3\)",
        lambda inputs: {"b": inputs["b"][:, :3]},
    ),
    (
        ValueError,
        r"lora: bias must be \(24,\), got \(23,\)",
        lambda inputs: {"bias": torch.ones(23)},
    ),
    (
        ValueError,
        r"lora: gain must be \(24,\), got \(24, 1\)",
        lambda inputs: {"gain": torch.ones(24, 1)},
    ),
    (
        ValueError,
        r"lora: gate must be \(5, 2\), got \(4, 2\)",
        lambda inputs: {"gate": torch.ones(4, 2)},
    ),
    (
        TypeError,
        r"lora: a must be torch\.float32, got torch\.float16",
        lambda inputs: {"a": inputs["a"].half()},
    ),
    (
        TypeError,
        r"lora: w must be torch\.float32, got torch\.bfloat16",
        lambda inputs: {"base": [inputs["base"][0].bfloat16()]},
    ),
    (
        TypeError,
        r"lora: gain must be torch\.float32, got torch\.float64",
        lambda inputs: {"gain": torch.ones(24).double()},
    ),
    (
        TypeError,
        r"lora: x must be .*, got torch\.int64",
        lambda inputs: {"x": inputs["x"].long()},
    ),
    (
        ValueError,
        "lora: w must be frozen",
        lambda inputs: {"base": [inputs["base"][0].requires_grad_()]},
    ),
]


@pytest.mark.parametrize(
    "error_class, message, change", ERRORS, ids=[message for _, message, _ in ERRORS]
)
def test_errors(error_class, message, change):
    inputs = lora(5, 16, 24, 4, torch.float32)
    with pytest.raises(error_class, match=message):
        linear(inputs | change(inputs))


def test_a_base_is_checked_like_a_weight():
    inputs = lora(4, 4, 4, 2, torch.float32)
    x, a, b = (inputs[name] for name in ("x", "a", "b"))
    w = inputs["base"][0]
    with pytest.raises(ValueError, match="lora: w must be frozen"):
        F.lora_linear(x, F.Base("dense", [w.clone().requires_grad_()]), a, b)
    with pytest.raises(
        ValueError,
        match="lora: form must be dense or transposed or given or nf4, got 'other'",
    ):
        F.lora_linear(x, F.Base("other", [w]), a, b)
    with pytest.raises(ValueError, match="lora: scaling must be a constant"):
        F.lora_linear(x, w, a, b, scaling=torch.ones(1, requires_grad=True))
    with pytest.raises(ValueError, match=r"lora: x must be \(\.\.\., k\), got \(\)"):
        F.lora_linear(x.sum(), w, a, b)
    with pytest.raises(ValueError, match=r"lora: b must be \(n, r\)"):
        F.lora_linear(x, w, a, b[0])
