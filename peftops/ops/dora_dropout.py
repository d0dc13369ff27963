"""DoRA's dropout_mode "peft", in which the base sees drop(x) too: its autograd Function.

y = g ⊙ (drop(x)·Ŵᵀ + s · drop(x)·Aᵀ·Bᵀ) + (x - drop(x))·Ŵᵀ + bias

constants is (form, block, p).
"""

import torch

from .dora_contract import dora_drop, dora_mix
from .lora_base import no_delta, rows, shaped
from .lora_contract import lora_bwd, lora_fwd
from .lora_formula import formula, gradients, graph_wanted


def dropped(
    ctx,
    given,
    a,
    b,
    bias,
    gain,
    scale,
    seed,
    constants,
    *base,
):
    """y of dropout_mode "peft"; in ctx, what backward needs. ctx may be None."""
    x = rows(given)
    base = list(base)
    form, block, p = constants
    kept, rest, bits = dora_drop(x, seed, p)
    keep_z = ctx is not None and ctx.needs_input_grad[4]
    y, h, _, z = lora_fwd(
        kept,
        base,
        a,
        b,
        scale,
        bias=bias,
        gain=gain,
        form=form,
        block=block,
        keep_z=keep_z,
    )
    delta = no_delta(x.shape[1], y.shape[1], x.dtype, x.device)
    y_rest, *_ = lora_fwd(rest, base, *delta, scale, form=form, block=block)
    y = y + y_rest  # not in place: sac_policy may keep y
    if ctx is not None:
        ctx.save_for_backward(given, a, b, bias, gain, scale, h, bits, z, *base)
        ctx.constants = constants
    return shaped(y, given.shape)


class Dropped(torch.autograd.Function):
    """dropout_mode "peft", with gradients that can be differentiated again."""

    forward = staticmethod(dropped)

    @staticmethod
    def backward(ctx, dy):
        if graph_wanted():
            return Dropped.backward_again(ctx, dy)
        given, a, b, bias, gain, scale, h, bits, z, *base = ctx.saved_tensors
        form, block, p = ctx.constants
        x = rows(given)
        dy = rows(dy)
        need = [*ctx.needs_input_grad[:5], False]
        no_bits = x.new_empty(x.shape[0], 0, dtype=torch.uint8)
        kept = dora_mix(
            x, None, bits, p
        )  # made again; x is saved anyway, for other layers too
        grads = lora_bwd(
            dy,
            kept,
            base,
            a,
            b,
            scale,
            h,
            no_bits,
            z,
            need,
            bias=bias,
            gain=gain,
            form=form,
            block=block,
        )
        grads = [g if wanted else None for g, wanted in zip(grads, need, strict=True)][
            :5
        ]
        if need[0]:
            dx_rest = product_bwd(dy, x, base, scale, form, block, no_bits)
            grads[0] = dora_mix(grads[0], dx_rest, bits, p).view(given.shape)
        return *grads, *[None] * (len(ctx.needs_input_grad) - 5)

    @staticmethod
    def backward_again(ctx, dy):
        """The result of backward, as a graph that autograd can differentiate."""
        *args, scale, _, bits, _ = ctx.saved_tensors[:9]
        form, block, p = ctx.constants
        base = ctx.saved_tensors[9:]

        def function(
            given,
            a,
            b,
            bias,
            gain,
        ):
            y = formula(
                "dora_formula",
                rows(given),
                base,
                a,
                b,
                scale,
                bias=bias,
                gain=gain,
                bits=bits,
                form=form,
                block=block,
                p=p,
            )
            return y.to(given.dtype).view(dy.shape)

        grads = gradients(function, args, ctx.needs_input_grad[:5], dy)
        return *grads, *[None] * (len(ctx.needs_input_grad) - 5)


def product_bwd(
    dy,
    x,
    base,
    scale,
    form,
    block,
    no_bits,
):
    """dy·Ŵ (m, k), the gradient of x in x·Ŵᵀ."""
    delta = no_delta(x.shape[1], dy.shape[1], x.dtype, x.device)
    empty = x.new_empty(x.shape[0], 0)
    need_x = [True, False, False, False, False, False]
    dx, *_ = lora_bwd(
        dy,
        x,
        base,
        *delta,
        scale,
        empty,
        no_bits,
        empty,
        need_x,
        form=form,
        block=block,
    )
    return dx


def plain(
    given,
    a,
    b,
    bias,
    gain,
    scale,
    seed,
    constants,
    *base,
):
    """dropped's y by torch's own operations, for torch.func, forward-mode AD and torch.export."""
    x = rows(given)
    y = formula("dora_plain", x, base, a, b, scale, bias, gain, seed, *constants)
    return y.to(x.dtype).view(*given.shape[:-1], y.shape[1])
