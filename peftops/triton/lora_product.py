"""The base weight as LoRA's kernels read it, and its product by torch's own GEMM.

torch cannot multiply by 4-bit weights. They are decoded into a scratch of at most 32 MiB,
one slice of the weight at a time.

A slice is (first column of the result, w, turned). Where turned, w is (sum, columns), as torch
multiplies by it; otherwise (columns, sum), and its transpose is taken.
"""

import math

import torch

from .._replay import noted
from .nf4 import EXACT, decode

# Bytes of decoded weights at a time. torch's allocator has them ready for the next call.
SCRATCH = 32 << 20


def operand(base, form, block, k, width):
    """The argument W of a kernel, and the flags that say how to read it.

    The flag GROUP says how many neighbours in a tile of `width` columns share a scale.
    """
    if form == "nf4":
        group = math.gcd(k, block, width)
        return tuple(base), {"FORM": form, "BLOCK": block, "GROUP": group, **EXACT}
    w = base[0] if base else None
    return w, {"FORM": form, "BLOCK": None, "GROUP": None}


def multiply(out, left, slices, add=False):
    """out = left · (the weight of these slices); with add, out += that."""
    for first, w, turned in slices:
        columns = out[:, first : first + column_count(w, turned)]
        right = w if turned else w.T
        if add:
            noted(torch.addmm, columns, left, right, out=columns)
        else:
            noted(torch.mm, left, right, out=columns)


def column_count(w, turned):
    """How many columns of the result a slice gives."""
    return w.shape[1] if turned else w.shape[0]


def weight_slices(base, form, block, n, x, step=1):
    """Slices of Ŵ for x·Ŵᵀ: rows of Ŵ. Other forms than "nf4" are one slice, as they lie.

    First columns are multiples of `step`.
    """
    if form != "nf4":
        yield 0, base[0], form == "transposed"
        return
    k = x.shape[1]
    span = slice_columns(n, k, x, step)
    scratch = x.new_empty(span, k)
    for first in range(0, n, span):
        w = scratch[: n - first]
        decode(w.view(1, -1), base, block, first * k, 0)
        yield first, w, False


def weight_slices_bwd(base, form, block, k, dz, step=1):
    """Slices of Ŵ for dz·Ŵ: columns of Ŵ, so that no sum over its rows is split."""
    if form != "nf4":
        yield 0, base[0], form == "dense"
        return
    n = dz.shape[1]
    span = slice_columns(k, n, dz, step)
    scratch = dz.new_empty(n * span)
    for first in range(0, k, span):
        width = min(span, k - first)
        w = scratch[: n * width].view(n, width)
        decode(w, base, block, first, k)
        yield first, w, True


def slice_columns(count, length, x, step=1):
    """How many of `count` columns, each a sum of `length` weights, the scratch holds.

    A multiple of 1024 or 128 where it can be, so that the product has whole tiles.
    """
    fit = SCRATCH // max(1, length * x.element_size())
    fit = max(1, fit // 1024 * 1024 or fit // 128 * 128 or fit)
    return min(count, -(-fit // step) * step)


def product_comes_last(x):
    """Whether torch's product is added to the delta, rather than the delta to the product.

    That saves a read of the result. In fp32 it would cost digits.
    """
    return x.element_size() == 2
