"""Every way to differentiate our functions more than once, forwards, or by torch.func: the numbers are torch's own.

And what may happen between a forward and its backward.
"""

import pytest
import torch
from law import bound, error
from torch.autograd import forward_ad, functional, grad

import peftops.functional as F

NAMES = "x", "a", "b", "bias", "magnitude", "y0"
SHAPES = (2, 35, 16), (4, 16), (24, 4), (24,), (24,), (2, 35, 24)
W = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
PACKED = F.quantize_nf4(W)


def total(f):
    return lambda x: f(x).square().sum()


def gradient_penalty(f, x, v):
    (g,) = grad(total(f)(x.requires_grad_()), x, create_graph=True)
    return grad(g.square().sum(), x)[0]


def dual(f, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


WAYS = {  # of a function at x, in the direction v
    "gradient penalty": gradient_penalty,
    "hvp": lambda f, x, v: functional.hvp(total(f), x, v)[1],
    "vhp": lambda f, x, v: functional.vhp(total(f), x, v)[1],
    "hessian": lambda f, x, v: functional.hessian(
        total(lambda t: f(x + t[0] * v + t[1])), v.new_ones(2)
    ),
    "jvp": lambda f, x, v: functional.jvp(f, x, v)[1],
    "forward-mode AD": dual,
    "torch.func.jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1],
    "torch.func.grad": lambda f, x, v: torch.func.grad(total(f))(x),
    "torch.func, forward over reverse": lambda f, x, v: torch.func.jvp(
        torch.func.grad(total(f)), (x,), (v,)
    )[1],
    "torch.func.vmap": lambda f, x, v: torch.func.vmap(f)(torch.stack([x, v])),
}
LORA, DORA = NAMES[:4], NAMES[:5]


def product(t, w):
    return t["x"] @ w.T + 0.7 * (t["x"] @ t["a"].T) @ t["b"].T


def gain(t, w, whole=False):
    norm = (w + 0.7 * t["b"] @ t["a"]).norm(dim=1)
    return t["magnitude"] / (norm if whole else norm.detach())


def lora(t, weight, **options):
    return F.lora_linear(t["x"], weight, t["a"], t["b"], t["bias"], scaling=0.7, **options)


def dora(t, w, **options):
    return F.dora_linear(
        t["x"], w, t["a"], t["b"], t["magnitude"], t["bias"], scaling=0.7, **options
    )


LAYERS = {  # what it depends on, ours, and the formula
    "lora": (LORA, lora, lambda t, w: product(t, w) + t["bias"]),
    "few": (LORA, lambda t, w: lora(t | {"x": t["x"][:, :3]}, w), lambda t, w: (product(t, w) + t["bias"])[:, :3]),
    "gain": (
        DORA,
        lambda t, w: lora(t, w, gain=t["magnitude"]),
        lambda t, w: t["magnitude"] * product(t, w) + t["bias"],
    ),
    "given": (
        (*LORA, "y0"),
        lambda t, w: lora(t, F.Base("given", [t["y0"]])),
        lambda t, w: t["y0"] + product(t, 0 * w) + t["bias"],
    ),
    "nf4": (LORA, lambda t, w: lora(t, PACKED), lambda t, w: product(t, PACKED.dequantize(w.dtype)) + t["bias"]),
    "dora": (DORA, dora, lambda t, w: gain(t, w) * product(t, w) + t["bias"]),
    "dora, whole": (
        DORA,
        lambda t, w: dora(t, w, detach_norm=False),
        lambda t, w: gain(t, w, True) * product(t, w) + t["bias"],
    ),
}  # fmt: skip


def derivative(layer, way, name, dtype):
    """Of the layer's output, or the sum of its squares, in one direction of one argument"""
    torch.manual_seed(0)
    tensors = {
        name: torch.randn(shape).to(dtype) for name, shape in zip(NAMES, SHAPES, strict=True)
    }
    x, v = tensors[name], torch.randn(tensors[name].shape).to(dtype)
    return WAYS[way](lambda x: layer(tensors | {name: x}, W.to(dtype)), x, v).detach()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_way(layer, way):
    names, ours, formula = LAYERS[layer]
    for name in names:
        exact, same = (
            derivative(formula, way, name, dtype) for dtype in (torch.float64, torch.float32)
        )
        assert exact.any() and error(
            derivative(ours, way, name, torch.float32), exact
        ) <= bound(same, exact), name


def test_no_gradient_runs_through_another_argument():
    """As where one adapter is made of another, and both of the input."""
    torch.manual_seed(0)
    x, a, b = (torch.randn(shape, requires_grad=True) for shape in ((70, 16), (4, 16), (24, 4)))

    def found(layer, dtype):
        first, second = a.to(dtype), b.to(dtype)
        y = layer(
            {
                "x": x.to(dtype) * first.sum(),
                "a": first,
                "b": second * first.sum(),
                "bias": 0 * second[:, 0],
            }
        )
        grads = grad(y.square().sum(), (x, a, b), create_graph=True)
        return grad(sum(g.square().sum() for g in grads), (x, a, b))

    exact, same = (
        found(lambda t, dtype=dtype: product(t, W.to(dtype)) + t["bias"], dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert error(found(lambda t: lora(t, W), torch.float32), exact) <= bound(same, exact)


def test_gradients_with_a_graph_are_those_without():
    torch.manual_seed(0)
    made = [torch.randn(shape, requires_grad=True) for shape in ((70, 16), (4, 16), (24, 4))]

    def found(dtype, **options):
        x, a, b = (t.to(dtype) for t in made)
        torch.manual_seed(1)
        y = F.lora_linear(x, W.to(dtype), a, b, dropout_p=0.3)
        return grad(y.square().sum(), (x, a, b), **options)

    exact, plain, again = (
        found(torch.float64),
        found(torch.float32),
        found(torch.float32, create_graph=True),
    )
    assert error(again, exact) <= bound(plain, exact) and all(g.requires_grad for g in again)


CALLS = {
    "lora": lambda x, w, a, b, m: F.lora_linear(x, w, a, b),
    "dropout": lambda x, w, a, b, m: F.lora_linear(x, w, a, b, dropout_p=0.3),
    "dora": lambda x, w, a, b, m: F.dora_linear(x, w, a, b, m, detach_norm=False),
    "dora's dropout": lambda x, w, a, b, m: F.dora_linear(x, w, a, b, m, dropout_p=0.3),
}


def called(call, rows, dtype=torch.float32):
    """y, and the leaves that it is made of"""
    torch.manual_seed(0)
    leaves = [
        torch.randn(shape).to(dtype).requires_grad_()
        for shape in ((2, rows, 16), (4, 16), (24, 4))
    ]
    m = torch.ones(24, requires_grad=True)
    return CALLS[call](leaves[0], W.to(dtype), *leaves[1:], m), [*leaves, m] if call.startswith(
        "dora"
    ) else leaves


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("call", CALLS)
def test_an_output_may_be_changed_in_place(call, rows):
    y, leaves = called(call, rows)
    expected = grad((2 * y).clamp(-1, 1).sum(), leaves)
    y, leaves = called(call, rows)
    y *= 2
    y.clamp_(-1, 1)
    assert all(map(torch.equal, grad(y.sum(), leaves), expected))


def test_an_output_without_a_graph_may_be_changed_in_place():
    with torch.no_grad():
        y, _ = called("lora", 3)
    y += torch.ones(24, requires_grad=True)
    assert y.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("call", CALLS)
def test_backward_under_another_autocast(call, rows, dtype):
    y, leaves = called(call, rows, dtype)
    expected = grad(y.sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", torch.float16):
        assert all(map(torch.equal, grad(y.sum(), leaves), expected))


def test_what_outlived_its_transform_is_what_it_held():
    """A tensor that a function under torch.func.grad has handed out"""
    leaked = []
    torch.func.grad(lambda x: (leaked.append(x), x.sum())[1])(torch.randn(70, 16))
    w, a, b = torch.randn(24, 16), torch.randn(4, 16), torch.randn(24, 4)
    expected = F.lora_linear(leaked[0].clone(), w, a, b)
    assert torch.equal(F.lora_linear(leaked[0], w, a, b), expected)
    assert torch.equal(F.lora_linear(leaked[0], w, a.requires_grad_(), b), expected)
    F.lora_linear(leaked[0], w, a, b).sum().backward()
    assert a.grad.abs().sum() > 0
