"""Multi-LoRA's update of a finished product on a GPU, for several layers that share x.

    y += scale[part, slot] · h·b[slot],  h = x·a[part, slot]ᵀ

multi_rank.py makes h of all parts in one launch, and a second one adds to y. Each has the same
programs for all batches of a shape. The columns of parts are read on the GPU.
"""

import triton
import triton.language as tl

from . import _gemm
from ._launch import launched
from ._tile import cast, tile_of
from .multi_product import rank_sum
from .multi_rank import shrink
from .multi_route import load_slots, next_slot, rank_block


# limits: registers 48-255, spilled 0-16, reloads 0, loop 0-300, mma 1-, wide 3-
# limits gfx942: wide 1-
# limits sm_90: reloads 0-4
# limits sm_100: reloads 0-4
@launched
@triton.jit
def multi_add_kernel(
    Y, H, B, SLOTS, TABLE, RANK, SCALE, WIDTHS, M, N, NY, R, PAGES, S, PARTS,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y += scale[part, slot] · h[part]·b[slot] in one tile, whose columns may be of several parts.

    Rows without rank-rows are neither read nor written. Loads of b do not stop at a part's border,
    since they would be narrow: sums are kept in the part's own columns alone.
    """
    if EVEN:
        N, NY = N // 8 * 8, NY // 8 * 8
    i_m, i_n = tile_of(tl.program_id(0), M, N, BM, BN, 8)
    first = i_n.to(tl.int32) * BN
    o_m, o_n = i_m * BM + tl.arange(0, BM), first + tl.arange(0, BN)
    t_slot = load_slots(SLOTS, o_m, M)
    acc = tl.zeros((BM, BN), tl.float32)
    has_rank = tl.zeros((BM,), tl.int32)
    size = tl.full((), M, tl.int64) * PAGES * 8  # of a part's h
    begin = 0
    for j in range(0, PARTS):
        end = begin + tl.load(WIDTHS + j)
        if (tl.maximum(begin, first) < end) & (begin < first + BN):
            columns = (o_n >= begin) & (o_n < end)
            left, slot = next_slot(t_slot, -2)
            while slot >= 0:
                mine = t_slot == slot
                rank = tl.load(RANK + j * S + slot)
                has_rank = tl.where(mine, tl.maximum(has_rank, rank), has_rank)
                o_s = tl.where(mine, o_m, M)
                part = rank_sum(
                    H + j * size, B, TABLE, slot, rank, o_s, o_n, M, N, R, PAGES, BM, BN, BR
                )  # fmt: skip
                part *= tl.load(SCALE + j * S + slot)
                acc = tl.where(mine[:, None] & columns[None, :], part, acc)
                left, slot = next_slot(left, slot)
        begin = end
    at = o_m[:, None] * NY + o_n[None, :]
    inside = (has_rank > 0)[:, None] & (o_n < N)[None, :]
    acc += tl.load(Y + at, mask=inside, other=0.0)
    tl.store(Y + at, cast(acc, Y.dtype.element_ty), mask=inside)


PROGRAMS = 4  # for each multiprocessor, before a larger tile is taken
INTERPRETED = (_gemm.tile(4, 1, BM=64, BN=128),)
# Tiles of y by bytes an element, the largest first. A program takes the slots of its rows one by
# one, so the few rows of decoding, which have many slots, get low tiles.
TILES = {
    2: (
        _gemm.tile(4, 1, BM=64, BN=128),
        _gemm.tile(4, 1, BM=16, BN=128),
        _gemm.tile(4, 1, BM=16, BN=64),
    ),
    4: (_gemm.tile(4, 1, BM=32, BN=64), _gemm.tile(4, 1, BM=16, BN=64)),
}


def multi_add_(y, x, a, b, slots, table, rank, scale, widths):
    m = x.shape[0]
    n = b.shape[1]
    parts, slot_count = rank.shape
    pages = table.shape[1]
    if 0 in (m, n, parts, slot_count, pages):
        return
    h = x.new_empty(parts, m, 8 * pages)
    shrink(h, None, x, a, slots, table, rank, None, None, None)
    tiles = INTERPRETED if _gemm.INTERPRET else TILES[x.element_size()]
    _, processors = _gemm.machine(x.device)
    sizes, programs = _gemm.largest_tile(tiles, m, n, PROGRAMS * processors)
    multi_add_kernel[(programs,)](
        y,
        h,
        b,
        slots,
        table,
        rank,
        scale,
        widths,
        m,
        n,
        y.shape[1],
        b.shape[0],
        pages,
        slot_count,
        parts,
        EVEN=n % 8 == y.shape[1] % 8 == 0,
        BR=rank_block(8 * pages, 32),
        **sizes,
    )
