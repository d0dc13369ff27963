"""LoRA's gradients: one pass over dy for those of rank's size and of columns, one over x for da, one product for dx."""

import torch
import triton
import triton.language as tl

from . import _gemm, lora_tma
from ._gemm import tile
from ._launch import cdiv, launched
from ._tile import (
    add_parts,
    cast,
    dot,
    inverse,
    load_keep,
    load_tile,
    parts_of,
    store_tile,
    tile_of,
)
from .lora_product import adds, multiply, operand, parts_bwd
from .lora_rank import base_tile, gate_columns, gated
from .nf4 import nf4_tile


# limits: registers 48-255, spilled 0, reloads 0, loop 0-1400, mma 12-, wide 4-
# limits -DZ: mma 24-
@launched
@triton.jit
def grads_kernel(
    DHG, DB, DBIAS, DGAIN, DZ, DY, Z, B, H, SCALE, GAIN, GATE, M, N, R, RB, E, NS,
    EVEN: tl.constexpr, SHARED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dz; dhg = s · dz·b over NS columns; db = s · dzᵀ·(gate ⊙ h), dbias = Σ dy, dgain = Σ dy ⊙ z over BM rows"""
    if EVEN:
        N = N // 8 * 8
    i_m, i_s, i_r = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    o_m, o_r, scale = i_m * BM + tl.arange(0, BM), i_r * BR + tl.arange(0, BR), tl.load(SCALE)
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
    """dh = Σ gate ⊙ dhg over the experts that share h; dgate = Σ dhg ⊙ h over the columns of an expert"""
    o_m, own = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), RB // E
    for r in range(0, R, BR):
        o_r = r + tl.arange(0, BR)
        if SHARED:
            acc = tl.zeros((BM, BR), tl.float32)
            for e in range(0, E):
                t_g = tl.load(GATE + o_m * E + e, mask=o_m < M, other=0.0)
                acc += t_g[:, None] * load_columns(DHG, o_m, e * own, o_r, own, M, RB)
        else:
            acc = gate_columns(load_tile(DHG, o_m, o_r, M, RB), GATE, o_m, o_r, M, RB, E)
        store_tile(DH, acc, o_m, o_r, M, R)
    if DGATE is not None:
        for e in range(0, E):
            total = tl.zeros((BM,), tl.float32)
            for r in range(0, own, BR):
                o_r = r + tl.arange(0, BR)
                t_h = load_columns(H, o_m, 0 if SHARED else e * own, o_r, own, M, R).to(
                    tl.float32
                )
                total += tl.sum(t_h * load_columns(DHG, o_m, e * own, o_r, own, M, RB), 1)
            tl.store(DGATE + o_m * E + e, total, mask=o_m < M)


@triton.jit
def load_columns(P, o_m, first, o_r, count, M, COLS):
    """Of `count` columns from `first` on, and zeros outside"""
    inside = (o_m[:, None] < M) & (o_r[None, :] < count)
    return tl.load(P + o_m[:, None] * COLS + (first + o_r)[None, :], mask=inside, other=0.0)


# limits: registers 24-192, spilled 0, reloads 0, loop 0-850, mma 8-, wide 12-
@launched
@triton.jit
def da_kernel(
    DA, X, DH, BITS, factor, M, K, R, MS,
    DROP: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """da = factor · dhᵀ·(keep ⊙ x) over a stripe of MS rows"""
    if EVEN:
        K = K // 8 * 8
    i_k, i_s, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_k, o_r = i_k * BK + tl.arange(0, BK), i_r * BR + tl.arange(0, BR)
    acc = tl.zeros((BK, BR), tl.float32)
    for m in range(i_s * MS, min(i_s * MS + MS, M), BM):
        o_m = m + tl.arange(0, BM)
        t_x = load_tile(X, o_m, o_k, M, K)
        if DROP:
            t_x = tl.where(load_keep(BITS, o_m, i_k * BK, M, K, BM, BK), t_x, 0.0)
        acc = dot(tl.trans(t_x), load_tile(DH, o_m, o_r, M, R), acc)
    store_tile(DA + i_s.to(tl.int64) * R * K, tl.trans(acc * factor), o_r, o_k, R, K)


# limits: registers 56-255, spilled 0-16, reloads 0, loop 0-700, mma 1-, wide 4-, fma 0
# limits -BLOCK: registers 72-255, loop 0-650, wide 5-, fma 0-
# limits -W: registers 48-255, spilled 0-32, wide 1-
# limits -GAIN: waits 0-1
# limits gfx942: registers 72-300
# limits gfx942 -W: registers 48-300
@launched
@triton.jit
def dgrad_kernel(
    DX, DY, W, DH, A, BITS, GAIN, factor, M, N, K, R,
    FORM: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, DROP: tl.constexpr, EVEN: tl.constexpr,
    RANKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dx = factor · keep ⊙ (dh·a) + dz·Ŵ, if there is one; BN of the K columns, BK of the N that are summed over"""
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
                t_w = base_tile(W, o_k, n, K, N, TURNED, None, None, BK, DY.dtype.element_ty)
            acc = dot(t_dy, t_w, acc)
    store_tile(DX, acc, o_m, o_k, M, K)


GRADS = {  # of the pass over dy: tall, as a block of rows leaves (n, r) partial sums
    "sm_80": tile(8, 3, BM=128, BN=64),
    "sm_86": tile(8, 3, BM=128, BN=64),
    "sm_90": tile(8, 3, BM=256, BN=64),
    "sm_100": tile(8, 3, BM=256, BN=64),
    "gfx942": tile(8, 2, BM=128, BN=64),
    "interpret": tile(4, 1, BM=32, BN=32),
}
GRADS_DZ = {
    "sm_90": tile(8, 3, BM=128, BN=64)
}  # where dz is made too, for ranks of more than 32: taller would spill
GRADS_ODD = tile(8, 1, BM=128, BN=32)  # rows that do not start at multiples of 16 bytes
GRADS_FP32 = tile(4, 1, BM=32, BN=32)  # without tensor cores tiles live in registers
DA = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_90", "gfx942"), tile(4, 3, BM=64, BK=128)),
    "sm_100": tile(8, 3, BM=64, BK=128),  # four warps spill where rows are no multiples of 16
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
    bias,
    gain,
    gate,
    z,
    form,
    block,
    p,
    need,
):
    if x.shape[0] == 0:
        for sums in (da, db, dbias, dgain):
            sums.zero_()
        return
    ranked = need[0] or need[1] or need[5]
    dhg, dz = None, dy
    if ranked:
        dhg = b.new_empty(
            x.shape[0], b.shape[1], dtype=x.dtype if gate is None else torch.float32
        )
    k = x.shape[1]
    product = choose_product(dx, dy, form, gain) if need[0] and form != "given" else "fused"
    if product != "fused" and gain is not None:
        dz = torch.empty_like(dy)
    dy_pass(
        dhg, db if need[2] else None, dbias if need[3] else None, dgain if need[4] else None,
        None if dz is dy else dz, dy, z, b, h, scale, gain, gate,
    )  # fmt: skip
    dh, factor = dhg, inverse(p)
    if gate is not None and ranked:
        dh = torch.empty_like(h)
        gates_pass(dh, dgate if need[5] else None, dhg, h, gate)
    if need[1]:
        x_pass(da, x, dh, bits, factor, p > 0)
    if product == "tma" and lora_tma.fits(dx, dz, dh, a):
        keep, weight = (
            bits if p > 0 else None,
            parts_bwd(base, form, block, k, dz, lora_tma.STEP),
        )
        lora_tma.product(dx, dz, weight, dh, a, True, bits=keep, factor=factor)
    elif product != "fused":
        delta = a.numel() > 0
        first = delta and adds(dx)
        if not first:
            multiply(dx, dz, parts_bwd(base, form, block, k, dz))
        if delta:
            dgrad(
                dx, dz, [] if first else [dx], dh, a, bits, None, factor, "given", block, p > 0
            )
        if first:
            multiply(dx, dz, parts_bwd(base, form, block, k, dz), True)
    elif need[0]:
        dgrad(
            dx,
            dy,
            [] if form == "given" else base,
            dh,
            a,
            bits,
            gain,
            factor,
            form,
            block,
            p > 0,
        )


def choose_product(dx, dy, form, gain):
    """Of dx = dz·Ŵ: "fused", or "cublas", which takes dz as a tensor of its own."""
    return _gemm.choose_product(
        *dx.shape, dy.shape[1], dx, form, passes=1 if gain is None else 2
    )


def dy_pass(dhg, db, dbias, dgain, dz, dy, z, b, h, scale, gain, gate):
    """What a read of dy gives, in blocks of rows and stripes of columns whose parts are added in order."""
    (m, n), (rb, r) = dy.shape, (b.shape[1], h.shape[1])
    outputs = [
        None if out is None or not out.numel() else out for out in (dhg, db, dbias, dgain)
    ]
    if dz is None and all(out is None for out in outputs):
        return
    br = _gemm.rank(rb)
    kind, _ = _gemm.machine(dy.device)
    sizes = GRADS[kind]
    if dz is not None and br > 32:
        sizes = GRADS_DZ.get(kind, sizes)
    if n % 8 and not _gemm.INTERPRET:
        sizes = GRADS_ODD
    if dy.element_size() == 4:
        sizes = GRADS_FP32
    blocks, ranks = cdiv(m, sizes["BM"]), max(1, cdiv(rb, br))
    count, span = _gemm.stripes(n, sizes["BN"], blocks * ranks, dy)
    parts = [
        None if out is None else parts_of(out, count if at == 0 else blocks)
        for at, out in enumerate(outputs)
    ]
    grads_kernel[(blocks, count, ranks)](
        *parts, dz, dy, z, b, h, scale, gain, gate, m, n, r, rb, 1 if gate is None else gate.shape[1], span,
        EVEN=n % 8 == 0, SHARED=rb != r, BR=br, **sizes,
    )  # fmt: skip
    add_parts(*(pair for pair in zip(outputs, parts, strict=True) if pair[0] is not None))


def gates_pass(dh, dgate, dhg, h, gate):
    (m, r), rb = h.shape, dhg.shape[1]
    sizes = _gemm.tile(4, 1, BM=32, BR=_gemm.rank(rb // gate.shape[1], 32))
    gates_kernel[(cdiv(m, 32),)](
        dh, dgate, dhg, h, gate, m, r, rb, gate.shape[1], SHARED=rb != r, **sizes
    )


def x_pass(da, x, dh, bits, factor, drop):
    (m, k), r, br = x.shape, dh.shape[1], _gemm.rank(dh.shape[1])
    if r == 0:
        return
    sizes = DA_FP32 if x.element_size() == 4 else DA[_gemm.machine(x.device)[0]]
    columns, ranks = cdiv(k, sizes["BK"]), cdiv(r, br)
    count, span = _gemm.stripes(m, sizes["BM"], columns * ranks, x)
    parts = parts_of(da, count)
    da_kernel[(columns, count, ranks)](
        parts, x, dh, bits, factor, m, k, r, span, DROP=drop, EVEN=k % 8 == 0, BR=br, **sizes
    )
    add_parts((da, parts))


def dgrad(dx, dy, base, dh, a, bits, gain, factor, form, block, drop):
    (m, k), n, r, br = dx.shape, dy.shape[1], dh.shape[1], _gemm.rank(dh.shape[1], 32)
    sizes = _gemm.pick(m, k, dx, form)
    if form == "given":
        sizes, n = _gemm.epilogue(dx), 0
    w, told = operand(base, form, block, k, sizes["BN"])
    dgrad_kernel[(cdiv(m, sizes["BM"]) * cdiv(k, sizes["BN"]),)](
        dx, dy, w, dh, a, bits, gain, factor, m, n, k, r,
        DROP=drop, EVEN=n % 8 == k % 8 == 0, RANKS=cdiv(r, br), BR=br, **(sizes | told),
    )  # fmt: skip
