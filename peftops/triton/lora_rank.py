"""What LoRA's kernels share: tiles of the base, the gated h, and what follows the sum.

They are functions of Triton that the kernels inline, so that a form of the base or a kind of
epilogue is written once.
"""

import triton
import triton.language as tl

from ._tile import cast, load_tile
from .nf4 import nf4_tile


@triton.jit
def base_tile(
    W,
    o_n,
    k,
    N,
    K,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """(BK, BN) of Ŵᵀ from row k on. W is (N, K), or (K, N) where transposed."""
    o_k = tl.arange(0, BK)
    if FORM == "nf4":
        t_w = tl.trans(cast(nf4_tile(W, k, o_n, N, K - k, K, BLOCK, GROUP, BK), DTYPE))
    elif FORM == "transposed":
        # The row moves the pointer, which saves a multiplication for each element.
        t_w = load_tile(W + tl.full((), k, tl.int64) * N, o_k, o_n, K - k, N)
    else:
        t_w = tl.trans(load_tile(W, o_n, k + o_k, N, K))
    return t_w


@triton.jit
def gated(H, GATE, o_m, o_r, M, R, RB, E, SHARED: tl.constexpr):
    """gate ⊙ h (BM, BR), rounded, for the columns o_r of RB.

    Where experts share h (SHARED), column o is made of column o % R of h.
    """
    inside = (o_m[:, None] < M) & (o_r[None, :] < RB)
    o_h = o_r % R if SHARED else o_r
    t_h = tl.load(
        H + o_m[:, None].to(tl.int64) * R + o_h[None, :], mask=inside, other=0.0
    )
    return gate_columns(t_h, GATE, o_m, o_r, M, RB, E)


@triton.jit
def gate_columns(t_h, GATE, o_m, o_r, M, RB, E):
    """t_h times the gate of each column's expert, rounded. Each expert has RB / E columns."""
    if GATE is not None:
        inside = (o_m[:, None] < M) & (o_r[None, :] < RB)
        t_g = tl.load(
            GATE + o_m[:, None].to(tl.int64) * E + (o_r // (RB // E))[None, :],
            mask=inside,
            other=0.0,
        )
        t_h = cast(t_h * t_g, t_h.dtype)
    return t_h


@triton.jit
def widen(acc, GAIN, BIAS, o_n, N):
    """gain ⊙ acc + bias, each of which may be absent."""
    if GAIN is not None:
        acc *= tl.load(GAIN + o_n, mask=o_n < N, other=0.0)[None, :]
    if BIAS is not None:
        acc += tl.load(BIAS + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    return acc
