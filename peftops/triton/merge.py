"""Merging on a GPU: w = round(p ⊙ Ŵ + q), where q sums what the adapters add, in fp64.

A program makes one tile of w. The product of two floats is exact in fp64, so a fused multiply-add
of one rank rounds as a product and a sum do. Nothing else may be fused: all backends give the same
bits.
"""

import triton
import triton.language as tl

from . import _gemm
from ._launch import cdiv, launched
from ._tile import cast, load_tile, store_tile
from .lora_product import operand
from .nf4 import EXACT, nf4_tile


@triton.jit
def add_rank(acc, LEFT, RIGHT, o_m, o_n, r, M, N):
    """acc + left · right of one rank."""
    row = tl.full((), r, tl.int64)
    t_l = tl.load(LEFT + row * M + o_m, mask=o_m < M, other=0.0)
    t_r = tl.load(RIGHT + row * N + o_n, mask=o_n < N, other=0.0)
    t_l = tl.broadcast_to(t_l[:, None], acc.shape)
    return tl.fma(t_l, tl.broadcast_to(t_r[None, :], acc.shape), acc)


@triton.jit
def add_ranks(acc, LEFT, RIGHT, o_m, o_n, first, end, M, N, UNROLL: tl.constexpr):
    """acc + Σ left · right over the ranks from first to end, one after the other."""
    whole = first + (end - first) // UNROLL * UNROLL
    for r in range(first, whole, UNROLL):
        for u in tl.static_range(UNROLL):
            acc = add_rank(acc, LEFT, RIGHT, o_m, o_n, r + u, M, N)
    for r in range(whole, end):
        acc = add_rank(acc, LEFT, RIGHT, o_m, o_n, r, M, N)
    return acc


@triton.jit
def round_once(v, DTYPE: tl.constexpr):
    """v (fp64) rounded once to a dtype; a cast would round to fp32 first."""
    if tl.float32 != DTYPE:
        SMALLEST: tl.constexpr = 2.0**-126 if tl.bfloat16 == DTYPE else 2.0**-14
        LARGEST: tl.constexpr = 2.0**128 if tl.bfloat16 == DTYPE else 2.0**16
        # From the last digit of a value of DTYPE to that of a double in its binade.
        SHIFT: tl.constexpr = 1.5 * 2.0**45 if tl.bfloat16 == DTYPE else 1.5 * 2.0**42
        t = (v.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(
            tl.float64, bitcast=True
        )
        t = tl.minimum(tl.maximum(t, SMALLEST), LARGEST) * SHIFT
        t = (v + t) - t
        v = tl.where(t == 0.0, v * 0.0, t)  # zero keeps the sign of v
    return cast(v.to(tl.float32), DTYPE)


@triton.jit
def pack(flags, BM: tl.constexpr, BN: tl.constexpr):
    """(BM, BN / 8) bytes with a bit for each column, the lowest first."""
    t = tl.reshape(flags.to(tl.int32), (BM, BN // 8, 8))
    return tl.sum(t << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def same_bits(x, y):
    """Where two tiles of floats have the same bits."""
    WORD: tl.constexpr = tl.int32 if x.dtype == tl.float32 else tl.int16
    return x.to(WORD, bitcast=True) == y.to(WORD, bitcast=True)


# limits: registers 16-192, spilled 0, reloads 0, loop 0-100
# limits -BLOCK: wide 1-
@launched
@triton.jit
def merge_kernel(
    OUT,
    LOST,
    W,
    LEFT,
    RIGHT,
    SCALE,
    RANKS,
    GAIN,
    M,
    N,
    R,
    ADAPTERS,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BACK: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    UNROLL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """out (M, N) from W stored likewise, left (R, M) and right (R, N), both in fp64.

    BACK: out = round((W - q) / p), else round(p ⊙ W + q) and LOST, which may be None.
    COLUMNS: gain is of columns, else of rows.
    """
    if EVEN:
        M = M // 8 * 8
        N = N // 8 * 8
    DTYPE: tl.constexpr = OUT.dtype.element_ty
    blocks = tl.cdiv(N, BN)
    i_m = (tl.program_id(0) // blocks).to(tl.int64)
    i_n = (tl.program_id(0) % blocks).to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    if FORM == "nf4":
        left = N - i_n * BN
        t_w = nf4_tile(W, i_n * BN, o_m, M, left, N, BLOCK, GROUP, BN)
    else:
        t_w = load_tile(W, o_m, o_n, M, N)
    q = tl.full((BM, BN), -0.0, tl.float64)  # to which any number adds without a change
    p = tl.full((BN if COLUMNS else BM,), 1.0, tl.float64)
    o_g = o_n if COLUMNS else o_m
    LENGTH = N if COLUMNS else M
    first = 0
    for e in range(0, ADAPTERS):
        end = min(R, first + max(0, tl.load(RANKS + e)))
        t = tl.zeros((BM, BN), tl.float64)
        t = add_ranks(t, LEFT, RIGHT, o_m, o_n, first, end, M, N, UNROLL)
        q += tl.load(SCALE + e) * t
        if GAIN is not None:
            at = tl.full((), e, tl.int64) * LENGTH + o_g
            g = tl.load(GAIN + at, mask=o_g < LENGTH, other=1.0)
            p *= g
            q *= g[None, :] if COLUMNS else g[:, None]
        first = end
    factor = p[None, :] if COLUMNS else p[:, None]
    if BACK:
        v = t_w.to(tl.float64) - q
        if GAIN is not None:
            v = v / factor
        store_tile(OUT, round_once(v, DTYPE), o_m, o_n, M, N)
    else:
        v = t_w.to(tl.float64)
        if GAIN is not None:
            v = v * factor
        t_out = round_once(v + q, DTYPE)
        store_tile(OUT, t_out, o_m, o_n, M, N)
        if LOST is not None:
            v = t_out.to(tl.float64) - q
            if GAIN is not None:
                v = v / factor
            wide = t_w.to(tl.float32)
            differs = (same_bits(round_once(v, DTYPE), t_w) == 0) | (wide != wide)
            inside = (o_m[:, None] < M) & (o_n[None, :] < N)
            words = (N + 31) // 32 * 4
            o_b = i_n * (BN // 8) + tl.arange(0, BN // 8)
            tl.store(
                LOST + o_m[:, None] * words + o_b[None, :],
                pack(differs & inside, BM, BN),
                mask=(o_m[:, None] < M) & (o_b[None, :] < words),
            )


# What a thread has in registers: q, and of one adapter W in 16 bits beside it.
TILES = {
    "sm_80": _gemm.tile(4, 1, BM=16, BN=128, UNROLL=2),
    "interpret": _gemm.tile(4, 1, BM=64, BN=64, UNROLL=2),
}


def launch(
    out,
    lost,
    w,
    a,
    b,
    scale,
    ranks,
    gain,
    turned,
    flags,
    back,
):
    """Launches the kernel. turned: whether w and out are stored as (k, n)."""
    m, n = out.shape
    left, right = (a, b.T) if turned else (b.T, a)
    kind = _gemm.machine(out.device)[0]
    sizes = TILES.get(kind, TILES["sm_80"])
    merge_kernel[(cdiv(m, sizes["BM"]) * cdiv(n, sizes["BN"]),)](
        out,
        lost,
        w,
        left.double().contiguous(),
        right.double().contiguous(),
        scale,
        ranks,
        gain,
        m,
        n,
        a.shape[0],
        scale.shape[0],
        BACK=back,
        COLUMNS=turned,
        EVEN=m % 8 == 0 and n % 8 == 0,
        **(flags | sizes | EXACT),
    )


def merge_add(w, lost, a, b, base, scale, ranks, dtype, gain, form, block, undo):
    turned = form == "transposed"
    width = TILES["interpret" if _gemm.INTERPRET else "sm_80"]["BN"]
    stored, flags = operand(
        base, "nf4" if form == "nf4" else "dense", block, w.shape[1], width
    )
    lost = lost if undo else None
    launch(
        w,
        lost,
        stored,
        a,
        b,
        scale,
        ranks,
        gain,
        turned,
        flags,
        False,
    )


def merge_undo(out, w, a, b, scale, ranks, gain, transposed):
    stored, flags = operand([w], "dense", 0, w.shape[1], 0)
    launch(out, None, stored, a, b, scale, ranks, gain, transposed, flags, True)
