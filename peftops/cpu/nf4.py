"""4-bit weights on a CPU, and products with one where no kernel makes them of the codes: a part of it at a time."""

import threading

import torch

from .._C import cpu as _C

PART = 8 << 20  # bytes of a part, which stays in the cache between its making and its use
_kept = threading.local()


def nf4_quantize(codes, absmax, w, bounds, order, block):
    _C.nf4_quantize(codes, absmax, w.flatten(), bounds, order, block)


def nf4_dequantize(out, codes, table, scales, block, size, dtype):
    _C.nf4_dequantize(out, [codes, table, *scales], block)


def product(y, x, base, block):
    """y = x·Ŵᵀ"""
    (_, k), n = x.shape, y.shape[1]
    for first, count in parts(n, k, x):
        w = scratch(x.dtype, count, k)
        _C.nf4_part(w, base, block, k, first, 0)
        torch.mm(x, w.T, out=y[:, first : first + count])


def product_bwd(dx, dz, base, block):
    """dx = dz·Ŵ"""
    n, k = dz.shape[1], dx.shape[1]
    for first, count in parts(k, n, dz):
        w = scratch(dz.dtype, n, count)
        _C.nf4_part(w, base, block, k, 0, first)
        torch.mm(dz, w, out=dx[:, first : first + count])


def parts(length, width, x):
    """(first, count) of runs of `length` lines of `width` elements, of even numbers of lines"""
    count = max(2, PART // (x.element_size() * max(1, width)) // 2 * 2)
    return [(first, min(count, length - first)) for first in range(0, length, count)]


def scratch(dtype, rows, columns):
    """A matrix of this thread, kept between calls: fresh pages would cost more than the decoding."""
    size = rows * columns
    kept = getattr(_kept, "memory", None)
    if kept is None or kept.nbytes < size * dtype.itemsize:
        _kept.memory = kept = torch.empty(size * dtype.itemsize, dtype=torch.uint8)
    return kept[: size * dtype.itemsize].view(dtype).view(rows, columns)
