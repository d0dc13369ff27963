"""The gradients of DoRA's norm: two products of Ŵ, of which LoRA has the like of x."""

import torch

from .lora import shrink
from .lora_grads import x_pass
from .lora_product import parts


def dora_norm_bwd(da, db, dn, n, x, base, a, b, scale, form, block, need):
    if not b.numel():
        da.zero_()
        return
    a, b = a.to(x.dtype), b.to(x.dtype)
    c = (dn / n).masked_fill((n == 0) | n.isinf(), 0)[:, None]
    cb = c * b
    down, across = both(base, a, cb.to(x.dtype), form, block, need)
    with torch.autocast("cuda", enabled=False):
        a, b = a.float(), b.float()
        if need[0]:
            torch.mul(scale, down + scale * (b.T @ cb) @ a, out=da)
        if need[1]:
            torch.mul(scale * c, across + scale * (b @ (a @ a.T)), out=db)


def both(base, a, d, form, block, need):
    """dᵀ·Ŵ (r, k) and Ŵ·aᵀ (n, r) in fp32, None where it is not needed"""
    weight = parts(base, form, block, len(d), a)
    if form != "transposed":
        return products(a, d, weight, need)
    found = products(d.T.contiguous(), a.T.contiguous(), weight, need[::-1])
    return [None if t is None else t.T for t in found[::-1]]


def products(a, d, weight, need):
    """dᵀ·w (r, k) and w·aᵀ (n, r) of the rows of w, which come in lora_product's parts"""
    down, across = None, d.new_empty(d.shape, dtype=torch.float32) if need[1] else None
    for first, w, _ in weight:
        rows = slice(first, first + len(w))
        if need[1]:
            shrink(across[rows], None, w, a, None, 0.0)
        if need[0]:
            mine = a.new_empty(a.shape, dtype=torch.float32)
            x_pass(mine, w, d[rows], None, 1.0, False)
            down = mine if down is None else down.add_(mine)
    return down, across
