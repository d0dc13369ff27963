"""LoRA for few rows in CUDA C++; a base that is not read 16 bytes at a time is multiplied by cuBLAS."""

import torch

from .._C import cuda as _C
from .._replay import noted
from . import _device
from .nf4 import dequantize_rows

SCRATCH = 32 << 20  # bytes of a 4-bit base that are decoded at once


def lora_gemv(y, x, base, a, b, scale, bias, gain, gate, form, block):
    (m, k), n, r, w = x.shape, b.shape[0], a.shape[0], base[0]
    if not y.numel():
        return
    product, scales = describe("lora_gemv", x, m, n, k, r, form), [None] * 5
    if product == "cuBLAS + epilogue":
        noted(torch.mm, x, w if form == "transposed" else w.T, out=y)
    elif product == "dequantize + cuBLAS":
        multiply(y, x, base, block)
    elif form == "nf4":
        scales = [*base[1:], None, None, None][:5]
    given = product in ("cuBLAS + epilogue", "dequantize + cuBLAS", "epilogue")
    if given and product != "epilogue":
        w = y
    h = x.new_empty(0 if product == "one launch" else (m, r), dtype=torch.float32)
    where = _device.processors(x.device), _device.stream(x.device)
    noted(
        _C.lora_gemv, y, h, x, w, *scales, a, b, scale, bias, gain, gate, block, given, *where
    )


def multiply(y, x, base, block):
    """y = x·Ŵᵀ by as many rows of Ŵ as the scratch holds, which torch's allocator hands out again to the next call."""
    k, n = x.shape[1], y.shape[1]
    rows = max(1, SCRATCH // max(1, k * x.element_size()))
    scratch = x.new_empty(
        min(n, rows if rows < 8 else rows // 8 * 8), k
    )  # codes of eight rows are whole words
    for first in range(0, n, len(scratch)):
        w = scratch[: n - first]
        dequantize_rows(w, base, block, k, first)
        noted(torch.mm, x, w.T, out=y[:, first : first + len(w)])


def describe(op, x, m, n, k, r, form):
    """How a report describes the product of m rows like x through a base of n columns and k rows.

    In one launch every block makes its own h: processors · r / n of what is read of the base is read again, from L2.
    Of a 4-bit base that is four times as much, and a launch for h alone overlaps the next. On an H200 decoding a base
    takes 13 µs and cuBLAS 10, and 64 rows that decode it inside 36, 32 rows 26.
    """
    if form == "given":
        return "epilogue"
    fp32 = x.dtype is torch.float32
    if form == "nf4":
        if k % 32 or m > (4 if fp32 else 32 if _device.hopper(x.device) else 64):
            return "dequantize + cuBLAS"
        return "two launches" if r else "one launch"
    if form == "transposed" or k % 8 or (m > 4 and fp32):
        return "cuBLAS + epilogue"
    return (
        "one launch"
        if 4 * _device.processors(x.device) * r <= n and (m <= 4 or r <= 16)
        else "two launches"
    )
