"""Multi-LoRA on a CPU, in fp32 arithmetic whatever the dtype.

One kernel makes the whole operation. For few rows the base's product is LoRA's, in fp32, which
reads the weight once as it lies, and the kernel adds the rest.
"""

import torch

from .._C import cpu as _C
from .._replay import noted
from .lora import FEW, READ_AS_THEY_LIE, zero


def multi_fwd(
    y,
    h,
    bits,
    z,
    x,
    base,
    a,
    b,
    slots,
    table,
    rank,
    scale,
    p,
    bias,
    gain,
    seed,
    form,
    block,
    keep_z,
):
    if form in READ_AS_THEY_LIE and 1 <= x.shape[0] <= FEW:
        y0 = x.new_empty(y.shape, dtype=torch.float32)
        none = x.new_empty(0, x.shape[1]), x.new_empty(y.shape[1], 0)
        noted(_C.lora_few, y0, x, base, *none, scale, None, None, None, form, block)
        base = [y0]
        form = "given"
    noted(
        _C.multi_fwd,
        y,
        h,
        bits,
        z,
        x,
        base,
        a,
        b,
        slots,
        table,
        rank,
        scale,
        p,
        bias,
        gain,
        seed,
        form,
        block,
    )


def multi_gemv(
    y,
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
):
    h = x.new_empty(x.shape[0], 8 * table.shape[1])
    route = slots, table, rank, scale
    multi_fwd(
        y,
        h,
        None,
        None,
        x,
        base,
        a,
        b,
        *route,
        None,
        bias,
        gain,
        None,
        form,
        block,
        False,
    )


def multi_bwd(
    dx,
    da,
    db,
    dbias,
    dgain,
    dy,
    x,
    base,
    a,
    b,
    slots,
    table,
    rank,
    scale,
    h,
    bits,
    z,
    need,
    p,
    bias,
    gain,
    form,
    block,
):
    if not dy.numel():
        zero(dx, da, db, dbias, dgain)
        return
    noted(
        _C.multi_bwd,
        dx,
        da,
        db,
        dgain,
        dy,
        x,
        base,
        a,
        b,
        slots,
        table,
        rank,
        scale,
        h,
        bits,
        z,
        p,
        gain,
        form,
        block,
    )
    if need[3]:
        noted(_C.lora_sums, dbias, None, dy, z)


def multi_add_(y, x, a, b, slots, table, rank, scale, widths):
    noted(_C.multi_add, y, x, a, b, slots, table, rank, scale, widths)
