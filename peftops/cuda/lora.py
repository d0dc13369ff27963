"""LoRA's forward for few rows in CUDA C++.

The kernels read the base 16 bytes at a time. Where it does not lie that way, cuBLAS multiplies by
it, and the kernel adds the update.
"""

import torch

from .._C import cuda as _C
from .._replay import noted
from . import _device
from .nf4 import dequantize_rows

SCRATCH = 32 << 20  # bytes of a 4-bit base that are decoded at once


def lora_gemv(y, x, base, a, b, scale, bias, gain, gate, form, block):
    m, k, n, r = *x.shape, b.shape[0], a.shape[0]
    if not y.numel():
        return
    product = describe("lora_gemv", x, m, n, k, r, form)
    w, scales, given = operands(y, x, base, product, form, block)
    h = x.new_empty(0 if product == "one launch" else (m, r), dtype=torch.float32)
    noted(
        _C.lora_gemv,
        y,
        h,
        x,
        w,
        *scales,
        a,
        b,
        scale,
        bias,
        gain,
        gate,
        block,
        given,
        _device.processors(x.device),
        _device.stream(x.device),
    )


def operands(y, x, base, product, form, block):
    """(w, the five tensors of a 4-bit w, whether w is x·Ŵᵀ), as a launcher of C++ takes them.

    Where cuBLAS multiplies, its product is made here, in y.

    Args:
        product: what `describe` returns.
    """
    w = base[0]
    scales = [None] * 5
    if product == "epilogue":
        return w, scales, True
    if product == "cuBLAS + epilogue":
        noted(torch.mm, x, w if form == "transposed" else w.T, out=y)
        return y, scales, True
    if product == "dequantize + cuBLAS":
        multiply(y, x, base, block)
        return y, scales, True
    if form == "nf4":
        scales = [*base[1:], None, None, None][:5]
    return w, scales, False


def multiply(y, x, base, block):
    """y = x·Ŵᵀ for a 4-bit Ŵ, of which as many rows are decoded at a time as the scratch holds.

    torch's allocator hands the scratch out again to the next call.
    """
    k, n = x.shape[1], y.shape[1]
    rows = max(1, SCRATCH // max(1, k * x.element_size()))
    if rows >= 8:
        rows = rows // 8 * 8  # codes of eight rows are whole words
    scratch = x.new_empty(min(n, rows), k)
    for first in range(0, n, len(scratch)):
        w = scratch[: n - first]
        dequantize_rows(w, base, block, k, first)
        noted(torch.mm, x, w.T, out=y[:, first : first + len(w)])


def describe(
    op: str, x: torch.Tensor, m: int, n: int, k: int, r: int, form: str
) -> str:
    """How m rows like x are multiplied by a base of n rows and k columns, in a report's words.

    In one launch every block of threads makes its own h. It reads a once more, from L2: together
    processors · r / n of what is read of the base. In two launches the one for h overlaps the
    next. For a 4-bit base, which is a quarter of the size, reading a again costs four times as
    much beside it, so an adapter takes two launches.

    On an H200, decoding a base takes 13 µs and cuBLAS 10. Decoding inside the product takes
    36 µs for 64 rows, and 26 for 32.

    Args:
        op: the op of LoRA; this backend has only "lora_gemv".
        r: the rank of the adapter.
        form: how the base is stored, such as "dense" or "nf4".
    """
    if form == "given":
        return "epilogue"
    fp32 = x.dtype is torch.float32
    if form == "nf4":
        if k % 32 or m > most_decoding_rows(x):
            return "dequantize + cuBLAS"
        return "two launches" if r else "one launch"
    if form == "transposed" or k % 8 or (m > 4 and fp32):
        return "cuBLAS + epilogue"
    if 4 * _device.processors(x.device) * r <= n and (m <= 4 or r <= 16):
        return "one launch"
    return "two launches"


def most_decoding_rows(x):
    """Rows like x up to which decoding a 4-bit base inside the product pays."""
    if x.dtype is torch.float32:
        return 4
    return 32 if _device.hopper(x.device) else 64
