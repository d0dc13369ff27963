"""4-bit weights in CUDA C++: one launch each way."""

from .._C import cuda as _C
from .._replay import noted
from . import _device


def nf4_quantize(codes, absmax, w, bounds, order, block):
    if size := w.numel():
        noted(
            _C.nf4_quantize,
            codes,
            absmax,
            w,
            bounds,
            order,
            size,
            block,
            _device.stream(w.device),
        )


def nf4_dequantize(out, codes, table, scales, block, size, dtype):
    dequantize_rows(out.view(1, size), [codes, table, *scales], block, size)


def dequantize_rows(out, base, block, k, row=0, column=0):
    """out (rows, columns), any part of the weight (n, k) that these are codes of, in out's dtype"""
    (rows, columns), scales = out.shape, [*base[2:], None, None, None]
    if out.numel():
        first, stream = row * k + column, _device.stream(out.device)
        noted(
            _C.nf4_dequantize,
            out,
            base[0],
            base[1],
            *scales[:4],
            block,
            k,
            first,
            rows,
            columns,
            stream,
        )
