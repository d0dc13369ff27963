"""LoRA for few rows in CUDA C++; a base that is not read 16 bytes at a time is multiplied by cuBLAS."""

import torch

from .._C import cuda as _C
from . import _device


def lora_gemv(y, x, base, a, b, scale, bias, gain, gate, form, block):
    (m, k), n, r, w = x.shape, b.shape[0], a.shape[0], base[0]
    if m == 0:
        return
    way = path("lora_gemv", x, m, n, k, r, form)
    if way == "cuBLAS + epilogue":
        torch.mm(x, w if form == "transposed" else w.T, out=y)
        w = y
    h = x.new_empty(0 if way == "one launch" else (m, r), dtype=torch.float32)
    given = way in ("cuBLAS + epilogue", "epilogue")
    _C.lora_gemv(
        y, h, x, w, a, b, scale, bias, gain, gate, given, _device.processors(x.device), _device.stream(x.device)
    )


def path(op, x, m, n, k, r, form):
    """What a report calls the way of m rows like x through a base of n columns and k rows.

    In one launch every block makes its own h: processors · r / n of what is read of the base is read again, from L2.
    """
    if form == "given":
        return "epilogue"
    if form == "transposed" or k % 8 or (m > 4 and x.dtype is torch.float32):
        return "cuBLAS + epilogue"
    return "one launch" if 4 * _device.processors(x.device) * r <= n and (m <= 4 or r <= 16) else "two launches"
