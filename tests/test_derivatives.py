"""Derivatives of our functions of higher order, forwards and by torch.func equal torch's own.

Also what may happen between a forward and its backward.
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


def total(function):
    return lambda x: function(x).square().sum()


def hessian_on_a_plane(function, x, direction):
    """Along two numbers: a step in the direction, and one added to all of x."""
    return functional.hessian(
        total(lambda offsets: function(x + offsets[0] * direction + offsets[1])),
        direction.new_ones(2),
    )


def forward_over_reverse(function, x, direction):
    return torch.func.jvp(torch.func.grad(total(function)), (x,), (direction,))[1]


def gradient_penalty(function, x, direction):
    (gradient,) = grad(total(function)(x.requires_grad_()), x, create_graph=True)
    return grad(gradient.square().sum(), x)[0]


def forward_mode(function, x, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(
            function(forward_ad.make_dual(x, direction))
        ).tangent


DERIVATIVES = {  # of a function f at x, in the direction v
    "gradient penalty": gradient_penalty,
    "hvp": lambda f, x, v: functional.hvp(total(f), x, v)[1],
    "vhp": lambda f, x, v: functional.vhp(total(f), x, v)[1],
    "hessian": hessian_on_a_plane,
    "jvp": lambda f, x, v: functional.jvp(f, x, v)[1],
    "forward-mode AD": forward_mode,
    "torch.func.jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1],
    "torch.func.grad": lambda f, x, v: torch.func.grad(total(f))(x),
    "torch.func, forward over reverse": forward_over_reverse,
    "torch.func.vmap": lambda f, x, v: torch.func.vmap(f)(torch.stack([x, v])),
}
LORA = NAMES[:4]
DORA = NAMES[:5]


def product(inputs, w):
    """x·Wᵀ + 0.7·(x·Aᵀ)·Bᵀ of the tensors t by name, without the bias."""
    return inputs["x"] @ w.T + 0.7 * (inputs["x"] @ inputs["a"].T) @ inputs["b"].T


def gain(inputs, w, detach=True):
    """DoRA's magnitude / ‖W + 0.7·B·A‖, with a constant norm or a differentiated one."""
    norm = (w + 0.7 * inputs["b"] @ inputs["a"]).norm(dim=1)
    if detach:
        norm = norm.detach()
    return inputs["magnitude"] / norm


def lora(inputs, weight, **options):
    return F.lora_linear(
        inputs["x"],
        weight,
        inputs["a"],
        inputs["b"],
        inputs["bias"],
        scaling=0.7,
        **options,
    )


def dora(inputs, w, **options):
    return F.dora_linear(
        inputs["x"],
        w,
        inputs["a"],
        inputs["b"],
        inputs["magnitude"],
        inputs["bias"],
        scaling=0.7,
        **options,
    )


LAYERS = {  # the names of its arguments, our layer, and the formula
    "lora": (LORA, lora, lambda inputs, w: product(inputs, w) + inputs["bias"]),
    "few": (
        LORA,
        lambda inputs, w: lora(inputs | {"x": inputs["x"][:, :3]}, w),
        lambda inputs, w: (product(inputs, w) + inputs["bias"])[:, :3],
    ),
    "gain": (
        DORA,
        lambda inputs, w: lora(inputs, w, gain=inputs["magnitude"]),
        lambda inputs, w: inputs["magnitude"] * product(inputs, w) + inputs["bias"],
    ),
    "given": (
        (*LORA, "y0"),
        lambda inputs, w: lora(inputs, F.Base("given", [inputs["y0"]])),
        lambda inputs, w: inputs["y0"] + product(inputs, 0 * w) + inputs["bias"],
    ),
    "nf4": (
        LORA,
        lambda inputs, w: lora(inputs, PACKED),
        lambda inputs, w: product(inputs, PACKED.dequantize(w.dtype)) + inputs["bias"],
    ),
    "dora": (
        DORA,
        dora,
        lambda inputs, w: gain(inputs, w) * product(inputs, w) + inputs["bias"],
    ),
    "dora, whole": (
        DORA,
        lambda inputs, w: dora(inputs, w, detach_norm=False),
        lambda inputs, w: (
            gain(inputs, w, detach=False) * product(inputs, w) + inputs["bias"]
        ),
    ),
}


def derivative(layer, derivative_name, name, dtype):
    """The derivative in one direction of the argument `name`."""
    torch.manual_seed(0)
    tensors = {
        name: torch.randn(shape).to(dtype)
        for name, shape in zip(NAMES, SHAPES, strict=True)
    }
    x = tensors[name]
    direction = torch.randn(x.shape).to(dtype)

    def function(x):
        return layer(tensors | {name: x}, W.to(dtype))

    return DERIVATIVES[derivative_name](function, x, direction).detach()


@pytest.mark.parametrize("derivative_name", DERIVATIVES)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_derivative_by_every_argument_is_torchs(layer, derivative_name):
    names, ours, formula = LAYERS[layer]
    for name in names:
        exact = derivative(formula, derivative_name, name, torch.float64)
        same = derivative(formula, derivative_name, name, torch.float32)
        out = derivative(ours, derivative_name, name, torch.float32)
        assert exact.any(), name
        assert error(out, exact) <= bound(same, exact), name


def test_no_gradient_runs_through_another_argument():
    """Arguments may depend on each other: one adapter on another, and the input on both."""
    torch.manual_seed(0)
    x, a, b = (
        torch.randn(shape, requires_grad=True) for shape in ((70, 16), (4, 16), (24, 4))
    )

    def second_gradients(layer, dtype):
        first, second = a.to(dtype), b.to(dtype)
        tensors = {
            "x": x.to(dtype) * first.sum(),
            "a": first,
            "b": second * first.sum(),
            "bias": 0 * second[:, 0],
        }
        y = layer(tensors, W.to(dtype))
        grads = grad(y.square().sum(), (x, a, b), create_graph=True)
        return grad(sum(gradient.square().sum() for gradient in grads), (x, a, b))

    def formula(inputs, w):
        return product(inputs, w) + inputs["bias"]

    exact = second_gradients(formula, torch.float64)
    same = second_gradients(formula, torch.float32)
    assert error(second_gradients(lora, torch.float32), exact) <= bound(same, exact)


def test_gradients_with_a_graph_are_those_without():
    torch.manual_seed(0)
    leaves = [
        torch.randn(shape, requires_grad=True) for shape in ((70, 16), (4, 16), (24, 4))
    ]

    def gradients(dtype, **options):
        x, a, b = (leaf.to(dtype) for leaf in leaves)
        torch.manual_seed(1)
        y = F.lora_linear(x, W.to(dtype), a, b, dropout_p=0.3)
        return grad(y.square().sum(), (x, a, b), **options)

    exact = gradients(torch.float64)
    plain = gradients(torch.float32)
    with_graph = gradients(torch.float32, create_graph=True)
    assert error(with_graph, exact) <= bound(plain, exact)
    assert all(gradient.requires_grad for gradient in with_graph)


CALLS = {
    "lora": lambda x, w, a, b, m: F.lora_linear(x, w, a, b),
    "dropout": lambda x, w, a, b, m: F.lora_linear(x, w, a, b, dropout_p=0.3),
    "dora": lambda x, w, a, b, m: F.dora_linear(x, w, a, b, m, detach_norm=False),
    "dora's dropout": lambda x, w, a, b, m: F.dora_linear(x, w, a, b, m, dropout_p=0.3),
}


def output_and_leaves(call, rows, dtype=torch.float32):
    """The output of a call, and the leaves that it depends on."""
    torch.manual_seed(0)
    leaves = [
        torch.randn(shape).to(dtype).requires_grad_()
        for shape in ((2, rows, 16), (4, 16), (24, 4))
    ]
    m = torch.ones(24, requires_grad=True)
    y = CALLS[call](leaves[0], W.to(dtype), *leaves[1:], m)
    if call.startswith("dora"):
        leaves.append(m)
    return y, leaves


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("call", CALLS)
def test_an_output_may_be_changed_in_place(call, rows):
    y, leaves = output_and_leaves(call, rows)
    expected = grad((2 * y).clamp(-1, 1).sum(), leaves)
    y, leaves = output_and_leaves(call, rows)
    y *= 2
    y.clamp_(-1, 1)
    assert all(map(torch.equal, grad(y.sum(), leaves), expected))


def test_an_output_without_a_graph_may_be_changed_in_place():
    with torch.no_grad():
        y, _ = output_and_leaves("lora", 3)
    y += torch.ones(24, requires_grad=True)
    assert y.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("call", CALLS)
def test_backward_does_not_see_another_autocast(call, rows, dtype):
    y, leaves = output_and_leaves(call, rows, dtype)
    expected = grad(y.sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", torch.float16):
        assert all(map(torch.equal, grad(y.sum(), leaves), expected))


def test_a_tensor_that_outlived_its_transform_is_what_it_held():
    """A function under torch.func.grad hands out such a tensor."""
    leaked = []

    def leak(x):
        leaked.append(x)
        return x.sum()

    torch.func.grad(leak)(torch.randn(70, 16))
    w, a, b = (torch.randn(shape) for shape in ((24, 16), (4, 16), (24, 4)))
    expected = F.lora_linear(leaked[0].clone(), w, a, b)
    assert torch.equal(F.lora_linear(leaked[0], w, a, b), expected)
    assert torch.equal(F.lora_linear(leaked[0], w, a.requires_grad_(), b), expected)
    F.lora_linear(leaked[0], w, a, b).sum().backward()
    assert a.grad.abs().sum() > 0
