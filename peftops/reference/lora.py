"""The specification of LoRA.

a, b, h, gated h, dz and dh are rounded to x's dtype. Everything else is in scale's dtype.
"""

from . import outside_autocast
from .lora_base import matrix, product
from .lora_dropout import drop, keep, keep_bits
from .lora_gate import fold, repeat, spread


def lora_fwd(
    y, h, bits, z, x, base, a, b, scale, bias, gain, gate, seed, form, block, p, keep_z
):
    if p:
        bits.copy_(keep_bits(seed, *x.shape, p))
    exact = lora_formula(x, base, a, b, scale, bias, gain, gate, bits, form, block, p)
    y.copy_(exact[0])
    h.copy_(exact[1])
    if keep_z:
        z.copy_(exact[2])


@outside_autocast
def lora_formula(x, base, a, b, scale, bias, gain, gate, bits, form, block, p):
    """y, h and z, not yet rounded to x's dtype, by operations that torch can differentiate."""
    wide, rounded = roundings(x, scale)
    h = rounded(drop(wide(x), bits, p) @ rounded(a).T)
    w = rounded(matrix(base, form, block, b.shape[0], x.shape[1]))
    z = product(wide(x), w, form) + scale * (rounded(spread(h, gate, b)) @ rounded(b).T)
    y = z * (1 if gain is None else gain) + (0 if bias is None else bias)
    return y, h, z


def lora_plain(x, base, a, b, scale, bias, gain, gate, seed, form, block, p):
    """y of lora_formula with the dropout that this seed draws."""
    bits = keep_bits(seed, *x.shape, p) if p else None
    return lora_formula(x, base, a, b, scale, bias, gain, gate, bits, form, block, p)[0]


def lora_gemv(y, x, base, a, b, scale, bias, gain, gate, form, block):
    h = x.new_empty(x.shape[0], a.shape[0])
    none = x.new_empty(0)
    lora_fwd(
        y,
        h,
        none,
        none,
        x,
        base,
        a,
        b,
        scale,
        bias,
        gain,
        gate,
        None,
        form,
        block,
        0.0,
        False,
    )


def lora_mask(kept, seed, m, k, p):
    kept.copy_(keep(keep_bits(seed, m, k, p), k))


@outside_autocast
def lora_bwd(
    dx,
    da,
    db,
    dbias,
    dgain,
    dgate,
    dy,
    x,
    base,
    a,
    b,
    scale,
    h,
    bits,
    z,
    need,
    bias,
    gain,
    gate,
    form,
    block,
    p,
):
    wide, rounded = roundings(x, scale)
    dy, h = wide(dy), wide(h)
    dz = dy if gain is None else rounded(dy * gain)
    dhg = scale * (dz @ rounded(b))
    dh = rounded(fold(dhg, gate, a, b))
    if need[0]:
        dx_delta = drop(dh @ rounded(a), bits, p)
        if form == "given":
            dx.copy_(dx_delta)
        else:
            w = rounded(matrix(base, form, block, b.shape[0], x.shape[1]))
            dx.copy_(dz @ w + dx_delta)
    if need[1]:
        da.copy_(dh.T @ drop(wide(x), bits, p))
    if need[2]:
        db.copy_(scale * (dz.T @ rounded(spread(h, gate, b))))
    if need[3]:
        dbias.copy_(dy.sum(0))
    if need[4]:
        dgain.copy_((dy * wide(z)).sum(0))
    if need[5]:
        dgate.copy_((dhg * repeat(h, b)).unflatten(1, (gate.shape[1], -1)).sum(2))


def roundings(x, scale):
    """Two functions of a tensor: to scale's dtype, and to scale's dtype by way of x's."""
    return lambda t: t.to(scale.dtype), lambda t: t.to(x.dtype).to(scale.dtype)
