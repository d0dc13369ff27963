"""The specification of merging: sums in fp64 in order, and one rounding."""

import torch
from torch.nn.functional import pad

from .lora_base import matrix

# The exponents of a dtype's smallest normal number, and the digits after the leading one.
GRIDS = {
    torch.float32: (-126, 23),
    torch.bfloat16: (-126, 7),
    torch.float16: (-14, 10),
}


def merge_add(w, lost, a, b, base, scale, ranks, dtype, gain, form, block, undo):
    p, q = sums(a, b, scale, ranks, gain)
    stored = matrix(base, form, block, *q.shape)
    merged = rounded(p * stored.double() + q, dtype)
    if undo:
        restored = rounded((merged.double() - q) / p, dtype)
        before = stored.to(dtype)
        differs = (bits(restored) != bits(before)) | before.isnan()
        lost.copy_(packed(differs.T if form == "transposed" else differs))
    w.copy_(merged.T if form == "transposed" else merged)


def merge_undo(out, w, a, b, scale, ranks, gain, transposed):
    p, q = sums(a, b, scale, ranks, gain)
    merged = w.T if transposed else w
    restored = rounded((merged.double() - q) / p, w.dtype)
    out.copy_(restored.T if transposed else restored)


def sums(a, b, scale, ranks, gain):
    """p (n, 1) and q (n, k)."""
    n = b.shape[0]
    p = a.new_ones(n, 1, dtype=torch.float64)
    q = a.new_full((n, a.shape[1]), -0.0, dtype=torch.float64)  # −0 + x is x
    pairs = iter(zip(b.double().T[:, :, None], a.double()[:, None], strict=True))
    for e, rank in enumerate(ranks.tolist()):
        delta = torch.zeros_like(q)
        for _ in range(rank):
            column, row = next(pairs)
            delta += column * row
        q += scale[e] * delta
        if gain is not None:
            q *= gain[e, :, None]
            p *= gain[e, :, None]
    return p, q


def rounded(v, dtype):
    """v (fp64) rounded once to the nearest value of dtype; torch would round to fp32 first."""
    if dtype is torch.float64:
        return v
    smallest, digits = GRIDS[dtype]
    _, exponent = torch.frexp(v)
    step = torch.ldexp(torch.ones_like(v), (exponent - 1).clamp_min(smallest) - digits)
    return ((v / step).round() * step).to(dtype)


def packed(flags):
    """A bit for each column, the lowest first, in rows of whole 32-bit words."""
    words = pad(flags, (0, -flags.shape[1] % 32)).view(len(flags), -1, 8)
    return (words.long() << torch.arange(8, device=flags.device)).sum(-1)


def bits(t):
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
