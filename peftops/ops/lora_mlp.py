"""SwiGLU of three LoRA layers: y = down(silu(gate(x)) ⊙ up(x))"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from . import lora
from .lora_formula import graph_wanted, transformed


def lora_mlp(x, gate, up, down):
    """y = down(silu(gate(x)) ⊙ up(x)), the same bits as by layers; backward makes silu and product again.

    gate, up and down are (weight, lora_A, lora_B, bias, scaling, dropout_p) of lora_linear, which says what is raised.
    Of what lies between the layers, only the results of gate and up are kept for backward: half of the memory.
    """
    with torch.no_grad():
        cast, *gate = lora.arguments(x, *gate)
        _, *up = lora.arguments(cast, *up)
        _, *down = lora.arguments(cast.new_empty(0, down[1].shape[-1]), *down)
    if transformed():
        raise RuntimeError("lora_mlp: forward-mode AD and torch.func want layers by themselves")
    args = x, cast, (len(gate), len(up)), *gate, *up, *down
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args):
        return MLP.apply(*args)
    return forward(None, *args)


class Part:
    """What one layer of several has for autograd's ctx."""

    def __init__(self, needs_input_grad):
        self.needs_input_grad = needs_input_grad

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def give(self):
        """What was saved, for the ctx of all layers to keep; a part itself keeps no tensors."""
        return self.__dict__.pop("saved_tensors")

    def backward(self, dy, *tensors):
        """The gradients of its layer's arguments, or of none."""
        if not any(self.needs_input_grad):
            return (None,) * len(self.needs_input_grad)
        self.saved_tensors = tensors
        grads = lora.backward(self, dy)
        del self.saved_tensors
        return grads


def split(args, sizes):
    """What is of gate, of up and of down."""
    first, second = sizes
    return args[:first], args[first : first + second], args[first + second :]


def forward(ctx, given, x, sizes, *args):
    """given: x before autocast, in whose dtype its gradient is summed."""
    gate, up, down = split(args, sizes)
    if ctx is None:
        return lora.forward(
            None, silu(lora.forward(None, x, *gate)).mul_(lora.forward(None, x, *up)), *down
        )
    needs = split(ctx.needs_input_grad[3:], sizes)
    first = ctx.needs_input_grad[0]
    parts = [
        Part((first, *needs[0])),
        Part((first, *needs[1])),
        Part((first or any(needs[0] + needs[1]), *needs[2])),
    ]
    g, u = lora.forward(parts[0], x, *gate), lora.forward(parts[1], x, *up)
    y = lora.forward(parts[2], silu(g).mul_(u), *down)
    saved = [part.give() for part in parts]
    ctx.parts, ctx.sizes, ctx.dtype = (
        parts,
        [len(tensors) for tensors in saved[:2]],
        given.dtype,
    )
    ctx.save_for_backward(g, u, *saved[0], *saved[1], *saved[2][1:])  # all but the product
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
        saved, (gate, up, down) = split(saved, ctx.sizes), ctx.parts
        act = silu(g)
        ds, *ddown = down.backward(dy, act * u, *saved[2])
        if ds is None:  # only down is trained
            return (None,) * (len(ctx.needs_input_grad) - len(ddown)) + tuple(ddown)
        du, dg = act.mul_(ds), torch.ops.aten.silu_backward(ds.mul_(u), g)
        dx, *dgate = gate.backward(dg, *saved[0])
        also, *dup = up.backward(du, *saved[1])
        return (
            None if dx is None else dx.to(ctx.dtype).add_(also),
            None,
            None,
            *dgate,
            *dup,
            *ddown,
        )
