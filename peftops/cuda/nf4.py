"""4-bit weights in CUDA C++: one launch to quantize, and one to dequantize any part."""

from .._C import cuda as _C
from .._replay import noted
from . import _device


def nf4_quantize(codes, absmax, w, bounds, order, block):
    size = w.numel()
    if size == 0:
        return
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
    """out = a part of the weight (n, k), in out's dtype.

    Args:
        out: (rows, columns), contiguous.
        base: [codes, table, absmax], or [codes, table, absmax8, nested_absmax, nested_table,
            offset] with nested scales.
        block: elements that share an absmax.
        k: columns of the weight.
        row, column: where the part starts.
    """
    if out.numel() == 0:
        return
    rows, columns = out.shape
    scales = [*base[2:], None, None, None][:4]
    noted(
        _C.nf4_dequantize,
        out,
        base[0],
        base[1],
        *scales,
        block,
        k,
        row * k + column,
        rows,
        columns,
        _device.stream(out.device),
    )
