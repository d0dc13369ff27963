"""LoRA's dx on a GPU: dx = factor · keep ⊙ (dh·a) + dz·Ŵ.

dgrad_kernel is the twin of lora.py's fwd_kernel. Its sum starts from dh·a, where the bits of
dropout apply, and goes on with dz·Ŵ, so dx is written once. Where there is a gain, it multiplies
tiles of dy by it.

Where cuBLAS multiplies by the base faster (_gemm.choose_product), dgrad_kernel makes the update
alone; then dz has to be a tensor of its own, which costs another pass.
"""

import triton
import triton.language as tl

from . import _gemm, lora_tma
from ._launch import cdiv, launched
from ._tile import cast, dot, load_keep, load_tile, store_tile, tile_of
from .lora_product import multiply, operand, product_comes_last, weight_slices_bwd
from .lora_rank import base_tile
from .nf4 import nf4_tile


# limits: registers 56-255, spilled 0-16, reloads 0, loop 0-700, mma 1-, wide 4-, fma 0
# limits -BLOCK: registers 72-255, loop 0-650, wide 5-, fma 0-
# limits -W: registers 48-255, spilled 0-32, wide 1-
# limits -GAIN: waits 0-1
# limits gfx942: registers 72-300
# limits gfx942 -W: registers 48-300
@launched
@triton.jit
def dgrad_kernel(
    DX,
    DY,
    W,
    DH,
    A,
    BITS,
    GAIN,
    factor,
    M,
    N,
    K,
    R,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    DROP: tl.constexpr,
    EVEN: tl.constexpr,
    RANKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """dx = factor · keep ⊙ (dh·a) + (gain ⊙ dy)·Ŵ.

    FORM "given": W is the second product itself, or None for zeros. Tiles are BN of the K
    columns; BK of the N rows of Ŵ are summed at a time.
    """
    TURNED: tl.constexpr = "transposed" if FORM == "dense" else "dense"
    if EVEN:
        N, K = N // 8 * 8, K // 8 * 8
    i_m, i_k = tile_of(tl.program_id(0), M, K, BM, BN, 8)
    o_m, o_k = i_m * BM + tl.arange(0, BM), i_k * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for r in tl.range(0, RANKS * BR, BR, num_stages=1):
        o_r = r + tl.arange(0, BR)
        t_a = cast(load_tile(A, o_r, o_k, R, K), DH.dtype.element_ty)
        acc = dot(load_tile(DH, o_m, o_r, M, R), t_a, acc)
    acc *= factor
    if DROP:
        acc = tl.where(load_keep(BITS, o_m, i_k * BN, M, K, BM, BN), acc, 0.0)
    if FORM == "given":
        if W is not None:
            acc += load_tile(W, o_m, o_k, M, K)
    else:
        for n in range(0, N, BK):
            o_n = n + tl.arange(0, BK)
            t_dy = load_tile(DY, o_m, o_n, M, N)
            if GAIN is not None:
                t_dy = cast(
                    t_dy * tl.load(GAIN + o_n, mask=o_n < N, other=0.0)[None, :],
                    DY.dtype.element_ty,
                )
            if FORM == "nf4":
                first = i_k * BN
                t_w = cast(
                    nf4_tile(W, first, o_n, N, K - first, K, BLOCK, GROUP, BN),
                    DY.dtype.element_ty,
                )
            else:
                t_w = base_tile(
                    W, o_k, n, K, N, TURNED, None, None, BK, DY.dtype.element_ty
                )
            acc = dot(t_dy, t_w, acc)
    store_tile(DX, acc, o_m, o_k, M, K)


def choose_product(dx, dy, form, gain):
    """Chooses how dz·Ŵ is made, as _gemm.choose_product does."""
    passes = 1 if gain is None else 2
    return _gemm.choose_product(*dx.shape, dy.shape[1], dx, form, passes=passes)


def dx_pass(dx, dy, dz, base, a, dh, bits, gain, factor, form, block, drop, product):
    """dx by this product.

    Args:
        dz: gain ⊙ dy, which "fused" does not read.
        drop: whether `bits` say what dropout kept.
        product: what choose_product returned, or "fused" for form "given".
    """
    if product == "fused":
        if form == "given":
            base = []
        dgrad(dx, dy, base, dh, a, bits, gain, factor, form, block, drop)
        return
    k = dx.shape[1]
    if product == "tma" and lora_tma.fits(dx, dz, dh, a):
        keep = bits if drop else None
        slices = weight_slices_bwd(base, form, block, k, dz, lora_tma.STEP)
        lora_tma.product(dx, dz, slices, dh, a, True, bits=keep, factor=factor)
        return
    slices = weight_slices_bwd(base, form, block, k, dz)
    if a.numel() == 0:
        multiply(dx, dz, slices)
    elif product_comes_last(dx):
        dgrad(dx, dz, [], dh, a, bits, None, factor, "given", block, drop)
        multiply(dx, dz, slices, True)
    else:
        multiply(dx, dz, slices)
        dgrad(dx, dz, [dx], dh, a, bits, None, factor, "given", block, drop)


def dgrad(dx, dy, base, dh, a, bits, gain, factor, form, block, drop):
    """dx by dgrad_kernel: with the base, with its product (form "given"), or the update alone.

    Args:
        base: for form "given" a list of the product, or an empty one.
    """
    m, k, n, r = *dx.shape, dy.shape[1], dh.shape[1]
    br = _gemm.rank_block(r, 32)
    if form == "given":
        sizes, n = _gemm.epilogue_tile(dx), 0
    else:
        sizes = _gemm.product_tile(m, k, dx, form)
    w, base_flags = operand(base, form, block, k, sizes["BN"])
    dgrad_kernel[(cdiv(m, sizes["BM"]) * cdiv(k, sizes["BN"]),)](
        dx,
        dy,
        w,
        dh,
        a,
        bits,
        gain,
        factor,
        m,
        n,
        k,
        r,
        DROP=drop,
        EVEN=n % 8 == k % 8 == 0,
        RANKS=cdiv(r, br),
        BR=br,
        **(sizes | base_flags),
    )
