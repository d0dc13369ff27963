"""Multi-LoRA's wide products on a GPU: y, and dx.

    y = gain[slot] ⊙ (x·Ŵᵀ + s[slot] · h·b[slot]) + bias
    dx = dz·Ŵ + drop'(dh·a[slot])

Both are a sum that starts from the update and goes on with the base, so the result is written
once. Where cuBLAS multiplies by the base faster (_gemm.choose_product), it does so, and the same
kernel makes the update alone, as in lora.py and lora_dx.py.
"""

import triton
import triton.language as tl

from . import _gemm
from ._launch import cdiv, launched
from ._tile import cast, dot, load_keep, load_tile, store_tile, tile_of
from .lora_product import (
    multiply,
    operand,
    product_comes_last,
    weight_slices,
    weight_slices_bwd,
)
from .lora_rank import base_tile, widen
from .multi_route import (
    factors,
    gained,
    load_slots,
    next_slot,
    rank_block,
    rank_rows,
)
from .nf4 import nf4_tile


@triton.jit
def rank_sum(
    H, B, TABLE, slot, rank, o_s, o_n, M, N, R, PAGES,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """h·b of a slot in fp32, for the rows o_s and the columns o_n."""
    part = tl.zeros((BM, BN), tl.float32)
    for r in tl.range(0, rank, BR, num_stages=1):
        o_r = r + tl.arange(0, BR)
        o_b = rank_rows(TABLE, slot, rank, o_r, PAGES, R)
        t_b = cast(load_tile(B, o_b, o_n, R, N), H.dtype.element_ty)
        part = dot(load_tile(H, o_s, o_r, M, PAGES * 8), t_b, part)
    return part


# limits: registers 48-255, spilled 0, reloads 0, loop 0-750, waits 0-1, mma 1-, wide 4-
# limits -BLOCK: loop 0-300
# limits -W: wide 1-
# limits -GAIN: fma 0
@launched
@triton.jit
def multi_combine_kernel(
    Y, Z, X, W, H, B, SLOTS, TABLE, RANK, SCALE, P, BITS, BIAS, GAIN, M, N, K, R, PAGES,
    FORM: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    BACK: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y = gain[slot] ⊙ z + bias, with z = x·Ŵᵀ + keep ⊙ (factor[slot] · h·b[slot]).

    BACK: x is multiplied by Ŵ (K, N) instead of Ŵᵀ. FORM "given": W is the product itself, or
    None for zeros.
    """
    if EVEN:
        N, K = N // 8 * 8, K // 8 * 8
    i_m, i_n = tile_of(tl.program_id(0), M, N, BM, BN, 8)
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    t_slot = load_slots(SLOTS, o_m, M)
    acc = tl.zeros((BM, BN), tl.float32)
    left, slot = next_slot(t_slot, -2)
    while slot >= 0:
        mine = t_slot == slot
        rank = tl.load(RANK + slot)
        o_s = tl.where(mine, o_m, M)
        part = rank_sum(H, B, TABLE, slot, rank, o_s, o_n, M, N, R, PAGES, BM, BN, BR)
        acc = tl.where(mine[:, None], part, acc)
        left, slot = next_slot(left, slot)
    acc *= factors(SCALE, P, t_slot)[:, None]
    if BITS is not None:
        acc = tl.where(load_keep(BITS, o_m, i_n * BN, M, N, BM, BN), acc, 0.0)
    if FORM == "given":
        if W is not None:
            acc += load_tile(W, o_m, o_n, M, N)
    else:
        for k in range(0, K, BK):
            o_k = k + tl.arange(0, BK)
            t_x = load_tile(X, o_m, o_k, M, K)
            if not BACK:
                t_w = base_tile(
                    W, o_n, k, N, K, FORM, BLOCK, GROUP, BK, X.dtype.element_ty
                )
            elif FORM == "nf4":
                first = i_n * BN
                t_w = cast(
                    nf4_tile(W, first, o_k, K, N - first, N, BLOCK, GROUP, BN),
                    X.dtype.element_ty,
                )
            else:
                TURNED: tl.constexpr = "transposed" if FORM == "dense" else "dense"
                t_w = base_tile(
                    W, o_n, k, N, K, TURNED, None, None, BK, X.dtype.element_ty
                )
            acc = dot(t_x, t_w, acc)
    if Z is not None:
        store_tile(Z, acc, o_m, o_n, M, N)
    if GAIN is not None:
        acc = gained(acc, GAIN, t_slot, o_n, N)
    store_tile(Y, widen(acc, None, BIAS, o_n, N), o_m, o_n, M, N)


INTERPRETED = _gemm.gemm(64, 128, 64, 4, 1)


def combine(y, z, x, base, h, b, route, scale, p, bits, bias, gain, form, block, back):
    """y and z by multi_combine_kernel.

    Args:
        base: for form "given" a list of the product, or an empty one.
        route: slots, table and rank.
        scale, p: factors are `scale`, or those of dropout with `p` where scale is None.
        back: whether x is multiplied by Ŵ, as for dx.
    """
    m, n = y.shape
    k = x.shape[1]
    pages = route[1].shape[1]
    if form == "given":
        sizes, k = _gemm.epilogue_tile(x), 0
    else:
        sizes = _gemm.product_tile(m, n, x, form)
        if (
            sizes["BN"] > 128
        ):  # the sums of a slot need registers beside those of the tile
            sizes = sizes | {"BN": 128}
    if _gemm.INTERPRET:
        sizes = INTERPRETED
    if back:
        w, base_flags = operand(base, form, block, n, sizes["BN"])
    else:
        w, base_flags = operand(base, form, block, k, sizes["BK"])
    multi_combine_kernel[(cdiv(m, sizes["BM"]) * cdiv(n, sizes["BN"]),)](
        y,
        z,
        x,
        w,
        h,
        b,
        *route,
        scale,
        p,
        bits,
        bias,
        gain,
        m,
        n,
        k,
        b.shape[0],
        pages,
        BACK=back,
        EVEN=n % 8 == k % 8 == 0,
        BR=rank_block(8 * pages, 32),
        **(sizes | base_flags),
    )


def make_y(y, z, x, base, h, b, route, scale, bias, gain, form, block):
    """y, and z where it is not None, by the product that is the fastest."""
    m, k, n = *x.shape, b.shape[1]
    update = h, b, route, scale, None, None, bias, gain
    product = "fused"
    if form != "given":
        product = _gemm.choose_product(m, n, k, x, form)
    if product == "fused":
        combine(y, z, x, base, *update, form, block, False)
    elif gain is None and z is None and product_comes_last(x):
        has_delta = route[1].numel() > 0 or bias is not None
        if has_delta:
            combine(y, z, x, [], *update, "given", block, False)
        multiply(y, x, weight_slices(base, form, block, n, x), has_delta)
    else:
        multiply(y, x, weight_slices(base, form, block, n, x))
        combine(y, z, x, [y], *update, "given", block, False)


def make_dx(dx, dz, base, dh, a, route, p, bits, form, block):
    """dx by the product that is the fastest. p and bits are None without dropout."""
    update = dh, a, route, None, p, bits, None, None
    product = "fused"
    if form == "given":
        base = []
    else:
        product = _gemm.choose_product(*dx.shape, dz.shape[1], dx, form)
    if product == "fused":
        combine(dx, None, dz, base, *update, form, block, True)
        return
    slices = weight_slices_bwd(base, form, block, dx.shape[1], dz)
    if a.numel() == 0:
        multiply(dx, dz, slices)
    elif product_comes_last(dx):
        combine(dx, None, dz, [], *update, "given", block, True)
        multiply(dx, dz, slices, True)
    else:
        multiply(dx, dz, slices)
        combine(dx, None, dz, [dx], *update, "given", block, True)
