"""DoRA on a CPU.

One pass over the base makes its norm. For the norm's gradients torch's GEMM multiplies by slices
of the base, in fp32.
"""

import torch

from .._C import cpu as _C
from .._replay import noted
from . import nf4


def dora_norm(n, x, base, a, b, scale, form, block):
    run = _C.dora_norm
    if x.dtype is torch.bfloat16 and hasattr(_C, "dora_norm_bf16"):
        run = _C.dora_norm_bf16
    noted(run, n, x, base, a, b, scale, form, block)


def dora_norm_bwd(da, db, dn, n, x, base, a, b, scale, need, form, block):
    def rounded(t):
        return t.to(x.dtype).float()

    s = scale.item()
    a, b = rounded(a), rounded(b)
    c = (dn / n).masked_fill((n == 0) | n.isinf(), 0)[:, None]
    with torch.autocast(
        "cpu", enabled=False
    ):  # it would round what the specification does not
        cb = c * b
        wide = torch.zeros_like(a)
        u = torch.empty_like(b)
        for first, count in nf4.row_ranges(b.shape[0], a.shape[1], c):
            w = fp32_rows(x, base, form, block, first, count)
            if need[0]:
                wide.addmm_(rounded(cb[first : first + count]).T, w, alpha=s)
            if need[1]:
                torch.mm(w, a.T, out=u[first : first + count])
        if need[0]:
            da.copy_(wide.addmm_(b.T @ cb, a, alpha=s * s))
        if need[1]:
            db.copy_(u.addmm_(b, a @ a.T, alpha=s).mul_(c * s))


def fp32_rows(x, base, form, block, first, count):
    """`count` rows of the base from `first` on, rounded to x's dtype, in fp32."""
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
