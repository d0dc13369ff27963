"""The specification of DoRA's norm and of its dropout.

Values are rounded as in LoRA's product, see lora.py.
"""

from . import outside_autocast
from .lora import lora_formula, roundings
from .lora_base import matrix
from .lora_dropout import drop, keep_bits


def dora_norm(n, x, base, a, b, scale, form, block):
    n.copy_(dora_norm_formula(x, base, a, b, scale, form, block))


@outside_autocast
def dora_norm_formula(x, base, a, b, scale, form, block):
    """‖Ŵ + scale·b·a‖ of each row (n,), by operations that torch can differentiate."""
    _, rounded = roundings(x, scale)
    w = rounded(matrix(base, form, block, b.shape[0], x.shape[1]))
    return (scale * (rounded(b) @ rounded(a)) + w).norm(dim=1)


@outside_autocast
def dora_norm_bwd(da, db, dn, n, x, base, a, b, scale, need, form, block):
    _, rounded = roundings(x, scale)
    w = rounded(matrix(base, form, block, b.shape[0], x.shape[1]))
    a = rounded(a)
    b = rounded(b)
    c = (dn / n).masked_fill((n == 0) | n.isinf(), 0)[:, None]
    if need[0]:
        da.copy_(scale * (rounded(c * b).T @ w) + scale * scale * ((b.T @ (c * b)) @ a))
    if need[1]:
        db.copy_(scale * (c * (w @ a.T)) + scale * scale * (c * (b @ (a @ a.T))))


def dora_plain(x, base, a, b, scale, bias, gain, seed, form, block, p):
    """dora_formula with the dropout that this seed draws."""
    bits = keep_bits(seed, *x.shape, p)
    return dora_formula(x, base, a, b, scale, bias, gain, bits, form, block, p)


@outside_autocast
def dora_formula(x, base, a, b, scale, bias, gain, bits, form, block, p):
    """y where the base sees drop(x) too, not yet rounded to x's dtype; differentiable by torch."""
    kept = drop(x.to(scale.dtype), bits, p).to(x.dtype)
    y, *_ = lora_formula(
        kept, base, a, b, scale, bias, gain, None, None, form, block, 0.0
    )
    w = matrix(base, form, block, b.shape[0], x.shape[1]).to(x.dtype)
    return y + (x - kept).to(scale.dtype) @ w.to(scale.dtype).T


def dora_drop(dropped, rest, bits, x, seed, p):
    bits.copy_(keep_bits(seed, *x.shape, p))
    dora_mix(dropped, x, None, bits, p)
    dora_mix(rest, x.new_zeros(()).expand_as(x), x, bits, p)


def dora_mix(out, u, v, bits, p):
    wide = u.float() if u.element_size() < 4 else u
    kept = drop(wide, bits, p) if p else wide
    out.copy_(kept if v is None else kept + v - drop(v.to(wide.dtype), bits, p))
