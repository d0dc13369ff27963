"""What multi-LoRA's kernels share: which rows of a tile belong to which slot, and its rank-rows.

A kernel walks over the distinct slots of its rows:

    left, slot = next_slot(t_slot, -2)
    while slot >= 0:
        o_s = tl.where(t_slot == slot, o_m, M)  # other rows are put outside, and not loaded
        ...
        left, slot = next_slot(left, slot)

So grids depend on shapes alone, rows may come in any order, and each tile is written once. A batch
whose rows are sorted by slot has the fewest steps. The sums of a slot are kept for its own rows
alone: zeros times an adapter that has become infinite would be NaN in the rows of all others.
"""

import triton
import triton.language as tl

from . import _gemm


@triton.jit
def load_slots(SLOTS, o_m, M):
    """The slot of each row: -1 for the base alone, and -2 beyond the last row."""
    return tl.load(SLOTS + o_m, mask=o_m < M, other=-2)


@triton.jit
def next_slot(left, slot):
    """(left, the largest slot there), after rows of `slot` are taken out of left. -2 ends it."""
    left = tl.where(left == slot, -2, left)
    return left, tl.max(left, 0)


@triton.jit
def rank_rows(TABLE, slot, rank, o_r, PAGES, R):
    """Where the rank-rows o_r of a slot lie among the R rows, and R for those beyond its rank."""
    alive = o_r < rank
    page = tl.load(TABLE + slot * PAGES + o_r // 8, mask=alive, other=0)
    return tl.where(alive, page.to(tl.int64) * 8 + o_r % 8, R)


@triton.jit
def factors(SCALE, P, slot):
    """What multiplies the sums of a slot, or of a tile of slots.

    It is SCALE, or 1 / (1 - p) where there is P and no SCALE. All else has the factor 1.
    """
    if SCALE is not None:
        factor = tl.load(SCALE + slot, mask=slot >= 0, other=0.0)
    elif P is not None:
        p = tl.load(P + slot, mask=slot >= 0, other=0.0)
        factor = tl.where(p < 1, 1 / (1 - tl.where(p < 1, p, 0.0)), 0.0)
    else:
        factor = tl.where(slot >= 0, 1.0, 0.0)
    return factor


@triton.jit
def threshold_of(P, slot):
    """round(p · 2¹⁶) of a slot, where halves go to the even number, and 0 for the base alone.

    In fp32, numbers from 2²³ on have no digits after the point.
    """
    p = tl.load(P + slot, mask=slot >= 0, other=0.0)
    return (p * 65536.0 + 8388608.0 - 8388608.0).to(tl.int32)


@triton.jit
def gained(t, GAIN, t_slot, o_n, N):
    """t (rows, BN) in fp32, each row times the gain of its slot."""
    left, slot = next_slot(t_slot, -2)
    while slot >= 0:
        t_g = tl.load(GAIN + slot.to(tl.int64) * N + o_n, mask=o_n < N, other=0.0)
        t = tl.where((t_slot == slot)[:, None], t * t_g[None, :], t)
        left, slot = next_slot(left, slot)
    return t


def rank_block(width: int, most: int = 64) -> int:
    """BR for tiles of h, which has `width` columns. The interpreter is faster with few tiles."""
    return 32 if _gemm.INTERPRET else _gemm.rank_block(width, most)
