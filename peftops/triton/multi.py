"""Multi-LoRA's forward on a GPU: each row has the adapter of its slot, or the base alone.

    y = gain[slot] ⊙ (x·Ŵᵀ + s[slot] · h·b[slot]) + bias,  h = drop(x)·a[slot]ᵀ

multi_rank.py makes h, multi_product.py y, and multi_grads.py has backward. multi_add.py adds the
update to a y that has the base's product. Rows are neither sorted nor counted: kernels find the
slots of their rows themselves, see multi_route.py. So nothing waits for the host, and a CUDA graph
serves every batch of a shape. Slots and pages are not checked here.
"""

from .multi_add import multi_add_
from .multi_grads import multi_bwd
from .multi_product import make_y
from .multi_rank import shrink

__all__ = ["multi_add_", "multi_bwd", "multi_fwd", "multi_gemv"]


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
    if x.shape[0] == 0:
        return
    route = slots, table, rank
    shrink(h, None if p is None else bits, x, a, *route, None, p, seed)
    z = z if keep_z else None
    make_y(y, z, x, base, h, b, route, scale, bias, gain, form, block)


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
