"""4-bit weights on a CPU, and the parts in which a whole one is walked."""

import threading

import torch

from .._C import cpu as _C
from .._replay import noted

PART = 8 << 20  # bytes of a part, which stays in the cache between its making and its use
_kept = threading.local()


def nf4_quantize(codes, absmax, w, bounds, order, block):
    noted(_C.nf4_quantize, codes, absmax, w.flatten(), bounds, order, block)


def nf4_dequantize(out, codes, table, scales, block, size, dtype):
    noted(_C.nf4_dequantize, out, [codes, table, *scales], block)


def parts(length, width, x):
    """(first, count) of runs of `length` lines of `width` elements, of even numbers of lines"""
    count = max(2, PART // (x.element_size() * max(1, width)) // 2 * 2)
    return [(first, min(count, length - first)) for first in range(0, length, count)]


def scratch(dtype, rows, columns):
    """A matrix of this thread, kept between calls: fresh pages would cost more than the decoding."""
    size = rows * columns
    kept = getattr(_kept, "memory", None)
    if kept is None or kept.nbytes < size * dtype.itemsize:
        _kept.memory = kept = torch.empty(
            size * dtype.itemsize, dtype=torch.uint8, device="cpu"
        )
    return kept[: size * dtype.itemsize].view(dtype).view(rows, columns)
