"""The base as LoRA's kernels read it, and its product by torch's own GEMM, which wants 4-bit weights decoded."""

import math

import torch

from .._replay import noted
from .nf4 import EXACT, decode

SCRATCH = (
    32 << 20
)  # bytes of decoded weights at a time; torch's allocator has them ready for the next call


def operand(base, form, block, k, width):
    """W of a kernel, and what it has to know of it: GROUP columns of a tile, `width` wide, share a scale."""
    if form == "nf4":
        return tuple(base), {
            "FORM": form,
            "BLOCK": block,
            "GROUP": math.gcd(k, block, width),
            **EXACT,
        }
    return base[0] if base else None, {"FORM": form, "BLOCK": None, "GROUP": None}


def multiply(out, left, weight, add=False):
    """out = left·w, or out + left·w to add, of the `parts` of a weight, each of which gives as many columns of out."""
    for first, w, turned in weight:
        product(out[:, first : first + columns(w, turned)], left, w if turned else w.T, add)


def columns(w, turned):
    """Of the product with w, which is (k, n) where turned, else (n, k)"""
    return w.shape[1] if turned else w.shape[0]


def parts(base, form, block, n, x, step=1):
    """(first column, w, whether it is turned) of x·Ŵᵀ: Ŵ as it lies, or, of 4 bits, its n rows a scratch at a time.

    First columns are multiples of step.
    """
    if form != "nf4":
        yield 0, base[0], form == "transposed"
        return
    k = x.shape[1]
    span = part(n, k, x, step)
    scratch = x.new_empty(span, k)
    for first in range(0, n, span):
        w = scratch[: n - first]
        decode(w.view(1, -1), base, block, first * k, 0)
        yield first, w, False


def parts_bwd(base, form, block, k, dz, step=1):
    """As `parts` of dz·Ŵ: of the k columns of Ŵ, so that sums stay whole"""
    if form != "nf4":
        yield 0, base[0], form == "dense"
        return
    n = dz.shape[1]
    span = part(k, n, dz, step)
    scratch = dz.new_empty(n * span)
    for first in range(0, k, span):
        width = min(span, k - first)
        w = scratch[: n * width].view(n, width)
        decode(w, base, block, first, k)
        yield first, w, True


def adds(x):
    """Whether the product comes last and is added to the delta, which saves a read; fp32 would lose digits to it."""
    return x.element_size() == 2


def product(out, a, b, add):
    if add:
        noted(torch.addmm, out, a, b, out=out)
    else:
        noted(torch.mm, a, b, out=out)


def part(count, length, x, step=1):
    """How many of `count` vectors of this length the scratch holds: whole tiles of the product where it can be."""
    fit = SCRATCH // max(1, length * x.element_size())
    fit = max(1, fit // 1024 * 1024 or fit // 128 * 128 or fit)
    return min(count, -(-fit // step) * step)
