"""DoRA's norm in CUDA C++: one read of the weight, by tiles that are never stored."""

import functools

import torch

from .._C import cuda as _C
from .._replay import noted
from . import _device

ALIGNED = {
    "dense": (8, 1),
    "transposed": (8, 4),
    "nf4": (16, 1),
}  # k and n of a weight that is read by whole pieces


def dora_norm(n, x, base, a, b, scale, form, block):
    (rows, r), k, device = b.shape, x.shape[1], x.device
    if not rows:
        return
    of_k, of_n = ALIGNED[form]
    tiled = x.dtype is not torch.float32 and k % of_k == 0 and rows % of_n == 0
    tall, wide, resident = (
        (64, 64, 2) if not tiled else (128, 256, 1) if r > 64 else (256, 64, 2)
    )
    parts = splits(-(-rows // tall), -(-k // wide), resident * _device.processors(device))
    sums = torch.empty(parts, rows, dtype=torch.float32, device=device)
    ranks = 32 if r > 64 else 16  # whole steps of tensor cores
    ranks = -(-r // ranks) * ranks if tiled else 0
    fragments = x.new_empty(-(-k // 64) * 64, ranks), x.new_empty(-(-rows // 32) * 32, ranks)
    w, *scales = [*base, None, None, None, None, None][:6]
    noted(
        _C.dora_norm,
        n,
        sums,
        *fragments,
        x,
        w,
        *scales,
        a,
        b,
        scale,
        form,
        block,
        tiled,
        _device.stream(device),
    )


@functools.cache
def splits(blocks, tiles, slots):
    """The parts of k: as few as fill the GPU's slots for blocks best, where a block costs a tile more than its own."""
    return min(
        range(1, max(1, min(tiles, 64)) + 1),
        key=lambda s: -(-blocks * s // slots) * (1 - (-tiles // s)),
    )
