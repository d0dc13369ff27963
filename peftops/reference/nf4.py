"""The specification of 4-bit weights, in the format of bitsandbytes.

A byte holds two codes, the first in the high half. A block is `block` consecutive elements, across
rows. Its scale, absmax, is the largest magnitude in it. The code of x is the number of bounds below
x · (1 / absmax). If scales have 8-bit codes of their own, absmax is table8[code] · nested_absmax +
offset, with two roundings and one nested_absmax for 256 scales.
"""

import math

import torch
from torch.nn.functional import pad

NESTED = 256  # scales that share a scale


def nf4_quantize(codes, absmax, w, bounds, order, block):
    blocks = pad(w.flatten().float(), (0, -w.numel() % block)).view(-1, block)
    absmax.copy_(blocks.abs().amax(1))
    normal = blocks * (1 / absmax.clamp_min(1e-38))[:, None]
    each = order[torch.searchsorted(bounds, normal).flatten()[: w.numel()]]
    zero = torch.searchsorted(bounds, bounds.new_zeros(w.numel() % 2))
    pairs = torch.cat([each, order[zero]]).view(-1, 2)
    codes.copy_(pairs[:, 0] << 4 | pairs[:, 1])


def nf4_dequantize(out, codes, table, scales, block, size, dtype):
    out.copy_(decode([codes, table, *scales], block, size))


def nf4_plain(base, block, shape, dtype):
    """The dequantized weight, for a graph that may hold only torch's own operations."""
    return decode(base, block, math.prod(shape)).view(shape).to(dtype)


def decode(base, block, size):
    """(size,) values in the dtype of the table, not yet rounded to the weight's dtype."""
    codes, table, *scales = base
    each = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten()[:size]
    return table[each.long()] * absmax_of(scales).repeat_interleave(block)[:size]


def absmax_of(scales):
    """(blocks,) absmax, decoded if the scales have 8-bit codes."""
    if len(scales) == 1:
        return scales[0]
    codes, nested, table, offset = scales
    return (
        table[codes.long()] * nested.repeat_interleave(NESTED)[: codes.numel()] + offset
    )
