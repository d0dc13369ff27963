"""Multi-LoRA's contracts: what each op takes and returns, and the checks of its arguments.

Adapters lie in pages of 8 rank-rows. Slot s has the pages table[s], of which the first rank[s] rows
are its own; what the others hold is never used, nor slots that no row has. A slot of -1 means the
base alone.
"""

import torch
from torch import Tensor

from .._arguments import expect
from .._op import op
from .._replay import unwanted
from .lora_base import mask_bytes, wide_dtype
from .lora_contract import expect_product

PAGE = 8  # rank-rows


@op
def multi_fwd(
    x: Tensor,
    base: list[Tensor],
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    table: Tensor,
    rank: Tensor,
    scale: Tensor,
    p: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    seed: Tensor | None = None,
    form: str = "dense",
    block: int = 0,
    keep_z: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y_i = g[s] ⊙ z_i + bias with z_i = x_i·Ŵᵀ + scale[s] · h_i·b[s], h_i = drop(x_i)·a[s]ᵀ

    s = slots[i] · x (m, k) · base · a (R, k) · b (R, n) · slots (m,) · table (S, P) ·
    rank (S,) · scale (S,) · p (S,) · gain (S, n)
    ->  y (m, n) · h (m, 8P), 0 beyond the slot's rank · bits (m, 4⌈k/32⌉ or 0) · z (m, n or 0)
    """
    m, k = x.shape
    n = b.shape[1]
    expect_multi(x, base, a, b, slots, table, rank, scale, p, bias, gain, form, block)
    expect("multi", "seed", seed, (1,), torch.int64)
    if p is not None and seed is None:
        raise ValueError("multi: p must come with a seed, got None")
    if p is not None:
        bits = x.new_empty(m, mask_bytes(k), dtype=torch.uint8)
    else:
        bits = unwanted(x, m, 0, dtype=torch.uint8)
    return (
        x.new_empty(m, n),
        x.new_empty(m, PAGE * table.shape[1]),
        bits,
        x.new_empty(m, n) if keep_z else unwanted(x, m, 0),
    )


@op
def multi_bwd(
    dy: Tensor,
    x: Tensor,
    base: list[Tensor],
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    table: Tensor,
    rank: Tensor,
    scale: Tensor,
    h: Tensor,
    bits: Tensor,
    z: Tensor,
    need: list[bool],
    p: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    form: str = "dense",
    block: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, a, b, bias and gain, each in its argument's dtype.

    A gradient is empty where `need` is False. Rows of a and b that no slot of `slots` uses have
    gradient 0. No page may belong to two slots.
    """
    m, k = x.shape
    n = b.shape[1]
    expect_multi(
        x, base, a, b, slots, table, rank, scale, p, bias, gain, form, block, True
    )
    expect("multi", "dy", dy, (m, n), x.dtype)
    expect("multi", "h", h, (m, PAGE * table.shape[1]), x.dtype)
    expect("multi", "bits", bits, (m, 0 if p is None else mask_bytes(k)), torch.uint8)
    expect("multi", "z", z, (m, n if need[4] else 0), x.dtype)
    plain = torch.contiguous_format
    return tuple(
        torch.empty_like(t, memory_format=plain) if wanted else unwanted(x, 0)
        for t, wanted in zip((x, a, b, bias, gain), need, strict=True)
    )


@op
def multi_gemv(
    x: Tensor,
    base: list[Tensor],
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    table: Tensor,
    rank: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    form: str = "dense",
    block: int = 0,
) -> Tensor:
    """multi_fwd for few rows, without dropout: only y (m, n), in one pass over the base."""
    route = slots, table, rank, scale
    expect_multi(x, base, a, b, *route, None, bias, gain, form, block)
    return x.new_empty(x.shape[0], b.shape[1])


@op
def multi_add_(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    table: Tensor,
    rank: Tensor,
    scale: Tensor,
    widths: Tensor,
) -> None:
    """y_i += scale[j, s] · (x_i·a[j, s]ᵀ)·b[s]ᵀ in the columns of each part j, with s = slots[i]

    It is for engines that have made the base's product. Layers that share x, such as q, k and v,
    are parts: part j has the next widths[j] columns. It has no gradients.

    y (m, ≥ n) · x (m, k) · a (parts, R, k) · b (R, n) · slots (m,) · table (S, P) ·
    rank (parts, S) · scale (parts, S) · widths (parts,), at most n together
    """
    parts, rows, _ = a.shape
    m, k = x.shape
    n = b.shape[1]
    slot_count, pages = table.shape
    dtype = x.dtype
    wide = wide_dtype(dtype)
    if rows % PAGE:
        raise ValueError(f"multi: a must have whole pages of {PAGE} rows, got {rows}")
    expect("multi", "y", y, (m, max(n, y.shape[-1])), dtype)
    expect("multi", "a", a, (parts, rows, k), dtype, wide)
    expect("multi", "b", b, (rows, n), dtype, wide)
    expect("multi", "slots", slots, (m,), torch.int32)
    expect("multi", "table", table, (slot_count, pages), torch.int32)
    expect("multi", "rank", rank, (parts, slot_count), torch.int32)
    expect("multi", "scale", scale, (parts, slot_count), wide)
    expect("multi", "widths", widths, (parts,), torch.int32)


def expect_multi(
    x,
    base,
    a,
    b,
    slots,
    table,
    rank,
    scale,
    p=None,
    bias=None,
    gain=None,
    form="dense",
    block=0,
    gradient=False,
):
    """Raises for the first argument of an op that is not as the contract says.

    gradient: only gradients are asked for, so that base may be empty if its form is "given".
    """
    rows, n = b.shape
    expect_product("multi", x, base, n, form, block, gradient)
    m, k = x.shape
    slot_count, pages = table.shape
    dtype = x.dtype
    wide = wide_dtype(dtype)
    if rows % PAGE:
        raise ValueError(f"multi: b must have whole pages of {PAGE} rows, got {rows}")
    expect("multi", "a", a, (rows, k), dtype, wide)
    expect("multi", "b", b, (rows, n), dtype, wide)
    expect("multi", "slots", slots, (m,), torch.int32)
    expect("multi", "table", table, (slot_count, pages), torch.int32)
    expect("multi", "rank", rank, (slot_count,), torch.int32)
    expect("multi", "scale", scale, (slot_count,), wide)
    expect("multi", "p", p, (slot_count,), wide)
    expect("multi", "bias", bias, (n,), dtype, wide)
    expect("multi", "gain", gain, (slot_count, n), wide)
