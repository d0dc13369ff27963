"""Multi-LoRA's backward on a GPU.

With z = x·Ŵᵀ + s · h·b[slot], y = gain[slot] ⊙ z + bias and h = drop(x)·a[slot]ᵀ, for each row:

    dz = gain[slot] ⊙ dy,  dh = s[slot] · dz·b[slot]ᵀ,  dx = dz·Ŵ + drop'(dh·a[slot])

and over the rows of each slot, or over all rows:

    da = dhᵀ·drop(x),  db = s · hᵀ·dz,  dgain = Σ dy ⊙ z,  dbias = Σ dy

multi_rank.py makes dh, and multi_product.py dx. A program of slot_sums_kernel serves one slot: it
looks at the slots of all rows, and reads those of its own. The pages of a slot lie anywhere, so
its sums go where the table says, and unowned_kernel clears the rows that nobody owns.
"""

import torch
import triton
import triton.language as tl

from . import _gemm
from ._launch import cdiv, launched
from ._tile import (
    add_partial_sums,
    cast,
    dot,
    load_keep,
    load_tile,
    partial_sums,
    store_tile,
)
from .lora_grads import DA, DA_FP32
from .multi_product import make_dx
from .multi_rank import shrink
from .multi_route import factors, gained, load_slots, rank_block, rank_rows


# limits: registers 16-128, spilled 0, reloads 0, loop 0-150, wide 2-
@launched
@triton.jit
def multi_dz_kernel(
    DZ, DBIAS, DY, GAIN, SLOTS, M, N, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """dz = gain[slot] ⊙ dy, and dbias = Σ dy over BM rows. Outputs that are None are not made."""
    if EVEN:
        N = N // 8 * 8
    i_m = tl.program_id(0).to(tl.int64)
    o_m, o_n = (
        i_m * BM + tl.arange(0, BM),
        tl.program_id(1) * BN + tl.arange(0, BN),
    )
    t_dy = load_tile(DY, o_m, o_n, M, N).to(tl.float32)
    if DBIAS is not None:
        total = cast(tl.sum(t_dy, 0), DBIAS.dtype.element_ty)
        tl.store(DBIAS + i_m * N + o_n, total, mask=o_n < N)
    if DZ is not None:
        t_slot = load_slots(SLOTS, o_m, M)
        store_tile(DZ, gained(t_dy, GAIN, t_slot, o_n, N), o_m, o_n, M, N)


# limits: registers 24-255, spilled 0, reloads 0, loop 0-1400, mma 4-, wide 4-
@launched
@triton.jit
def slot_sums_kernel(
    OUT, DGAIN, X, H, Z, GAIN, BITS, SLOTS, TABLE, RANK, SCALE, P, M, K, R, PAGES, S, MS,
    EVEN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[rows of slot] = factor[slot] · hᵀ·(keep ⊙ gain[slot] ⊙ x), and dgain[slot] = Σ x ⊙ z.

    Sums are over those rows of a stripe of MS that are of one slot.
    """
    if EVEN:
        K = K // 8 * 8
    ranks = max(tl.cdiv(8 * PAGES, BR), 1)
    program = tl.program_id(0)
    i_r, slot = program % ranks, program // ranks % S
    i_k, i_s = program // ranks // S, tl.program_id(1)
    o_k, o_r = i_k * BK + tl.arange(0, BK), i_r * BR + tl.arange(0, BR)
    rank = tl.load(RANK + slot)
    LEAST: tl.constexpr = 0 if DGAIN is None else 1
    has_work = i_r * BR < tl.maximum(rank, LEAST)
    if GAIN is not None:
        t_g = tl.load(GAIN + slot.to(tl.int64) * K + o_k, mask=o_k < K, other=0.0)
    acc = tl.zeros((BK, BR), tl.float32)
    total = tl.zeros((BK,), tl.float32)
    for m in range(i_s * MS, tl.where(has_work, min(i_s * MS + MS, M), 0), BM):
        o_m = m + tl.arange(0, BM)
        mine = load_slots(SLOTS, o_m, M) == slot
        if tl.max(mine.to(tl.int32), 0) > 0:
            o_s = tl.where(mine, o_m, M)
            t_x = load_tile(X, o_s, o_k, M, K)
            if DGAIN is not None:
                t_z = load_tile(Z, o_s, o_k, M, K)
                total += tl.sum(t_x.to(tl.float32) * t_z.to(tl.float32), 0)
            if OUT is not None:
                if GAIN is not None:
                    t_x = cast(t_x * t_g[None, :], X.dtype.element_ty)
                if BITS is not None:
                    keep = load_keep(BITS, o_m, i_k * BK, M, K, BM, BK)
                    t_x = tl.where(keep, t_x, 0.0)
                acc = dot(tl.trans(t_x), load_tile(H, o_s, o_r, M, PAGES * 8), acc)
    if DGAIN is not None:
        at = (i_s.to(tl.int64) * S + slot) * K + o_k
        tl.store(
            DGAIN + at,
            cast(total, DGAIN.dtype.element_ty),
            mask=o_k < tl.where(i_r == 0, K, 0),
        )
    if OUT is not None:
        o_a = rank_rows(TABLE, slot, rank, o_r, PAGES, R)
        acc = tl.trans(acc * factors(SCALE, P, slot))
        store_tile(OUT + i_s.to(tl.int64) * R * K, acc, o_a, o_k, R, K)


# limits: registers 8-96, spilled 0-16, reloads 0, loop 0-150
@launched
@triton.jit
def unowned_kernel(
    OUT, PARTS, TABLE, RANK, COUNT, K, R, PAGES, ENTRIES,
    BM: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out = Σ parts in the rows that slots own, and zeros in the others.

    Without parts, rows that are owned stay as they are.
    """
    o_r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    owned = tl.zeros((BM,), tl.int32)  # how many rows of this page have an owner
    for e in range(0, ENTRIES, BE):
        o_e = e + tl.arange(0, BE)
        page = tl.load(TABLE + o_e, mask=o_e < ENTRIES, other=-1)
        rank = tl.load(RANK + o_e // PAGES, mask=o_e < ENTRIES, other=0)
        rows = rank - o_e % PAGES * 8
        same = page[None, :] == (o_r // 8)[:, None]
        owned = tl.maximum(owned, tl.max(tl.where(same, rows[None, :], 0), 1))
    has_owner = o_r % 8 < owned
    acc = tl.zeros((BM, BK), tl.float32)
    if PARTS is None:
        store_tile(OUT, acc, tl.where(has_owner, R, o_r), o_k, R, K)
    else:
        o_a = tl.where(has_owner, o_r, R)
        for _ in range(0, COUNT):
            acc += load_tile(PARTS, o_a, o_k, R, K)
            PARTS += tl.full((), R, tl.int64) * K
        store_tile(OUT, acc, o_r, o_k, R, K)


INTERPRETED = _gemm.tile(4, 1, BM=32, BK=128)


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
    if x.shape[0] == 0:
        for sums in (da, db, dbias, dgain):
            sums.zero_()
        return
    need_dx, need_da, need_db, need_dbias, need_dgain = need
    route = slots, table, rank
    if p is None:
        bits = None
    dz = dy
    if gain is not None and (need_dx or need_da):
        dz = torch.empty_like(dy)
    dy_pass(None if dz is dy else dz, dbias if need_dbias else None, dy, gain, slots)
    if need_db or need_dgain:
        slot_sums(
            db if need_db else None, dgain if need_dgain else None,
            dy, h, z, gain, None, *route, scale, None,
        )  # fmt: skip
    if not (need_dx or need_da):
        return
    dh = torch.empty_like(h)
    shrink(dh, None, dz, b, *route, scale, None, None)
    if need_da:
        slot_sums(da, None, x, dh, None, None, bits, *route, None, p)
    if need_dx:
        make_dx(dx, dz, base, dh, a, route, p, bits, form, block)


def dy_pass(dz, dbias, dy, gain, slots):
    """dz = gain[slot] ⊙ dy and dbias = Σ dy, each where it is not None."""
    m, n = dy.shape
    if (dz is None and dbias is None) or n == 0:
        return
    if _gemm.INTERPRET:
        sizes = _gemm.tile(4, 1, BM=32, BN=128)
    else:
        sizes = _gemm.tile(8, 1, BM=64, BN=128)
    blocks = cdiv(m, sizes["BM"])
    sums = None
    if dbias is not None:
        sums = partial_sums(dbias, blocks)
    multi_dz_kernel[(blocks, cdiv(n, sizes["BN"]))](
        dz, sums, dy, gain, slots, m, n, EVEN=n % 8 == 0, **sizes
    )
    if dbias is not None:
        add_partial_sums((dbias, sums))


def slot_sums(out, dgain, x, h, z, gain, bits, slots, table, rank, scale, p):
    """out = factor[slot] · hᵀ·(keep ⊙ gain[slot] ⊙ x), and dgain = Σ x ⊙ z, over rows of each slot.

    Outputs that are None are not made. bits, gain, scale and p may be None; without `scale` the
    factors are those of dropout.
    """
    m, k = x.shape
    slot_count, pages = table.shape
    br = rank_block(8 * pages)
    if _gemm.INTERPRET:
        sizes = INTERPRETED
    elif x.element_size() == 4:
        sizes = DA_FP32
    else:
        sizes = DA[_gemm.machine(x.device)[0]]
    programs = cdiv(k, sizes["BK"]) * slot_count * max(1, cdiv(8 * pages, br))
    count, span = _gemm.stripes(m, sizes["BM"], max(1, programs), x)
    sums, gain_sums = (t if t is None else partial_sums(t, count) for t in (out, dgain))
    if programs:
        slot_sums_kernel[(programs, count)](
            sums,
            gain_sums,
            x,
            h,
            z,
            gain,
            bits,
            slots,
            table,
            rank,
            scale,
            p,
            m,
            k,
            0 if out is None else out.shape[0],
            pages,
            slot_count,
            span,
            EVEN=k % 8 == 0,
            BR=br,
            **sizes,
        )
    if dgain is not None:
        add_partial_sums((dgain, gain_sums))
    if out is not None:
        clear_unowned(out, None if sums is out else sums, table, rank)


def clear_unowned(out, parts, table, rank):
    """Adds the partial sums, where they are not None, and clears the rows that no slot owns."""
    rows, k = out.shape
    if out.numel() == 0:
        return
    if _gemm.INTERPRET:
        sizes = _gemm.tile(4, 1, BM=128, BE=64, BK=128)
    else:
        sizes = _gemm.tile(4, 1, BM=8, BE=64, BK=256)
    unowned_kernel[(cdiv(rows, sizes["BM"]), cdiv(k, sizes["BK"]))](
        out,
        parts,
        table,
        rank,
        0 if parts is None else parts.shape[0],
        k,
        rows,
        table.shape[1],
        table.numel(),
        **sizes,
    )
