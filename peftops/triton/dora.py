"""DoRA on a GPU: n = ‖Ŵ + s·b·a‖ for each row, and the dropout that PEFT has.

norm_kernel makes a tile of Ŵ + s·b·a at a time and adds its squares. So the sum of the two is
never stored, and Ŵ is read once. To expand the square into ‖Ŵ‖² and terms of b·a would need no
such tiles, but would lose digits where the adapter cancels the weight.

The sum over k is split into stripes, as many as fill the GPU. root_kernel adds their partial
sums in order and takes the root; with one stripe norm_kernel takes it.

PEFT's DoRA applies its magnitude to drop(x) alone: y = gain ⊙ drop(x)·(Ŵ + s·b·a)ᵀ + rest·Ŵᵀ,
rest = x − drop(x). drop_kernel makes both from x, and mix_kernel makes dx from their gradients.
"""

import triton
import triton.language as tl

from . import _gemm
from ._gemm import tile
from ._launch import cdiv, launched
from ._tile import (
    cast,
    dot,
    dropout_factor,
    keep_bytes,
    load_keep,
    load_tile,
    rounded,
    store_tile,
    unpack,
)
from .dora_grads import dora_norm_bwd
from .lora_product import operand
from .lora_rank import base_tile

__all__ = ["dora_drop", "dora_mix", "dora_norm", "dora_norm_bwd"]


@triton.jit
def add_ranks(acc, A, B, o_n, o_r, o_k, N, K, R, DTYPE: tl.constexpr):
    """acc + b·a over the ranks o_r."""
    t_b = cast(load_tile(B, o_n, o_r, N, R), DTYPE)
    return dot(t_b, cast(load_tile(A, o_r, o_k, R, K), DTYPE), acc)


# limits: registers 48-255, spilled 0, reloads 0, loop 0-900, mma 1-, fma 0
# limits -BLOCK: loop 0-700, wide 6-, fma 0-
@launched
@triton.jit
def norm_kernel(
    OUT,
    X,
    W,
    A,
    B,
    SCALE,
    N,
    K,
    R,
    KS,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    ROOT: tl.constexpr,
    HELD: tl.constexpr,
    STAGES: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """Σ (Ŵ + s·b·a)² of each row over a stripe of KS columns, or its root (ROOT).

    HELD tiles of b are loaded once and kept. STAGES is the loop's pipeline, which loads Ŵ
    ahead too.
    """
    DTYPE: tl.constexpr = X.dtype.element_ty
    if EVEN:
        K = K // 8 * 8
        if FORM == "transposed":
            N = N // 8 * 8
    i_n, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_n, o_r = i_n * BN + tl.arange(0, BN), tl.arange(0, BR)
    scale = tl.load(SCALE)
    t_n = tl.zeros((BN,), tl.float32)
    for k in tl.range(i_s * KS, min(i_s * KS + KS, K), BK, num_stages=STAGES):
        o_k, acc = k + tl.arange(0, BK), tl.zeros((BN, BK), tl.float32)
        t_w = tl.trans(base_tile(W, o_n, k, N, K, FORM, BLOCK, GROUP, BK, DTYPE))
        # Tiles of 4-bit weights need not be zero beyond K for products, but for squares.
        if FORM == "nf4":
            t_w = tl.where((o_k < K)[None, :], t_w, 0.0)
        if HELD:
            for i in tl.static_range(HELD):
                acc = add_ranks(acc, A, B, o_n, i * BR + o_r, o_k, N, K, R, DTYPE)
        else:
            for r in range(0, R, BR):
                acc = add_ranks(acc, A, B, o_n, r + o_r, o_k, N, K, R, DTYPE)
        acc = t_w.to(tl.float32) + scale * acc
        t_n += tl.sum(acc * acc, 1)
    if ROOT:
        t_n = tl.sqrt_rn(t_n)
    tl.store(OUT + i_s.to(tl.int64) * N + o_n, t_n, mask=o_n < N)


# limits: registers 16-64, spilled 0, reloads 0, loop 0-400
@launched
@triton.jit
def root_kernel(OUT, PARTS, COUNT, N, BP: tl.constexpr, BN: tl.constexpr):
    """out = √Σ parts, in an order that only the number of parts decides."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN,), tl.float32)
    for p in range(0, COUNT, BP):
        acc += tl.sum(load_tile(PARTS, p + tl.arange(0, BP), o_n, COUNT, N), 0)
    tl.store(OUT + o_n, tl.sqrt_rn(acc), mask=o_n < N)


# limits: registers 24-96, spilled 0, reloads 0, wide 1-
@launched
@triton.jit(do_not_specialize=["threshold"])
def drop_kernel(
    DROPPED,
    REST,
    BITS,
    X,
    SEED,
    threshold,
    factor,
    M,
    K,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """dropped = factor · keep ⊙ x, rest = x - dropped."""
    if EVEN:
        K = K // 8 * 8
    i_m, i_k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_m, o_k = i_m * BM + tl.arange(0, BM), i_k * BK + tl.arange(0, BK)
    o_q = i_k * (BK // 8) + tl.arange(0, BK // 8)
    row = (K + 31) // 32 * 4
    at = o_m[:, None] * row + o_q[None, :]
    byte = keep_bytes(tl.load(SEED), at, threshold)
    tl.store(BITS + at, byte, mask=(o_m[:, None] < M) & (o_q[None, :] < row))
    t_x = load_tile(X, o_m, o_k, M, K).to(tl.float32)
    t_kept = tl.where(unpack(byte, BM, BK), t_x * factor, 0.0)
    store_tile(DROPPED, t_kept, o_m, o_k, M, K)
    store_tile(REST, t_x - t_kept, o_m, o_k, M, K)


# limits: registers 16-96, spilled 0, reloads 0, wide 1-
@launched
@triton.jit
def mix_kernel(
    OUT,
    U,
    V,
    BITS,
    factor,
    M,
    K,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """out = factor · keep ⊙ u + v - factor · keep ⊙ v. Without v its terms are left out."""
    if EVEN:
        K = K // 8 * 8
    i_m, i_k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_m, o_k = i_m * BM + tl.arange(0, BM), i_k * BK + tl.arange(0, BK)
    keep = load_keep(BITS, o_m, i_k * BK, M, K, BM, BK)
    t = tl.where(keep, load_tile(U, o_m, o_k, M, K).to(tl.float32) * factor, 0.0)
    if V is not None:
        t_v = load_tile(V, o_m, o_k, M, K).to(tl.float32)
        t += t_v - tl.where(keep, t_v * factor, 0.0)
    store_tile(OUT, t, o_m, o_k, M, K)


# Tiles of norm_kernel, by the most ranks of b that a tile of this shape holds. Where all rows of
# a are loaded ahead, they take room too.
NORM = {
    "sm_80": {128: tile(8, 3, BN=128, BK=64), 384: tile(8, 2, BN=128, BK=64)},
    "sm_86": {128: tile(8, 3, BN=128, BK=64)},
    "sm_90": {128: tile(8, 3, BN=128, BK=64), 384: tile(8, 2, BN=128, BK=64)},
    "sm_100": {64: tile(8, 3, BN=128, BK=64), 256: tile(8, 2, BN=128, BK=64)},
    "gfx942": {384: tile(8, 2, BN=128, BK=64)},
    "interpret": {32: tile(4, 1, BN=32, BK=32)},
}
NORM_ODD = {
    32: tile(8, 1, BN=64, BK=32)
}  # rows that do not start at multiples of 16 bytes
NORM_FP32 = {
    16: tile(4, 1, BN=32, BK=32)
}  # without tensor cores tiles live in registers
ELEMENTS = tile(4, 1, BM=16, BK=128)  # of drop_kernel and mix_kernel


def norm_tile(r, x, even):
    """The tile of norm_kernel for rank r: BR ranks a product, HELD products whose b is held.

    With HELD = 0 b is read again for every tile of Ŵ.

    Args:
        even: whether rows start at multiples of 16 bytes.
    """
    if x.element_size() == 4:
        tiles = NORM_FP32
    elif even:
        tiles = NORM[_gemm.machine(x.device)[0]]
    else:
        tiles = NORM_ODD
    most = min((ranks for ranks in tiles if r <= ranks), default=0)
    sizes = tiles[most or min(tiles)]
    br = _gemm.rank_block(r, min(64, max(tiles)))
    if most == 0:
        return sizes | {"BR": br, "HELD": 0, "STAGES": 1}
    held = max(1, cdiv(r, br))
    return sizes | {"BR": br, "HELD": held, "STAGES": sizes["num_stages"]}


def dora_norm(n, x, base, a, b, scale, form, block):
    rows, r, k = *b.shape, x.shape[1]
    even = k % 8 == 0 and (rows % 8 == 0 or form != "transposed")
    sizes = norm_tile(r, x, even)
    if (
        r > sizes["BR"]
    ):  # every tile reads all of a and b, so they are rounded once before
        a, b = rounded(x.dtype, a, b)
    blocks = max(1, cdiv(rows, sizes["BN"]))
    _, processors = _gemm.machine(x.device)
    resident = processors * (
        2 if r <= 64 else 1
    )  # programs at once, by their registers
    count, span = _gemm.stripes(
        k, sizes["BK"], blocks, x, most=max(1, resident // blocks)
    )
    sums = n if count == 1 else n.new_empty(count, rows)
    w, base_flags = operand(base, form, block, k, sizes["BK"])
    norm_kernel[(blocks, count)](
        sums,
        x,
        w,
        a,
        b,
        scale,
        rows,
        k,
        r,
        span,
        EVEN=even,
        ROOT=count == 1,
        **(sizes | base_flags),
    )
    if count > 1:
        root_kernel[(cdiv(rows, 256),)](
            n, sums, count, rows, BP=16, BN=256, enable_fp_fusion=True
        )


def dora_drop(dropped, rest, bits, x, seed, p):
    m, k = x.shape
    drop_kernel[element_grid(m, k)](
        dropped,
        rest,
        bits,
        x,
        seed,
        round(p * 65536),
        dropout_factor(p),
        m,
        k,
        EVEN=k % 8 == 0,
        **ELEMENTS,
    )


def dora_mix(out, u, v, bits, p):
    if p == 0:
        out.copy_(u)
        return
    m, k = u.shape
    mix_kernel[element_grid(m, k)](
        out, u, v, bits, dropout_factor(p), m, k, EVEN=k % 8 == 0, **ELEMENTS
    )


def element_grid(m, k):
    """The grid of kernels that go over the elements of an (m, k) matrix once."""
    return cdiv(m, ELEMENTS["BM"]), cdiv(k, ELEMENTS["BK"])
