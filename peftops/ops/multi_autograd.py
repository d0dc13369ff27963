"""Multi-LoRA's autograd Function, whose gradients can be differentiated again.

The functions here take what `arguments` in multi.py returns. constants is (form, block, adapters);
tensors are those of the base, then every lora_A, then every lora_B.
"""

import torch
from torch import Tensor

from .lora_base import base_rows, rows, shaped
from .lora_contract import FEW
from .lora_formula import formula, gradients, graph_wanted
from .multi_contract import PAGE, expect_multi, multi_bwd, multi_fwd, multi_gemv

SAVED = 13  # tensors that are saved for backward before those of the base
CONSTANTS = 9  # the place of constants among the arguments, after which tensors follow


def forward(
    ctx, given, bias, gain, slots, table, rank, scale, p, seed, constants, *tensors
):
    """y; in ctx, what backward needs. ctx may be None if there is no backward."""
    base, lora_A, lora_B = divided(tensors, constants)
    form, block, _ = constants
    a = stacked(lora_A)
    b = stacked(turned(lora_B))
    x = rows(given)
    weight = base_rows(base, form)
    if ctx is None and p is None:
        y = y_alone(x, weight, a, b, slots, table, rank, scale, bias, gain, form, block)
        return shaped(y, given.shape)
    keep_z = ctx is not None and gain is not None and ctx.needs_input_grad[2]
    y, h, bits, z = multi_fwd(
        x,
        weight,
        a,
        b,
        slots,
        table,
        rank,
        scale,
        p=p,
        bias=bias,
        gain=gain,
        seed=seed,
        form=form,
        block=block,
        keep_z=keep_z,
    )
    if ctx is not None:
        saved_base = base if form != "given" or keep_z else ()
        # the adapters themselves, too: autograd sees whether they have changed since
        ctx.save_for_backward(
            *(given, a, b, bias, gain, slots, table, rank, scale, p, h, bits, z),
            *saved_base,
            *lora_A,
            *lora_B,
        )
        ctx.constants = constants
    return shaped(y, given.shape)


def y_alone(
    x,
    base,
    a,
    b,
    slots,
    table,
    rank,
    scale,
    bias,
    gain,
    form,
    block,
) -> Tensor:
    """multi_fwd's y, by one pass over the base where there are few rows. Nothing is dropped."""
    route = slots, table, rank, scale
    # x's shape is read last: once it is read, torch.compile compiles anew for another one
    if x.shape[0] <= FEW:
        return multi_gemv(x, base, a, b, *route, bias, gain, form, block)
    y, *_ = multi_fwd(x, base, a, b, *route, None, bias, gain, None, form, block)
    return y


def backward(ctx, dy):
    """The gradients of forward's arguments after ctx; None for those that need none."""
    if graph_wanted():
        return backward_again(ctx, dy)
    saved = ctx.saved_tensors
    given, a, b, bias, gain, *route, p, h, bits, z = saved[:SAVED]
    base, lora_A, lora_B = divided(saved[SAVED:], ctx.constants)
    form, block, adapters = ctx.constants
    needs = ctx.needs_input_grad
    each = needs[len(needs) - 2 * adapters :]
    dx, da, db, dbias, dgain = multi_bwd(
        rows(dy),
        rows(given),
        [] if form == "given" else base,
        a,
        b,
        *route,
        h,
        bits,
        z,
        [needs[0], any(each[:adapters]), any(each[adapters:]), needs[1], needs[2]],
        p=p,
        bias=bias,
        gain=gain,
        form=form,
        block=block,
    )
    grads = [
        *parts(da, lora_A, each[:adapters]),
        *turned_parts(db, lora_B, each[adapters:]),
    ]
    dbase = [None] * (len(needs) - CONSTANTS - 1 - 2 * adapters)
    if needs[CONSTANTS + 1]:  # of a given product
        dbase[0] = dy if gain is None else of_each_row(dy, gain, route[0])
    first = (
        dx.view(given.shape) if needs[0] else None,
        dbias if needs[1] else None,
        dgain if needs[2] else None,
    )
    return *first, *[None] * 7, *dbase, *grads


def backward_again(ctx, dy):
    """The result of backward, as a graph that autograd can differentiate."""
    saved = ctx.saved_tensors
    given, _, _, bias, gain, *route, _, bits, _ = saved[:SAVED]
    base, lora_A, lora_B = divided(saved[SAVED:], ctx.constants)
    form, block, adapters = ctx.constants
    needs = ctx.needs_input_grad
    y0 = ()
    if form == "given":
        # only a gradient of gain reads y0's values, and then it was saved
        y0 = base or [torch.zeros_like(dy, requires_grad=True)]

    def function(given, bias, gain, *others):
        weight = [rows(t) for t in others[: len(y0)]] or base
        lora_A, lora_B = halves(others[len(y0) :])
        y, _, _ = formula(
            "multi_formula",
            rows(given),
            weight,
            stacked(lora_A),
            stacked(turned(lora_B)),
            *route,
            bias=bias,
            gain=gain,
            bits=bits,
            form=form,
            block=block,
        )
        return y.to(given.dtype).view(dy.shape)

    after = CONSTANTS + 1
    bases = len(needs) - after - 2 * adapters
    wanted = *needs[:3], *needs[after : after + len(y0)], *needs[after + bases :]
    args = given, bias, gain, *y0, *lora_A, *lora_B
    grads = gradients(function, args, wanted, dy)
    dbase = [*grads[3 : 3 + len(y0)], *[None] * (bases - len(y0))]
    return *grads[:3], *[None] * 7, *dbase, *grads[3 + len(y0) :]


def plain(
    given,
    bias,
    gain,
    slots,
    table,
    rank,
    scale,
    p,
    seed,
    constants,
    *tensors,
):
    """forward's y by torch's own operations, for torch.func, forward-mode AD and torch.export."""
    base, lora_A, lora_B = divided(tensors, constants)
    form, block, _ = constants
    x = rows(given)
    weight = base_rows(base, form)
    a = stacked(lora_A)
    b = stacked(turned(lora_B))
    route = slots, table, rank, scale, p
    expect_multi(x, weight, a, b, *route, bias, gain, form, block)
    y = formula(
        "multi_plain",
        x,
        weight,
        a,
        b,
        *route,
        bias=bias,
        gain=gain,
        seed=seed,
        form=form,
        block=block,
    )
    return y.to(x.dtype).view(*given.shape[:-1], y.shape[1])


def divided(tensors, constants) -> tuple[list, list, list]:
    """tensors as those of the base, every lora_A, and every lora_B."""
    bases = len(tensors) - 2 * constants[2]
    return list(tensors[:bases]), *halves(tensors[bases:])


def halves(tensors) -> tuple[list, list]:
    half = len(tensors) // 2
    return list(tensors[:half]), list(tensors[half:])


def turned(lora_B):
    """Every lora_B (n, r) as (r, n): rank-major, as the op takes it."""
    return [b.T for b in lora_B]


def stacked(matrices) -> Tensor:
    """The matrices (r, columns), one below the other, each filled up to whole pages with zeros."""
    pieces = []
    for t in matrices:
        pieces.append(t)
        missing = -t.shape[0] % PAGE
        if missing:
            pieces.append(t.new_zeros(missing, t.shape[1]))
    return torch.cat(pieces)


def parts(grad, matrices, wanted):
    """The gradient of each of the matrices that `stacked` took; None for those not wanted."""
    if not any(wanted):
        return [None] * len(matrices)
    pieces = grad.split([t.shape[0] + -t.shape[0] % PAGE for t in matrices])
    grads = []
    for piece, t, want in zip(pieces, matrices, wanted, strict=True):
        if piece.shape[0] != t.shape[0]:
            piece = piece[: t.shape[0]]
        if piece.dtype is not t.dtype:
            piece = piece.to(t.dtype)
        grads.append(piece if want else None)
    return grads


def turned_parts(grad, lora_B, wanted):
    """The gradient of each lora_B (n, r), whose stack was rank-major; None for those not wanted.

    Gradients that autograd can keep as they are save a copy of each. Where all adapters have one
    rank, of whole pages, one copy turns them all.
    """
    kinds = {(b.shape[1], b.dtype) for b in lora_B}
    rank, dtype = next(iter(kinds))
    if len(kinds) > 1 or not rank or rank % PAGE or not all(wanted):
        every = parts(grad, turned(lora_B), wanted)
        return [t if t is None else t.T for t in every]
    every = grad.view(len(lora_B), rank, grad.shape[1]).transpose(1, 2)
    return every.to(dtype).contiguous().unbind()


def of_each_row(dy, gain, slots):
    """dy ⊙ the gain of each row's slot, in dy's dtype."""
    ones = gain.new_ones(1, gain.shape[1])
    each = torch.cat([gain, ones])[slots]  # -1 takes the last
    return (rows(dy) * each).to(dy.dtype).view(dy.shape)


class MultiLoRA(torch.autograd.Function):
    forward = staticmethod(forward)
    backward = staticmethod(backward)
