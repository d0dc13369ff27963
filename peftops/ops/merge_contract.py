"""Merging's contracts: what each op takes and returns, and the checks of its arguments.

Adapter e has the next ranks[e] rows of a and columns of b. In turn each makes, in fp64,

    q = gain ⊙ (q + scale · b·a)    p = gain ⊙ p

from q = -0 and p = 1. Each operation is rounded, and the sum of b·a goes over the ranks in order.
Since a product of two floats is exact in fp64, every backend and device gives the same bits.
"""

import torch
from torch import Tensor

from .._arguments import expect
from .._op import op
from .lora_base import DTYPES, mask_bytes
from .nf4 import expect_base

OUTPUTS = torch.float32, torch.bfloat16, torch.float16


@op
def merge_add(
    a: Tensor,
    b: Tensor,
    base: list[Tensor],
    scale: Tensor,
    ranks: Tensor,
    dtype: torch.dtype,
    gain: Tensor | None = None,
    form: str = "dense",
    block: int = 0,
    undo: bool = False,
) -> tuple[Tensor, Tensor]:
    """w = round(p ⊙ Ŵ + q), rounded once

    a (R, k) · b (n, R) · base · scale (adapters,) fp64 · ranks (adapters,) int32, whose sum is R ·
    gain (adapters, n) fp64
    ->  w (n, k), or (k, n) over a transposed base, of dtype
        lost (rows of w, 4⌈columns of w/32⌉ or 0): bits, the lowest first, that are set where
        merge_undo of w does not give Ŵ's bits; made if `undo`
    """
    n, k = expect_delta(a, b, scale, ranks, gain)
    if form not in ("dense", "transposed", "nf4"):
        raise ValueError(f"merge: form must be dense, transposed or nf4, got {form!r}")
    shape = (k, n) if form == "transposed" else (n, k)
    if form == "nf4":
        wide = torch.float64 if a.dtype is torch.float64 else torch.float32
        expect_base("merge", base, block, n * k, wide)
        restored = None
    else:
        if len(base) != 1:
            raise ValueError(f"merge: base must be one weight, got {len(base)} tensors")
        expect("merge", "w", base[0], shape, *DTYPES)
        restored = base[0].dtype
    if dtype not in OUTPUTS:
        raise TypeError(
            f"merge: dtype must be {' or '.join(map(str, OUTPUTS))}, got {dtype}"
        )
    if undo and restored not in (dtype, torch.float64):
        raise ValueError(
            f"merge: undo must be of a weight in {dtype}, got {restored or form}"
        )
    lost = shape[0], mask_bytes(shape[1]) if undo else 0
    return a.new_empty(shape, dtype=dtype), a.new_empty(lost, dtype=torch.uint8)


@op
def merge_undo(
    w: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    ranks: Tensor,
    gain: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """round((w - q) / p), rounded once: what was merged into w, but where merge_add lost it

    w (n, k), or (k, n) if transposed, and the arguments of merge_add  ->  like w
    """
    n, k = expect_delta(a, b, scale, ranks, gain)
    expect("merge", "w", w, (k, n) if transposed else (n, k), *DTYPES)
    return torch.empty_like(w)


def expect_delta(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    ranks: Tensor,
    gain: Tensor | None,
) -> tuple[int, int]:
    """Raises for the first tensor that is not as it must be; returns n and k."""
    if a.dim() != 2:
        raise ValueError(f"merge: a must be (R, k), got {tuple(a.shape)}")
    if b.dim() != 2:
        raise ValueError(f"merge: b must be (n, R), got {tuple(b.shape)}")
    if scale.dim() != 1:
        raise ValueError(f"merge: scale must be (adapters,), got {tuple(scale.shape)}")
    n = b.shape[0]
    adapters = scale.shape[0]
    expect("merge", "a", a, a.shape, *DTYPES)
    expect("merge", "b", b, (n, a.shape[0]), a.dtype)
    expect("merge", "scale", scale, (adapters,), torch.float64)
    expect("merge", "ranks", ranks, (adapters,), torch.int32)
    expect("merge", "gain", gain, (adapters, n), torch.float64)
    return n, a.shape[1]
