"""The specification of multi-LoRA: each row has the adapter of its slot, or none.

Values are rounded as in LoRA, see lora.py.
"""

from torch import einsum

from . import outside_autocast
from .lora import roundings
from .lora_base import matrix, product
from .lora_dropout import drop, keep_bits
from .multi_route import each_row, paged, put, sum_by_slot

ROWS = "mr,mrk->mk"  # a row times the matrix of its slot
TURNED = "mk,mrk->mr"


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
    if p is not None:
        bits.copy_(keep_bits(seed, *x.shape, each_row(p[:, None], slots, 0)))
    exact = multi_formula(
        x, base, a, b, slots, table, rank, scale, p, bias, gain, bits, form, block
    )
    y.copy_(exact[0])
    h.copy_(exact[1])
    if keep_z:
        z.copy_(exact[2])


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
    route = slots, table, rank, scale
    exact = multi_formula(x, base, a, b, *route, None, bias, gain, None, form, block)
    y.copy_(exact[0])


@outside_autocast
def multi_formula(
    x, base, a, b, slots, table, rank, scale, p, bias, gain, bits, form, block
):
    """y, h and z, not yet rounded to x's dtype, by operations that torch can differentiate."""
    wide, rounded = roundings(x, scale)
    a = each_row(rounded(paged(a, table, rank)), slots, 0)
    b = each_row(rounded(paged(b, table, rank)), slots, 0)
    h = einsum(TURNED, dropped(wide(x), bits, p, slots), a)
    w = rounded(matrix(base, form, block, b.shape[2], x.shape[1]))
    delta = einsum(ROWS, rounded(h), b)
    z = product(wide(x), w, form) + each_row(scale[:, None], slots, 0) * delta
    y = z * (1 if gain is None else each_row(gain, slots, 1)) + (
        0 if bias is None else bias
    )
    return y, h, z


def multi_plain(
    x, base, a, b, slots, table, rank, scale, p, bias, gain, seed, form, block
):
    """y of multi_formula with the dropout that this seed draws."""
    bits = (
        None if p is None else keep_bits(seed, *x.shape, each_row(p[:, None], slots, 0))
    )
    return multi_formula(
        x, base, a, b, slots, table, rank, scale, p, bias, gain, bits, form, block
    )[0]


@outside_autocast
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
    wide, rounded = roundings(x, scale)
    dy, h = wide(dy), wide(h)
    dz = dy if gain is None else rounded(dy * each_row(gain, slots, 1))
    s = each_row(scale[:, None], slots, 0)
    a = each_row(rounded(paged(a, table, rank)), slots, 0)
    b = each_row(rounded(paged(b, table, rank)), slots, 0)
    dh = rounded(s * einsum(TURNED, dz, b))
    if need[0]:
        dx_delta = dropped(einsum(ROWS, dh, a), bits, p, slots)
        if form == "given":
            dx.copy_(dx_delta)
        else:
            dx.copy_(
                dz @ rounded(matrix(base, form, block, b.shape[2], x.shape[1]))
                + dx_delta
            )
    if need[1]:
        put(da, dh, dropped(wide(x), bits, p, slots), slots, table, rank)
    if need[2]:
        put(db, s * h, dz, slots, table, rank)
    if need[3]:
        dbias.copy_(dy.sum(0))
    if need[4]:
        dgain.copy_(sum_by_slot(dy * wide(z), slots, gain.shape[0]))


def multi_add_(y, x, a, b, slots, table, rank, scale, widths):
    begin = 0
    for part, width in enumerate(widths.tolist()):
        end = begin + width
        columns = y[:, begin:end]
        own = a[part], b[:, begin:end], slots, table, rank[part], scale[part]
        exact = multi_formula(x, [columns], *own, None, None, None, None, "given", 0)
        columns.copy_(exact[0])
        begin = end


def dropped(x, bits, p, slots):
    """drop(x) with the probability of each row's slot."""
    return x if p is None else drop(x, bits, each_row(p[:, None], slots, 0))
