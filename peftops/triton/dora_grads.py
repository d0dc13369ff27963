"""The gradients of DoRA's norm n = ‖Ŵ + s·b·a‖, for dn, the gradient of n.

With c = dn / n, and V = Ŵ + s·b·a:

    da = s · (c ⊙ b)ᵀ·V = s · ((c ⊙ b)ᵀ·Ŵ + s · bᵀ·(c ⊙ b)·a)
    db = s · c ⊙ (V·aᵀ) = s · c ⊙ (Ŵ·aᵀ + s · b·(a·aᵀ))

They need dᵀ·Ŵ with d = c ⊙ b, and Ŵ·aᵀ. Those are LoRA's products for da and h with Ŵ in the place
of x, so LoRA's kernels make them. Everything else has the size of the adapter, and torch makes it.
"""

import torch

from .lora import shrink
from .lora_grads import x_pass
from .lora_product import weight_slices


def dora_norm_bwd(da, db, dn, n, x, base, a, b, scale, need, form, block):
    if not b.numel():
        da.zero_()
        return
    a, b = a.to(x.dtype), b.to(x.dtype)
    c = (dn / n).masked_fill((n == 0) | n.isinf(), 0)[:, None]
    cb = c * b
    down, across = products(base, a, cb.to(x.dtype), form, block, need)
    with torch.autocast("cuda", enabled=False):
        a, b = a.float(), b.float()
        if need[0]:
            torch.mul(scale, down + scale * (b.T @ cb) @ a, out=da)
        if need[1]:
            torch.mul(scale * c, across + scale * (b @ (a @ a.T)), out=db)


def products(base, a, d, form, block, need):
    """[dᵀ·Ŵ (r, k), Ŵ·aᵀ (n, r)] in fp32, for a (r, k) and d (n, r); None what `need` does not."""
    slices = weight_slices(base, form, block, len(d), a)
    if form != "transposed":
        return slice_products(a, d, slices, need)
    # The weight lies as Ŵᵀ: with d and a in each other's place the same kernels read it.
    turned = slice_products(d.T.contiguous(), a.T.contiguous(), slices, need[::-1])
    return [None if t is None else t.T for t in reversed(turned)]


def slice_products(a, d, slices, need):
    """dᵀ·w (r, k) and w·aᵀ (n, r) for a weight w (n, k) that comes in slices of its rows."""
    down = None
    across = d.new_empty(d.shape, dtype=torch.float32) if need[1] else None
    for first, w, _ in slices:
        rows = slice(first, first + len(w))
        if need[1]:
            shrink(across[rows], None, w, a, None, 0.0)
        if need[0]:
            down_of_slice = a.new_empty(a.shape, dtype=torch.float32)
            x_pass(down_of_slice, w, d[rows], None, 1.0, False)
            down = down_of_slice if down is None else down.add_(down_of_slice)
    return down, across
