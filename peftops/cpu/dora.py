"""DoRA on a CPU: one pass over the base for its norm, torch's GEMM over parts of it for the norm's gradient."""

import torch

from .._C import cpu as _C
from .._replay import noted
from . import nf4


def dora_norm(n, x, base, a, b, scale, form, block):
    dots = x.dtype is torch.bfloat16 and hasattr(_C, "dora_norm_bf16")
    noted(_C.dora_norm_bf16 if dots else _C.dora_norm, n, x, base, a, b, scale, form, block)


def dora_norm_bwd(da, db, dn, n, x, base, a, b, scale, form, block, need):
    def rounded(t):
        return t.to(x.dtype).float()

    s, a, b = scale.item(), rounded(a), rounded(b)
    c = (dn / n).masked_fill((n == 0) | n.isinf(), 0)[:, None]
    with torch.autocast("cpu", enabled=False):  # it would round what the specification does not
        cb, wide = c * b, torch.zeros_like(a)
        u = torch.empty_like(b)
        for first, count in nf4.parts(*b.shape[:1], a.shape[1], c):
            w = part(x, base, form, block, first, count)
            if need[0]:
                wide.addmm_(rounded(cb[first : first + count]).T, w, alpha=s)
            if need[1]:
                torch.mm(w, a.T, out=u[first : first + count])
        if need[0]:
            da.copy_(wide.addmm_(b.T @ cb, a, alpha=s * s))
        if need[1]:
            db.copy_(u.addmm_(b, a @ a.T, alpha=s).mul_(c * s))


def part(x, base, form, block, first, count):
    """Rows of the base, rounded to x's dtype, in fp32"""
    if form == "nf4":
        w = nf4.scratch(x.dtype, count, x.shape[1])
        noted(_C.nf4_part, w, base, block, x.shape[1], first, 0)
    elif form == "transposed":
        w = base[0].narrow(1, first, count).T
    else:
        w = base[0].narrow(0, first, count)
    return w.float()


def dora_drop(dropped, rest, bits, x, seed, p):
    noted(_C.dora_drop, dropped, rest, bits, x, seed, p)


def dora_mix(out, u, v, bits, p):
    noted(_C.dora_mix, out, u, v, bits, p)
