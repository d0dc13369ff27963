"""DoRA's norm in CUDA C++: one read of the weight, by tiles of Ŵ + s·b·a that are never stored."""

import functools

import torch

from .._C import cuda as _C
from .._replay import noted
from . import _device

# What k and n have to divide by, for each form, so that the weight is read by whole pieces.
ALIGNED = {
    "dense": (8, 1),
    "transposed": (8, 4),
    "nf4": (16, 1),
}
# Tiles of the kernels: rows, columns, and blocks that a multiprocessor holds.
PLAIN = 64, 64, 2  # without tensor cores
SMALL_RANK = 256, 64, 2
LARGE_RANK = 128, 256, 1


def dora_norm(n, x, base, a, b, scale, form, block):
    rows, r, k = *b.shape, x.shape[1]
    device = x.device
    if not rows:
        return
    k_multiple, n_multiple = ALIGNED[form]
    tiled = (
        x.dtype is not torch.float32 and k % k_multiple == 0 and rows % n_multiple == 0
    )
    if not tiled:
        tile = PLAIN
    else:
        tile = LARGE_RANK if r > 64 else SMALL_RANK
    tall, wide, resident = tile
    slots = resident * _device.processors(device)
    count = splits(-(-rows // tall), -(-k // wide), slots)
    sums = torch.empty(count, rows, dtype=torch.float32, device=device)
    ranks = 0
    if tiled:
        step = 32 if r > 64 else 16  # whole steps of tensor cores
        ranks = -(-r // step) * step
    a_fragments = x.new_empty(-(-k // 64) * 64, ranks)
    b_fragments = x.new_empty(-(-rows // 32) * 32, ranks)
    w, *scales = [*base, None, None, None, None, None][:6]
    noted(
        _C.dora_norm,
        n,
        sums,
        a_fragments,
        b_fragments,
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
def splits(blocks: int, tiles: int, slots: int) -> int:
    """Into how many parts k is split, so that their blocks fill the GPU best.

    Returns the least number of parts with the least time. The time is that of rounds of blocks,
    and a block takes as long as its tiles and one more.

    Args:
        blocks: how many there are for each part.
        tiles: how many lie along k.
        slots: blocks that the GPU runs at once.
    """

    def cost(parts):
        rounds = -(-blocks * parts // slots)
        tiles_each = -(-tiles // parts)
        return rounds * (1 + tiles_each)

    return min(range(1, max(1, min(tiles, 64)) + 1), key=cost)
