"""SwiGLU of three LoRA layers: y = down(silu(gate(x)) ⊙ up(x))"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from . import lora_autograd
from .lora import arguments
from .lora_formula import graph_wanted, transformed


def lora_mlp(x: Tensor, gate: tuple, up: tuple, down: tuple) -> Tensor:
    """y = down(silu(gate(x)) ⊙ up(x)), with the bits of three calls of lora_linear.

    Between the layers, only the results of gate and up are kept for backward, half of the memory.
    Backward computes silu and the product again.

    Args:
        x: (..., k).
        gate: (weight, lora_A, lora_B, bias, scaling, dropout_p), as lora_linear takes them.
        up: like gate.
        down: like gate.

    Returns:
        y (..., n), in x's dtype.

    Raises:
        RuntimeError: inside forward-mode AD and torch.func, and for create_graph in backward.
        ValueError, TypeError: as lora_linear.
    """
    with torch.no_grad():
        cast, *of_gate = arguments(x, *gate)
        _, *of_up = arguments(cast, *up)
        _, *of_down = arguments(cast.new_empty(0, down[1].shape[-1]), *down)
    if transformed():
        raise RuntimeError(
            "lora_mlp: forward-mode AD and torch.func want layers by themselves"
        )
    args = x, cast, (len(of_gate), len(of_up)), *of_gate, *of_up, *of_down
    if torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in args
    ):
        return MLP.apply(*args)
    return forward(None, *args)


class LayerContext:
    """Stands in for autograd's ctx in one of the three layers."""

    def __init__(self, needs_input_grad):
        self.needs_input_grad = needs_input_grad

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def give(self):
        """Hands over the saved tensors, which MLP's ctx keeps; none stay here."""
        return self.__dict__.pop("saved_tensors")

    def backward(self, dy, *tensors):
        """The gradients of the layer's arguments; tensors are those that `give` handed over."""
        if not any(self.needs_input_grad):
            return (None,) * len(self.needs_input_grad)
        self.saved_tensors = tensors
        grads = lora_autograd.backward(self, dy)
        del self.saved_tensors
        return grads


def split(args, sizes):
    """args of gate, of up and of down; sizes are the first two's."""
    first, second = sizes
    return args[:first], args[first : first + second], args[first + second :]


def forward(
    ctx,
    given,
    x,
    sizes,
    *args,
):
    """y; in ctx, what backward needs.

    given: x before autocast, whose gradient is summed in its dtype.
    """
    gate, up, down = split(args, sizes)
    if ctx is None:
        act = silu(lora_autograd.forward(None, x, *gate))
        product = act.mul_(lora_autograd.forward(None, x, *up))
        return lora_autograd.forward(None, product, *down)
    needs = split(ctx.needs_input_grad[3:], sizes)
    need_x = ctx.needs_input_grad[0]
    layers = [
        LayerContext((need_x, *needs[0])),
        LayerContext((need_x, *needs[1])),
        LayerContext((need_x or any(needs[0] + needs[1]), *needs[2])),
    ]
    g = lora_autograd.forward(layers[0], x, *gate)
    u = lora_autograd.forward(layers[1], x, *up)
    y = lora_autograd.forward(layers[2], silu(g).mul_(u), *down)
    saved = [layer.give() for layer in layers]
    ctx.layers = layers
    ctx.sizes = [len(tensors) for tensors in saved[:2]]
    ctx.dtype = given.dtype
    ctx.save_for_backward(
        g, u, *saved[0], *saved[1], *saved[2][1:]
    )  # without down's input
    return y


class MLP(torch.autograd.Function):
    forward = staticmethod(forward)

    @staticmethod
    def backward(ctx, dy):
        if graph_wanted():
            raise RuntimeError(
                "lora_mlp: create_graph must be False; layers by themselves differentiate again"
            )
        g, u, *saved = ctx.saved_tensors
        saved_gate, saved_up, saved_down = split(saved, ctx.sizes)
        gate, up, down = ctx.layers
        act = silu(g)
        dproduct, *ddown = down.backward(dy, act * u, *saved_down)
        if dproduct is None:  # only down is trained
            others = len(ctx.needs_input_grad) - len(ddown)
            return *[None] * others, *ddown
        du = act.mul_(dproduct)
        dg = torch.ops.aten.silu_backward(dproduct.mul_(u), g)
        dx, *dgate = gate.backward(dg, *saved_gate)
        dx_of_up, *dup = up.backward(du, *saved_up)
        if dx is not None:
            dx = dx.to(ctx.dtype).add_(dx_of_up)
        return dx, None, None, *dgate, *dup, *ddown
