"""4-bit weights on a CPU, and the slices in which a whole weight is decoded and used."""

import threading

import torch

from .._C import cpu as _C
from .._replay import noted

PART = 8 << 20  # bytes of a slice: it stays in the cache from its decoding to its use
_kept = threading.local()


def nf4_quantize(codes, absmax, w, bounds, order, block):
    noted(_C.nf4_quantize, codes, absmax, w.flatten(), bounds, order, block)


def nf4_dequantize(out, codes, table, scales, block, size, dtype):
    noted(_C.nf4_dequantize, out, [codes, table, *scales], block)


def row_ranges(rows: int, columns: int, x: torch.Tensor) -> list[tuple[int, int]]:
    """(first, count) of each slice of a matrix in x's dtype. All but the last have an even count.

    An even number of rows always ends with a whole byte of 4-bit codes.
    """
    fit = PART // (x.element_size() * max(1, columns))
    count = max(2, fit // 2 * 2)
    return [(first, min(count, rows - first)) for first in range(0, rows, count)]


def scratch(dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    """A matrix that this thread keeps between calls.

    Fresh memory would cost more than the decoding, since the system has to give out its pages.
    """
    size = rows * columns * dtype.itemsize
    kept = getattr(_kept, "memory", None)
    if kept is None or kept.nbytes < size:
        kept = torch.empty(size, dtype=torch.uint8, device="cpu")
        _kept.memory = kept
    return kept[:size].view(dtype).view(rows, columns)
