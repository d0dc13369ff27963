"""LoRA's autograd Function, whose gradients can be differentiated again.

The functions here take what `arguments` in lora.py returns; constants is (form, block, p).
"""

import torch

from .lora_base import base_rows, no_delta, rows, shaped
from .lora_contract import FEW, expect_lora, lora_bwd, lora_fwd, lora_gemv
from .lora_formula import formula, gradients, graph_wanted


def forward(
    ctx,
    given,
    a,
    b,
    bias,
    gain,
    gate,
    scale,
    seed,
    constants,
    *base,
):
    """y; in ctx, what backward needs. ctx may be None if there is no backward."""
    x = rows(given)
    gates = rows(gate)
    form, block, p = constants
    weight = base_rows(base, form)
    keep_z = ctx is not None and gain is not None and ctx.needs_input_grad[4]
    h = bits = z = None
    # x's shape is read last: once it is read, torch.compile compiles anew for another one
    if not p and not keep_z and x.shape[0] <= FEW:
        y = lora_gemv(
            x,
            weight,
            a,
            b,
            scale,
            bias=bias,
            gain=gain,
            gate=gates,
            form=form,
            block=block,
        )
    else:
        y, h, bits, z = lora_fwd(
            x,
            weight,
            a,
            b,
            scale,
            bias=bias,
            gain=gain,
            gate=gates,
            seed=seed,
            form=form,
            block=block,
            p=p,
            keep_z=keep_z,
        )
    if ctx is not None:
        saved_base = base if form != "given" or keep_z else ()
        ctx.save_for_backward(
            given, a, b, bias, gain, gate, scale, h, bits, z, *saved_base
        )
        ctx.constants = constants
    return shaped(y, given.shape)


def backward(ctx, dy):
    """The gradients of forward's arguments after ctx; None for those that need none."""
    if graph_wanted():
        return backward_again(ctx, dy)
    given, a, b, bias, gain, gate, scale, h, bits, z, *base = ctx.saved_tensors
    x = rows(given)
    need = list(ctx.needs_input_grad[:6])
    if h is None:  # of few rows h is cheaper to compute again than to keep
        h = recompute_h(x, a, scale)
        bits = x.new_empty(x.shape[0], 0, dtype=torch.uint8)
        z = x.new_empty(x.shape[0], 0)
    form, block, p = ctx.constants
    if form == "given":
        base = []
    grads = lora_bwd(
        rows(dy),
        x,
        base,
        a,
        b,
        scale,
        h,
        bits,
        z,
        need,
        bias=bias,
        gain=gain,
        gate=rows(gate),
        form=form,
        block=block,
        p=p,
    )
    grads = [g if wanted else None for g, wanted in zip(grads, need, strict=True)]
    if need[0] and given.dim() != 2:
        grads[0] = grads[0].view(given.shape)
    if need[5] and gate.dim() != 2:
        grads[5] = grads[5].view(gate.shape)
    dbase = [None] * (len(ctx.needs_input_grad) - 9)
    if dbase and ctx.needs_input_grad[9]:
        dbase[0] = dy if gain is None else (dy * gain).to(dy.dtype)
    return *grads, None, None, None, *dbase


def backward_again(ctx, dy):
    """The result of backward, as a graph that autograd can differentiate."""
    *args, scale, _, bits, _ = ctx.saved_tensors[:10]
    base = ctx.saved_tensors[10:]
    form, block, p = ctx.constants
    y0 = ()
    if form == "given":
        # only a gradient of gain reads y0's values, and then it was saved
        y0 = base or [torch.zeros_like(dy, requires_grad=True)]

    def function(
        given,
        a,
        b,
        bias,
        gain,
        gate,
        *y0,
    ):
        weight = [rows(t) for t in y0] or base
        y, _, _ = formula(
            "lora_formula",
            rows(given),
            weight,
            a,
            b,
            scale,
            bias=bias,
            gain=gain,
            gate=rows(gate),
            bits=bits,
            form=form,
            block=block,
            p=p,
        )
        return y.to(given.dtype).view(dy.shape)

    needs = *ctx.needs_input_grad[:6], *ctx.needs_input_grad[9 : 9 + len(y0)]
    grads = gradients(function, (*args, *y0), needs, dy)
    others = [None] * (len(ctx.needs_input_grad) - 9 - len(y0))
    return *grads[:6], None, None, None, *grads[6:], *others


def plain(
    given,
    a,
    b,
    bias,
    gain,
    gate,
    scale,
    seed,
    constants,
    *base,
):
    """forward's y by torch's own operations, for torch.func, forward-mode AD and torch.export."""
    form, block, p = constants
    x = rows(given)
    gates = rows(gate)
    base = base_rows(base, form)
    expect_lora(x, base, a, b, scale, bias, gain, gates, form, block)
    y = formula(
        "lora_plain",
        x,
        base,
        a,
        b,
        scale,
        bias=bias,
        gain=gain,
        gate=gates,
        seed=seed,
        form=form,
        block=block,
        p=p,
    )
    return y.to(x.dtype).view(*given.shape[:-1], y.shape[1])


def recompute_h(x, a, scale):
    """h = x·aᵀ, rounded to x's dtype."""
    a = a.to(x.dtype)
    if not x.is_cuda:
        # on a CPU, torch's 16-bit products are slow, and compiled code adds in another order
        r, k = a.shape
        delta = no_delta(k, r, x.dtype, x.device)
        return lora_gemv(x, [a], *delta, scale)
    with torch.autocast("cuda", enabled=False):  # backward may run inside autocast
        return torch.mm(x, a.T)


class LoRA(torch.autograd.Function):
    forward = staticmethod(forward)
    backward = staticmethod(backward)
