"""4-bit weights on a GPU, with the same bits as bitsandbytes.

nf4_tile decodes a tile inside of a kernel. The products of LoRA call it, and so does
nf4_dequantize_kernel, so that all read the same bits. Each way takes one launch: nested scales
are decoded inside.

Neighbours that share a scale are a group. Its size divides all places and lengths, so the
compiler knows how many bytes it may load at once, and one scale serves the whole group.
"""

import math

import triton
import triton.language as tl

from ._launch import cdiv, launched, power_of_2
from ._tile import cast

# A nested scale is a product and a sum, each of which is rounded: no fused multiply-add.
EXACT = {"enable_fp_fusion": False}
PIECE = 4096  # elements that a program decodes, 32 of them a thread


@triton.jit
def nf4_tile(
    W,
    first,
    o_m,
    M,
    left,
    PITCH,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(BM, WIDTH) in fp32: table[code] · absmax of a part of the flattened weight.

    Row o_m and column c are element first + o_m · PITCH + c, for rows below M and columns below
    `left`. W is (codes, table, absmax), or (codes, table, absmax8, nested_absmax, nested_table,
    offset) with nested scales. GROUP neighbours share a scale: it divides first, left, PITCH,
    BLOCK and WIDTH.
    """
    BM: tl.constexpr = o_m.shape[0]
    t_table = tl.load(W[1] + tl.arange(0, 16))
    row = o_m[:, None].to(tl.int64) * PITCH + first
    if GROUP == 1:  # a row may start in the middle of a byte
        o_k = tl.arange(0, WIDTH)[None, :]
        inside = (o_m[:, None] < M) & (o_k < left)
        t_byte = tl.load(W[0] + (row + o_k) // 2, mask=inside, other=0).to(tl.int32)
        t_w = look_up(
            t_table, tl.where((row + o_k) % 2 == 0, t_byte >> 4, t_byte & 15), BM, WIDTH
        )
    else:
        HALF: tl.constexpr = WIDTH // 2
        o_h = tl.arange(0, HALF)[None, :]
        # In whole groups, so that the compiler knows how many bytes it may load at once.
        inside = (o_m[:, None] < M) & (o_h < left // GROUP * (GROUP // 2))
        at = o_m[:, None].to(tl.int64) * (
            PITCH // GROUP * (GROUP // 2)
        ) + first // GROUP * (GROUP // 2)
        t_byte = tl.load(W[0] + at + o_h, mask=inside, other=0).to(tl.int32)
        t_w = tl.join(
            look_up(t_table, t_byte >> 4, BM, HALF),
            look_up(t_table, t_byte & 15, BM, HALF),
        )
    o_g = tl.arange(0, WIDTH // GROUP)[None, :] * GROUP
    inside = (o_m[:, None] < M) & (o_g < left)
    t_scale = absmax_of(W, (row + o_g) // BLOCK, inside)
    return tl.reshape(
        tl.reshape(t_w, (BM, WIDTH // GROUP, GROUP)) * t_scale[:, :, None], (BM, WIDTH)
    )


@triton.jit
def look_up(t_table, codes, BM: tl.constexpr, BK: tl.constexpr):
    """table[codes] for codes (BM, BK)."""
    return tl.reshape(tl.gather(t_table, tl.reshape(codes, (BM * BK,)), 0), (BM, BK))


@triton.jit
def absmax_of(W, o_q, inside):
    """The scales of the blocks o_q, decoded where they are nested."""
    if len(W) == 3:
        t_scale = tl.load(W[2] + o_q, mask=inside, other=0.0)
    else:
        t_code = tl.load(W[2] + o_q, mask=inside, other=0).to(tl.int32)
        t_nested = tl.load(W[3] + o_q // 256, mask=inside, other=0.0)
        t_scale = tl.load(W[4] + t_code) * t_nested + tl.load(W[5])
    return t_scale


# limits: registers 12-160, spilled 0, reloads 0, fma 0
@launched
@triton.jit
def nf4_dequantize_kernel(
    OUT,
    W,
    first,
    COLS,
    PITCH,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BK: tl.constexpr,
):
    """out (rows, COLS): elements first + row · PITCH + column of the flattened weight."""
    pieces = (tl.full((), BK - 1, tl.int64) + COLS) // BK
    i_m, k = tl.program_id(0) // pieces, tl.program_id(0) % pieces * BK
    o_m, o_k = tl.arange(0, 1), k + tl.arange(0, BK)
    t_w = nf4_tile(
        W, first + i_m * PITCH + k, o_m, 1, COLS - k, PITCH, BLOCK, GROUP, BK
    )
    at = OUT + (o_m[:, None] + i_m) * COLS + o_k[None, :]
    tl.store(at, cast(t_w, OUT.dtype.element_ty), mask=(o_k < COLS)[None, :])


# Its fma are of a division that rounds correctly.
# limits: registers 24-192, spilled 0, reloads 0, wide 1-, fma 5-
@launched
@triton.jit
def nf4_quantize_kernel(
    CODES,
    ABSMAX,
    X,
    BOUNDS,
    ORDER,
    SIZE,
    BYTES,
    BLOCKS,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
):
    """absmax = max |x| of each block; a code is how many BOUNDS are below x · (1 / absmax).

    ORDER maps that count to the code that is stored.
    """
    o_m, o_k = (
        tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM),
        tl.arange(0, BLOCK),
    )
    at = o_m[:, None] * BLOCK + o_k[None, :]
    t_x = tl.load(X + at, mask=at < SIZE, other=0.0).to(tl.float32)
    # As integers, magnitudes keep their order, and NaN is above all of them.
    magnitude = tl.max(t_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(
        tl.float32, bitcast=True
    )
    tl.store(ABSMAX + o_m, magnitude, mask=o_m < BLOCKS)
    least = tl.full((BM,), 1e-38, tl.float32)
    t_x *= tl.div_rn(
        tl.full((BM,), 1.0, tl.float32), tl.where(magnitude < least, least, magnitude)
    )[:, None]
    t_x = tl.where(at < SIZE, t_x, 0.0)
    count = tl.zeros((BM, BLOCK), tl.int32)
    for i in tl.static_range(15):
        count += tl.where(t_x <= tl.load(BOUNDS + i), 0, 1)
    order = tl.sum(
        tl.load(ORDER + tl.arange(0, 16)).to(tl.int64)
        << tl.arange(0, 16).to(tl.int64) * 4,
        0,
    )
    code = (order >> count.to(tl.int64) * 4 & 15).to(tl.uint8)
    high, low = tl.split(tl.reshape(code, (BM, BLOCK // 2, 2)))
    o_b = o_m[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(CODES + o_b, high << 4 | low, mask=o_b < BYTES)


def nf4_quantize(codes, absmax, w, bounds, order, block):
    size = w.numel()
    if size == 0:
        return
    bm = max(1, 2048 // block)
    blocks = absmax.numel()
    nf4_quantize_kernel[(cdiv(blocks, bm),)](
        codes,
        absmax,
        w,
        bounds,
        order,
        size,
        codes.numel(),
        blocks,
        BLOCK=block,
        BM=bm,
        **EXACT,
    )


def nf4_dequantize(out, codes, table, scales, block, size, dtype):
    decode(out[None], [codes, table, *scales], block, 0, size)


def decode(out, base, block, first, pitch):
    """out (rows, columns) = elements first + row · pitch + column of the flattened weight.

    Args:
        out: a contiguous matrix in 16 bits or fp32.
        base: [codes, table, absmax], or [codes, table, absmax8, nested_absmax, nested_table,
            offset] with nested scales.
        block: elements that share an absmax.
        first: the first element.
        pitch: elements between the starts of two rows. It may be anything for one row.
    """
    if out.numel() == 0:
        return
    rows, columns = out.shape
    if columns == pitch:  # rows follow each other
        rows, columns = 1, out.numel()
    piece = math.gcd(columns, PIECE) if rows > 1 else 1
    if piece < PIECE // 4:
        piece = min(power_of_2(columns), PIECE)
    group = math.gcd(block, piece, first, columns, pitch if rows > 1 else 0)
    nf4_dequantize_kernel[(rows * cdiv(columns, piece),)](
        out,
        tuple(base),
        first,
        columns,
        pitch,
        BLOCK=block,
        GROUP=group,
        BK=piece,
        num_warps=max(1, piece // 1024),
        **EXACT,
    )
