"""LoRA's contracts: what each op takes and returns, and the checks of its arguments."""

import torch
from torch import Tensor

from .._arguments import expect
from .._op import op
from .._replay import unwanted
from .lora_base import DTYPES, SHAPES, mask_bytes, wide_dtype
from .nf4 import expect_base

FEW = 64  # up to this many rows, lora_gemv's one pass over the base is faster


@op
def lora_fwd(
    x: Tensor,
    base: list[Tensor],
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    gate: Tensor | None = None,
    seed: Tensor | None = None,
    form: str = "dense",
    block: int = 0,
    p: float = 0.0,
    keep_z: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = g ⊙ z + bias with z = x·Ŵᵀ + s · (gate ⊙ h)·bᵀ and h = drop(x)·aᵀ

    x (m, k) · base · a (r, k) · b (n, r or e·r)
    ->  y (m, n) · h (m, r) · bits (m, 4⌈k/32⌉ or 0) · z (m, n or 0)
    """
    m, k = x.shape
    n = b.shape[0]
    expect_lora(x, base, a, b, scale, bias, gain, gate, form, block)
    expect("lora", "seed", seed, (1,), torch.int64)
    expect_probability(p)
    if p and seed is None:
        raise ValueError(f"lora: p must come with a seed, got {p} and None")
    if p:
        bits = x.new_empty(m, mask_bytes(k), dtype=torch.uint8)
    else:
        bits = unwanted(x, m, 0, dtype=torch.uint8)
    return (
        x.new_empty(m, n),
        x.new_empty(m, a.shape[0]),
        bits,
        x.new_empty(m, n) if keep_z else unwanted(x, m, 0),
    )


@op
def lora_bwd(
    dy: Tensor,
    x: Tensor,
    base: list[Tensor],
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    h: Tensor,
    bits: Tensor,
    z: Tensor,
    need: list[bool],
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    gate: Tensor | None = None,
    form: str = "dense",
    block: int = 0,
    p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, a, b, bias, gain and gate, each in its argument's dtype.

    A gradient is empty where `need` is False.
    """
    m, k = x.shape
    n = b.shape[0]
    expect_lora(x, base, a, b, scale, bias, gain, gate, form, block, gradient=True)
    expect("lora", "dy", dy, (m, n), x.dtype)
    expect("lora", "h", h, (m, a.shape[0]), x.dtype)
    expect("lora", "bits", bits, (m, mask_bytes(k) if p else 0), torch.uint8)
    expect("lora", "z", z, (m, n if need[4] else 0), x.dtype)
    like = (x, a, b, bias, gain, gate)
    plain = torch.contiguous_format
    return tuple(
        torch.empty_like(t, memory_format=plain) if wanted else unwanted(x, 0)
        for t, wanted in zip(like, need, strict=True)
    )


@op
def lora_gemv(
    x: Tensor,
    base: list[Tensor],
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    gate: Tensor | None = None,
    form: str = "dense",
    block: int = 0,
) -> Tensor:
    """lora_fwd for few rows, without dropout: only y (m, n), in one pass over the base."""
    expect_lora(x, base, a, b, scale, bias, gain, gate, form, block)
    return x.new_empty(x.shape[0], b.shape[0])


@op
def lora_mask(seed: Tensor, m: int, k: int, p: float) -> Tensor:
    """keep (m, k) bool: the entries of x that lora_fwd keeps for this seed."""
    expect("lora", "seed", seed, (1,), torch.int64)
    expect_probability(p)
    return seed.new_empty(m, k, dtype=torch.bool)


def expect_lora(
    x,
    base,
    a,
    b,
    scale,
    bias=None,
    gain=None,
    gate=None,
    form="dense",
    block=0,
    gradient=False,
):
    """Raises for the first argument of an op that is not as the contract says.

    A rank of 0 means no delta. gradient: only gradients are asked for, so that base may be empty
    if its form is "given".
    """
    n, columns = b.shape
    expect_product("lora", x, base, n, form, block, gradient)
    m, k = x.shape
    r = a.shape[0]
    dtype = x.dtype
    experts = 1 if gate is None else gate.shape[1]
    wide = wide_dtype(dtype)
    expect("lora", "a", a, (r, k), dtype, wide)
    expect("lora", "b", b, (n, r if columns == r else experts * r), dtype, wide)
    expect("lora", "scale", scale, (1,), wide)
    expect("lora", "bias", bias, (n,), dtype, wide)
    expect("lora", "gain", gain, (n,), wide)
    expect("lora", "gate", gate, (m, experts), wide)
    if not experts or columns % experts or (gate is not None and not columns):
        raise ValueError(
            f"lora: b must have as many columns for each of {experts} experts, got {columns}"
        )


def expect_product(
    row,
    x,
    base,
    n,
    form,
    block,
    gradient,
):
    """Raises unless x (m, k) and the base are those of a product with n columns.

    gradient: only gradients are asked for, so that base may be empty if its form is "given".
    """
    if form != "nf4" and len(base) != 1 and (form != "given" or base or not gradient):
        raise ValueError(f"{row}: w must be one tensor, got {len(base)}")
    m, k = x.shape
    expect(row, "x", x, (m, k), *DTYPES)
    if form == "nf4":
        expect_base(row, base, block, n * k, wide_dtype(x.dtype))
    elif base:
        name = "y0" if form == "given" else "w"
        expect(row, name, base[0], SHAPES[form](m, n, k), x.dtype)


def expect_probability(p):
    if isinstance(p, Tensor):
        raise TypeError(f"lora: p must be a number, got a tensor of {tuple(p.shape)}")
    if not 0 <= p <= 1:
        raise ValueError(f"lora: p must be in [0, 1], got {p}")
