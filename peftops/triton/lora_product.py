"""The base as LoRA's kernels read it, and its product by torch's own GEMM, which wants 4-bit weights decoded."""

import math

import torch

from .._replay import noted
from .nf4 import EXACT, decode

SCRATCH = 32 << 20  # bytes of decoded weights at a time; torch's allocator has them ready for the next call


def operand(base, form, block, k, width):
    """W of a kernel, and what it has to know of it: GROUP columns of a tile, `width` wide, share a scale."""
    if form == "nf4":
        return tuple(base), {"FORM": form, "BLOCK": block, "GROUP": math.gcd(k, block, width), **EXACT}
    return base[0] if base else None, {"FORM": form, "BLOCK": None, "GROUP": None}


def multiply(y, x, base, form, block, add=False):
    """y = x·Ŵᵀ, or y + x·Ŵᵀ to add; a part of the rows of Ŵ gives as many columns of y."""
    if form != "nf4":
        product(y, x, base[0] if form == "transposed" else base[0].T, add)
        return
    (_, n), k = y.shape, x.shape[1]
    span = part(n, k, x)
    scratch = x.new_empty(span, k)
    for first in range(0, n, span):
        w = scratch[: n - first]
        decode(w.view(1, -1), base, block, first * k, 0)
        product(y[:, first : first + span], x, w.T, add)


def multiply_bwd(dx, dz, base, form, block, add=False):
    """dx = dz·Ŵ, or dx + dz·Ŵ to add; a part of the columns of Ŵ gives as many of dx, so that sums stay whole."""
    if form != "nf4":
        product(dx, dz, base[0].T if form == "transposed" else base[0], add)
        return
    (_, k), n = dx.shape, dz.shape[1]
    span = part(k, n, dz)
    scratch = dz.new_empty(n * span)
    for first in range(0, k, span):
        columns = min(span, k - first)
        w = scratch[: n * columns].view(n, columns)
        decode(w, base, block, first, k)
        product(dx[:, first : first + columns], dz, w, add)


def adds(x):
    """Whether the product comes last and is added to the delta, which saves a read; fp32 would lose digits to it."""
    return x.element_size() == 2


def product(out, a, b, add):
    if add:
        noted(torch.addmm, out, a, b, out=out)
    else:
        noted(torch.mm, a, b, out=out)


def part(count, length, x):
    """How many of `count` vectors of this length the scratch holds: whole tiles of the product where it can be."""
    fit = SCRATCH // max(1, length * x.element_size())
    return min(count, max(1, fit // 1024 * 1024 or fit // 128 * 128 or fit))
