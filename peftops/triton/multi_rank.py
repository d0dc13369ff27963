"""Multi-LoRA's rank-sized products on a GPU: h = drop(x)·a[slot]ᵀ, and dh = s · dz·b[slot]ᵀ.

Both are the same sum, of rows of x or dz with the rank-rows of their slot. As in lora.py it is
split into stripes. A program loads only the rows of the slot it is at, so it reads each row once.
"""

from math import prod

import triton
import triton.language as tl

from . import _gemm
from ._launch import cdiv, launched
from ._tile import (
    add_partial_sums,
    cast,
    dot,
    keep_bytes,
    load_tile,
    partial_sums,
    store_tile,
    unpack,
)
from .lora import SHRINK, SHRINK_FP32, SHRINK_ODD, SHRINK_WIDE
from .multi_route import (
    factors,
    load_slots,
    next_slot,
    rank_block,
    rank_rows,
    threshold_of,
)


# limits: registers 32-255, spilled 0-16, reloads 0, loop 0-1800, mma 4-, wide 12-
@launched
@triton.jit
def multi_shrink_kernel(
    H, BITS, X, A, SLOTS, TABLE, RANK, SCALE, P, SEED, M, K, R, PAGES, KS, S,
    EVEN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """h = factor[slot] · drop(x)·a[slot]ᵀ over one stripe of KS columns.

    Programs of the first block of ranks write the bits, also of rows that have the base alone.
    With S, the number of slots, there are several parts, which have A, RANK and H each.
    """
    if EVEN:
        K = K // 8 * 8  # tells the compiler that it may load 16 bytes at once
    LAST: tl.constexpr = 0 if BITS is None else -1
    ranks = max(tl.cdiv(8 * PAGES, BR), 1)
    i_m = tl.program_id(0).to(tl.int64) // ranks
    i_r = tl.program_id(0) % ranks
    i_s = tl.program_id(1)
    i_h = i_s.to(tl.int64)
    if S is not None:
        i_p = tl.program_id(2).to(tl.int64)
        A += i_p * R * K
        RANK += i_p * S
        i_h = i_h * tl.num_programs(2) + i_p
    o_m, o_r = i_m * BM + tl.arange(0, BM), i_r * BR + tl.arange(0, BR)
    row = (K + 31) // 32 * 4  # bytes of bits in each row
    written = tl.where(i_r == 0, row, 0)  # how many of them this program writes
    if BITS is not None:
        seed = tl.load(SEED)
    t_slot = load_slots(SLOTS, o_m, M)
    acc = tl.zeros((BM, BR), tl.float32)
    left, slot = next_slot(t_slot, -2)
    while slot >= LAST:
        mine = t_slot == slot
        rank = tl.load(RANK + slot, mask=slot >= 0, other=0)
        o_s = tl.where(mine, o_m, M)
        o_a = rank_rows(TABLE, slot, rank, o_r, PAGES, R)
        if BITS is not None:
            threshold = threshold_of(P, slot)
        # The first block of ranks draws the bits where there are no ranks, too.
        has_work = i_r * BR < tl.maximum(rank, -LAST)
        part = tl.zeros((BM, BR), tl.float32)
        for k in range(i_s * KS, tl.where(has_work, min(i_s * KS + KS, K), 0), BK):
            o_k = k + tl.arange(0, BK)
            t_x = load_tile(X, o_s, o_k, M, K)
            if BITS is not None:
                o_q = k // 8 + tl.arange(0, BK // 8)
                at = o_m[:, None] * row + o_q[None, :]
                byte = keep_bytes(seed, at, threshold)
                inside = (o_s[:, None] < M) & (o_q[None, :] < written)
                tl.store(BITS + at, byte, mask=inside)
                t_x = tl.where(unpack(byte, BM, BK), t_x, 0.0)
            t_a = cast(load_tile(A, o_a, o_k, R, K), X.dtype.element_ty)
            part = dot(t_x, tl.trans(t_a), part)
        acc = tl.where(mine[:, None], part, acc)
        left, slot = next_slot(left, slot)
    acc *= factors(SCALE, P, t_slot)[:, None]
    store_tile(H + i_h * M * PAGES * 8, acc, o_m, o_r, M, PAGES * 8)


INTERPRETED = _gemm.tile(4, 1, BM=64, BK=64)


def shrink(h, bits, x, a, slots, table, rank, scale, p, seed):
    """h = factor[slot] · drop(x)·a[slot]ᵀ, and the bits of dropout where they are not None.

    a may be (parts, R, k). Then rank is (parts, S), h (parts, m, 8P), and the last three are None.
    """
    m, k, width = *x.shape, h.shape[-1]
    parts = a.shape[:-2]
    if m == 0 or (width == 0 and bits is None):
        return
    br = rank_block(width)
    if _gemm.INTERPRET:
        sizes = INTERPRETED
    elif x.element_size() == 4:
        sizes = SHRINK_FP32
    elif k % 8:
        sizes = SHRINK_ODD
    else:
        # The draws of wider tiles would spill beside the sums of a slot.
        sizes = SHRINK if br <= 32 and bits is None else SHRINK_WIDE
    programs = cdiv(m, sizes["BM"]) * max(1, cdiv(width, br))
    count, span = _gemm.stripes(k, sizes["BK"], programs * prod(parts), x)
    sums = partial_sums(h, count)
    multi_shrink_kernel[(programs, count, *parts)](
        sums,
        bits,
        x,
        a,
        slots,
        table,
        rank,
        scale,
        p,
        seed,
        m,
        k,
        a.shape[-2],
        table.shape[1],
        span,
        table.shape[0] if parts else None,
        EVEN=k % 8 == 0,
        BR=br,
        **sizes,
    )
    add_partial_sums((h, sums))
