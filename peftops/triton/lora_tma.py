"""LoRA's product for Hopper: the update in the same sum, from tiles that TMA loads.

out = gain ⊙ (left·wᵀ + keep ⊙ factor · s · (h·bᵀ)) + bias, for forward and for dx.

On an H200 fwd_kernel is 80 % slower than cuBLAS (_gemm.SLOWER). This kernel is written as fast
products for Hopper are. TMA loads its tiles. It is persistent: there are as many programs as
multiprocessors, and each takes one tile after the other. Triton gives the loads a group of warps
of their own, which fill the next stages while two warpgroups multiply.

No GPU has run it yet, so `_gemm.TMA` has no entry and no launcher takes it.
"""

import triton
import triton.language as tl

from . import _gemm
from ._gemm import gemm
from ._launch import launched
from ._tile import cast, dot, load_keep, rounded, tile_of
from .lora_product import column_count
from .lora_rank import widen

TILES = {  # with four warps, of which Triton makes twelve
    "sm_90": (gemm(128, 256, 64, 4, 3), gemm(128, 128, 64, 4, 4)),
    "interpret": (gemm(32, 32, 32, 4, 1),),
}
# Under dropout: before 3.9 Triton cannot give the loads warps of their own then.
MASKED = gemm(128, 256, 64, 8, 3), gemm(128, 128, 64, 8, 4)
# Slices of a 4-bit weight start at multiples of this many columns, as the words of a mask do.
STEP = 32
TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])
SPECIALIZES_MASKS = TRITON >= (3, 9)


@triton.jit
def described(P, ROWS, COLS, TURNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """TMA's descriptor of tiles (BM, BN) of a (ROWS, COLS) matrix.

    Where TURNED, memory holds the transpose.
    """
    if TURNED:
        descriptor = tl.make_tensor_descriptor(P, [COLS, ROWS], [ROWS, 1], [BN, BM])
    else:
        descriptor = tl.make_tensor_descriptor(P, [ROWS, COLS], [COLS, 1], [BM, BN])
    return descriptor


@triton.jit
def load_turned(descriptor, row, column, TURNED: tl.constexpr):
    """The transpose of the tile at (row, column) of a matrix that `described` describes."""
    return (
        descriptor.load([column, row]) if TURNED else descriptor.load([row, column]).T
    )


# limits: registers 128-240, spilled 0-256, reloads 0-1, mma 4-, async 4-, waits 0-1
# limits -BIAS: spilled 0-64, reloads 0
# limits -GAIN: spilled 0, reloads 0
@launched
@triton.jit
def tma_kernel(
    OUT,
    Z,
    LEFT,
    W,
    H,
    B,
    SCALE,
    BITS,
    GAIN,
    BIAS,
    factor,
    M,
    N,
    K,
    R,
    FIRST,
    WHOLE,
    W_TURNED: tl.constexpr,
    B_TURNED: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """out = gain ⊙ z + bias, z = left·wᵀ + keep ⊙ factor · s · (h·bᵀ).

    w (N, K) is a slice: the N columns from FIRST on, of the WHOLE that everything else has.
    Where turned, w is (K, N) and b (R, WHOLE).
    """
    # TMA needs rows that start at multiples of 16 bytes.
    N = N // 8 * 8
    K = K // 8 * 8
    R = R // 8 * 8
    FIRST, WHOLE = FIRST // 8 * 8, WHOLE // 8 * 8
    lefts, weights = (
        described(LEFT, M, K, False, BM, BK),
        described(W, N, K, W_TURNED, BN, BK),
    )
    if H is not None:
        hidden, ranks = (
            described(H, M, R, False, BM, BR),
            described(B, WHOLE, R, B_TURNED, BN, BR),
        )
        if SCALE is not None:
            factor *= tl.load(SCALE)
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for t in tl.range(
        tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=SPECIALIZED
    ):
        i_m, i_n = tile_of(t, M, N, BM, BN, 8)
        row, column = (i_m * BM).to(tl.int32), (i_n * BN).to(tl.int32)
        o_m, o_n = i_m * BM + tl.arange(0, BM), FIRST + i_n * BN + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        if (
            H is not None
        ):  # in one stage: more would take the shared memory of the loop below
            for r in tl.range(0, R, BR, num_stages=1):
                acc = dot(
                    hidden.load([row, r]),
                    load_turned(ranks, FIRST + column, r, B_TURNED),
                    acc,
                )
            acc *= factor
            if BITS is not None:
                acc = tl.where(
                    load_keep(BITS, o_m, FIRST + i_n * BN, M, WHOLE, BM, BN), acc, 0.0
                )
        for k in range(0, K, BK):
            acc = dot(
                lefts.load([row, k]), load_turned(weights, column, k, W_TURNED), acc
            )
        inside = (o_m[:, None] < M) & (o_n[None, :] < FIRST + N)
        at = o_m[:, None] * WHOLE + o_n[None, :]
        if Z is not None:
            tl.store(Z + at, cast(acc, Z.dtype.element_ty), mask=inside)
        acc = widen(acc, GAIN, BIAS, o_n, WHOLE)
        tl.store(OUT + at, cast(acc, OUT.dtype.element_ty), mask=inside)


def fits(*matrices):
    """Whether TMA can read all of them: rows have to start at multiples of 16 bytes."""
    return not any(t.shape[1] % 8 for t in matrices)


def product(
    out,
    left,
    slices,
    h,
    b,
    b_turned,
    *,
    z=None,
    scale=None,
    bits=None,
    gain=None,
    bias=None,
    factor=1.0,
):
    """out = gain ⊙ z + bias, z = left·ŵᵀ + keep ⊙ factor · s · (h·bᵀ).

    Args:
        out: (m, n)
        left: (m, k)
        slices: the weight, as lora_product makes it.
        h: (m, r)
        b: (n, r), or (r, n) where b_turned.
        z: (m, n), where what gain multiplies is to be stored.
        bits: those of dropout on the update, or None.
    """
    m, n, k, r = *out.shape, left.shape[1], h.shape[1]
    if r == 0:
        h = b = scale = None
    else:
        (b,) = rounded(left.dtype, b)
    specialized = not _gemm.INTERPRET and (bits is None or SPECIALIZES_MASKS)
    for first, w, turned in slices:
        width = column_count(w, turned)
        sizes, programs = pick(m, width, out, specialized)
        tma_kernel[(programs,)](
            out,
            z,
            left,
            w,
            h,
            b,
            scale,
            bits,
            gain,
            bias,
            factor,
            m,
            width,
            k,
            r,
            first,
            n,
            W_TURNED=turned,
            B_TURNED=b_turned,
            SPECIALIZED=specialized,
            BR=_gemm.rank_block(r),
            **sizes,
        )


def pick(m, n, out, specialized):
    """(tile, programs) for m rows and n columns, by _gemm.largest_tile."""
    arch, processors = _gemm.machine(out.device)
    tiles = TILES[arch] if specialized or _gemm.INTERPRET else MASKED
    sizes, programs = _gemm.largest_tile(tiles, m, n, processors)
    return sizes, min(programs, processors)
