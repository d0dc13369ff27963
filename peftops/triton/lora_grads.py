"""LoRA's backward on a GPU: everything but dx, which lora_dx.py makes.

With z = x·Ŵᵀ + s · (gate ⊙ h)·bᵀ, y = gain ⊙ z + bias and h = drop(x)·aᵀ:

    dbias = Σ dy,  dgain = Σ dy ⊙ z,  dz = gain ⊙ dy
    db = s · dzᵀ·(gate ⊙ h),  dhg = s · dz·b        dhg is the gradient of gate ⊙ h
    dh = gate ⊙ dhg,  dgate = Σ dhg ⊙ h
    da = dhᵀ·drop(x)

dy and x are by far the largest tensors here, so each is read once. grads_kernel takes from a tile
of dy all that it gives. dhg is summed over columns: its sum stays in registers while the program
goes along its rows. Everything else is summed over rows: each block of rows leaves a partial sum.
Blocks of rows are tall, so that there are few. da_kernel reads x and splits its rows into
stripes. gates_kernel runs only where there are gates.
"""

import torch
import triton
import triton.language as tl

from . import _gemm
from ._gemm import tile
from ._launch import cdiv, launched
from ._tile import (
    add_partial_sums,
    cast,
    dot,
    dropout_factor,
    load_keep,
    load_tile,
    partial_sums,
    store_tile,
)
from .lora_dx import choose_product, dx_pass
from .lora_rank import gate_columns, gated


# limits: registers 48-255, spilled 0, reloads 0, loop 0-1400, mma 12-, wide 4-
# limits -DZ: mma 24-
@launched
@triton.jit
def grads_kernel(
    DHG, DB, DBIAS, DGAIN, DZ, DY, Z, B, H, SCALE, GAIN, GATE, M, N, R, RB, E, NS,
    EVEN: tl.constexpr, SHARED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dz = gain ⊙ dy; dhg = s · dz·b over a stripe of NS columns; db = s · dzᵀ·(gate ⊙ h),
    dbias = Σ dy and dgain = Σ dy ⊙ z over BM rows. Outputs that are None are not made.
    """
    if EVEN:
        N = N // 8 * 8
    i_m = tl.program_id(0).to(tl.int64)
    i_s, i_r = tl.program_id(1), tl.program_id(2)
    o_m, o_r = i_m * BM + tl.arange(0, BM), i_r * BR + tl.arange(0, BR)
    scale = tl.load(SCALE)
    if DB is not None:
        t_h = gated(H, GATE, o_m, o_r, M, R, RB, E, SHARED)
    acc = tl.zeros((BM, BR), tl.float32)
    for n in range(i_s * NS, min(i_s * NS + NS, N), BN):
        o_n = n + tl.arange(0, BN)
        t_dy = load_tile(DY, o_m, o_n, M, N)
        mine = o_n < tl.where(i_r == 0, N, 0)
        if DBIAS is not None:
            tl.store(
                DBIAS + i_m * N + o_n,
                cast(tl.sum(t_dy.to(tl.float32), 0), DBIAS.dtype.element_ty),
                mask=mine,
            )
        if DGAIN is not None:
            t_z = load_tile(Z, o_m, o_n, M, N)
            tl.store(
                DGAIN + i_m * N + o_n,
                tl.sum(t_dy.to(tl.float32) * t_z.to(tl.float32), 0),
                mask=mine,
            )
        if GAIN is not None:
            t_dy = cast(
                t_dy * tl.load(GAIN + o_n, mask=o_n < N, other=0.0)[None, :],
                DY.dtype.element_ty,
            )
        if DZ is not None:
            tl.store(
                DZ + o_m[:, None] * N + o_n[None, :],
                t_dy,
                mask=(o_m[:, None] < M) & mine[None, :],
            )
        if DHG is not None:
            t_b = cast(load_tile(B, o_n, o_r, N, RB), DY.dtype.element_ty)
            acc = dot(t_dy, t_b, acc)
        if DB is not None:
            t_db = dot(tl.trans(t_dy), t_h, tl.zeros((BN, BR), tl.float32))
            store_tile(DB + i_m * N * RB, t_db * scale, o_n, o_r, N, RB)
    if DHG is not None:
        store_tile(DHG + i_s.to(tl.int64) * M * RB, acc * scale, o_m, o_r, M, RB)


# limits: registers 16-128, spilled 0, reloads 0, loop 0-400
@launched
@triton.jit
def gates_kernel(
    DH, DGATE, DHG, H, GATE, M, R, RB, E,
    SHARED: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dh = gate ⊙ dhg, summed over the experts where they share h (SHARED).

    dgate = Σ dhg ⊙ h over the columns of each expert, where it is needed.
    """
    o_m, own = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), RB // E
    for r in range(0, R, BR):
        o_r = r + tl.arange(0, BR)
        if SHARED:
            acc = tl.zeros((BM, BR), tl.float32)
            for e in range(0, E):
                t_g = tl.load(GATE + o_m * E + e, mask=o_m < M, other=0.0)
                acc += t_g[:, None] * load_columns(DHG, o_m, e * own, o_r, own, M, RB)
        else:
            acc = gate_columns(
                load_tile(DHG, o_m, o_r, M, RB), GATE, o_m, o_r, M, RB, E
            )
        store_tile(DH, acc, o_m, o_r, M, R)
    if DGATE is not None:
        for e in range(0, E):
            total = tl.zeros((BM,), tl.float32)
            for r in range(0, own, BR):
                o_r = r + tl.arange(0, BR)
                t_h = load_columns(H, o_m, 0 if SHARED else e * own, o_r, own, M, R).to(
                    tl.float32
                )
                total += tl.sum(
                    t_h * load_columns(DHG, o_m, e * own, o_r, own, M, RB), 1
                )
            tl.store(DGATE + o_m * E + e, total, mask=o_m < M)


@triton.jit
def load_columns(P, o_m, first, o_r, count, M, COLS):
    """The columns o_r of the `count` columns from `first` on, with zeros outside of them."""
    inside = (o_m[:, None] < M) & (o_r[None, :] < count)
    return tl.load(
        P + o_m[:, None] * COLS + (first + o_r)[None, :], mask=inside, other=0.0
    )


# limits: registers 24-192, spilled 0, reloads 0, loop 0-850, mma 8-, wide 12-
@launched
@triton.jit
def da_kernel(
    DA, X, DH, BITS, factor, M, K, R, MS,
    DROP: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """da = factor · dhᵀ·(keep ⊙ x) over a stripe of MS rows."""
    if EVEN:
        K = K // 8 * 8
    i_k = tl.program_id(0)
    i_s, i_r = tl.program_id(1), tl.program_id(2)
    o_k, o_r = i_k * BK + tl.arange(0, BK), i_r * BR + tl.arange(0, BR)
    acc = tl.zeros((BK, BR), tl.float32)
    for m in range(i_s * MS, min(i_s * MS + MS, M), BM):
        o_m = m + tl.arange(0, BM)
        t_x = load_tile(X, o_m, o_k, M, K)
        if DROP:
            t_x = tl.where(load_keep(BITS, o_m, i_k * BK, M, K, BM, BK), t_x, 0.0)
        acc = dot(tl.trans(t_x), load_tile(DH, o_m, o_r, M, R), acc)
    store_tile(DA + i_s.to(tl.int64) * R * K, tl.trans(acc * factor), o_r, o_k, R, K)


# Tiles of the pass over dy. They are tall, since each block of rows leaves partial sums (n, r).
GRADS = {
    "sm_80": tile(8, 3, BM=128, BN=64),
    "sm_86": tile(8, 3, BM=128, BN=64),
    "sm_90": tile(8, 3, BM=256, BN=64),
    "sm_100": tile(8, 3, BM=256, BN=64),
    "gfx942": tile(8, 2, BM=128, BN=64),
    "interpret": tile(4, 1, BM=32, BN=32),
}
# The same where dz is made too, for ranks of more than 32: taller tiles would spill.
GRADS_DZ = {"sm_90": tile(8, 3, BM=128, BN=64)}
GRADS_ODD = tile(8, 1, BM=128, BN=32)  # rows that do not start at multiples of 16 bytes
GRADS_FP32 = tile(4, 1, BM=32, BN=32)  # without tensor cores tiles live in registers
DA = {  # tiles of the pass over x
    **dict.fromkeys(("sm_80", "sm_86", "sm_90", "gfx942"), tile(4, 3, BM=64, BK=128)),
    "sm_100": tile(
        8, 3, BM=64, BK=128
    ),  # four warps spill where rows are no multiples of 16
    "interpret": tile(4, 1, BM=32, BK=32),
}
DA_FP32 = DA["interpret"]


def lora_bwd(
    dx,
    da,
    db,
    dbias,
    dgain,
    dgate,
    dy,
    x,
    base,
    a,
    b,
    scale,
    h,
    bits,
    z,
    need,
    bias,
    gain,
    gate,
    form,
    block,
    p,
):
    if x.shape[0] == 0:
        for sums in (da, db, dbias, dgain):
            sums.zero_()
        return
    need_dx, need_da, need_db, need_dbias, need_dgain, need_dgate = need
    needs_dh = need_dx or need_da or need_dgate
    dhg = None
    if needs_dh:
        dtype = x.dtype if gate is None else torch.float32
        dhg = b.new_empty(x.shape[0], b.shape[1], dtype=dtype)
    product = "fused"
    if need_dx and form != "given":
        product = choose_product(dx, dy, form, gain)
    dz = dy
    if product != "fused" and gain is not None:
        dz = torch.empty_like(dy)
    dy_pass(
        dhg, db if need_db else None, dbias if need_dbias else None, dgain if need_dgain else None,
        None if dz is dy else dz, dy, z, b, h, scale, gain, gate,
    )  # fmt: skip
    dh = dhg
    factor = dropout_factor(p)
    if gate is not None and needs_dh:
        dh = torch.empty_like(h)
        gates_pass(dh, dgate if need_dgate else None, dhg, h, gate)
    if need_da:
        x_pass(da, x, dh, bits, factor, p > 0)
    if need_dx:
        dx_pass(
            dx, dy, dz, base, a, dh, bits, gain, factor, form, block, p > 0, product
        )


def dy_pass(dhg, db, dbias, dgain, dz, dy, z, b, h, scale, gain, gate):
    """All that one read of dy gives. Outputs that are None or empty are not made.

    Rows come in blocks and columns in stripes. Their partial sums are added in order.
    """
    m, n, rb, r = *dy.shape, b.shape[1], h.shape[1]
    outputs = []
    for out in (dhg, db, dbias, dgain):
        wanted = out is not None and out.numel()
        outputs.append(out if wanted else None)
    if dz is None and all(out is None for out in outputs):
        return
    br = _gemm.rank_block(rb)
    arch, _ = _gemm.machine(dy.device)
    sizes = GRADS[arch]
    if dz is not None and br > 32:
        sizes = GRADS_DZ.get(arch, sizes)
    if n % 8 and not _gemm.INTERPRET:
        sizes = GRADS_ODD
    if dy.element_size() == 4:
        sizes = GRADS_FP32
    blocks, ranks = cdiv(m, sizes["BM"]), max(1, cdiv(rb, br))
    stripes, span = _gemm.stripes(n, sizes["BN"], blocks * ranks, dy)
    sums = []
    pairs = []
    # dhg is summed over columns, all else over rows.
    for out, count in zip(outputs, (stripes, blocks, blocks, blocks), strict=True):
        parts = None
        if out is not None:
            parts = partial_sums(out, count)
            pairs.append((out, parts))
        sums.append(parts)
    experts = 1 if gate is None else gate.shape[1]
    grads_kernel[(blocks, stripes, ranks)](
        *sums,
        dz,
        dy,
        z,
        b,
        h,
        scale,
        gain,
        gate,
        m,
        n,
        r,
        rb,
        experts,
        span,
        EVEN=n % 8 == 0,
        SHARED=rb != r,
        BR=br,
        **sizes,
    )
    add_partial_sums(*pairs)


def gates_pass(dh, dgate, dhg, h, gate):
    """dh, and dgate where it is not None, from the gradient of gate ⊙ h."""
    m, r, rb = *h.shape, dhg.shape[1]
    experts = gate.shape[1]
    sizes = _gemm.tile(4, 1, BM=32, BR=_gemm.rank_block(rb // experts, 32))
    gates_kernel[(cdiv(m, 32),)](
        dh, dgate, dhg, h, gate, m, r, rb, experts, SHARED=rb != r, **sizes
    )


def x_pass(da, x, dh, bits, factor, drop):
    """da = factor · dhᵀ·(keep ⊙ x). Without `drop` everything is kept, and bits are not read."""
    m, k, r = *x.shape, dh.shape[1]
    if r == 0:
        return
    br = _gemm.rank_block(r)
    sizes = DA_FP32 if x.element_size() == 4 else DA[_gemm.machine(x.device)[0]]
    columns, ranks = cdiv(k, sizes["BK"]), cdiv(r, br)
    count, span = _gemm.stripes(m, sizes["BM"], columns * ranks, x)
    sums = partial_sums(da, count)
    da_kernel[(columns, count, ranks)](
        sums,
        x,
        dh,
        bits,
        factor,
        m,
        k,
        r,
        span,
        DROP=drop,
        EVEN=k % 8 == 0,
        BR=br,
        **sizes,
    )
    add_partial_sums((da, sums))
