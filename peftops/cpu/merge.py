"""Merging on a CPU. A weight in 4 bits is decoded in slices, which stay in the cache."""

import torch

from .._C import cpu as _C
from .._replay import noted
from . import nf4


def merge_add(
    w,
    lost,
    a,
    b,
    base,
    scale,
    ranks,
    dtype,
    gain,
    form,
    block,
    undo,
):
    if form != "nf4":
        turned = form == "transposed"
        lost = lost if undo else None
        noted(_C.merge_add, w, lost, base[0], a, b, scale, ranks, gain, turned)
        return
    k = a.shape[1]
    for first, count in nf4.row_ranges(b.shape[0], k, scale):
        decoded = nf4.scratch(torch.float32, count, k)
        noted(_C.nf4_part, decoded, base, block, k, first, 0)
        part = slice(first, first + count)
        own = None if gain is None else gain[:, part].contiguous()
        noted(
            _C.merge_add,
            w[part],
            None,
            decoded,
            a,
            b[part],
            scale,
            ranks,
            own,
            False,
        )


def merge_undo(out, w, a, b, scale, ranks, gain, transposed):
    noted(_C.merge_undo, out, w, a, b, scale, ranks, gain, transposed)
