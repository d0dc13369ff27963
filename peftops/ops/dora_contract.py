"""DoRA's contracts: what each op takes and returns, and the checks of its arguments."""

import torch
from torch import Tensor

from .._arguments import expect
from .._op import op
from .lora_base import DTYPES, mask_bytes
from .lora_contract import expect_lora, expect_probability


@op
def dora_norm(
    x: Tensor,
    base: list[Tensor],
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    form: str = "dense",
    block: int = 0,
) -> Tensor:
    """n = ‖Ŵ + s·b·a‖ of each row

    x (any, k), of which only the dtype is used · base · a (r, k) · b (n, r)
    ->  n (n,), in scale's dtype

    Ŵ, a and b are rounded to x's dtype, as in the product that the norm is for.
    """
    expect_delta(x, base, a, b, scale, form, block)
    return scale.new_empty(b.shape[0])


@op
def dora_norm_bwd(
    dn: Tensor,
    n: Tensor,
    x: Tensor,
    base: list[Tensor],
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    need: list[bool],
    form: str = "dense",
    block: int = 0,
) -> tuple[Tensor, Tensor]:
    """The gradients of a and b, each in its argument's dtype; empty where `need` is False.

    Rows whose n is 0 or inf have no gradient. With c = dn / n, c ⊙ b is rounded to x's dtype before
    it is multiplied by Ŵ.
    """
    expect_delta(x, base, a, b, scale, form, block)
    expect("dora", "dn", dn, b.shape[:1], scale.dtype)
    expect("dora", "n", n, b.shape[:1], scale.dtype)
    return tuple(
        torch.empty_like(t) if wanted else x.new_empty(0)
        for t, wanted in zip((a, b), need, strict=True)
    )


@op
def dora_drop(x: Tensor, seed: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """dropped = drop(x) and rest = x - drop(x), with the bits that lora_fwd draws

    x (m, k)  ->  dropped (m, k) · rest (m, k) · bits (m, 4⌈k/32⌉)
    """
    expect("dora", "x", x, x.shape, *DTYPES)
    expect("dora", "seed", seed, (1,), torch.int64)
    expect_probability(p)
    m, k = x.shape
    return (
        torch.empty_like(x),
        torch.empty_like(x),
        x.new_empty(m, mask_bytes(k), dtype=torch.uint8),
    )


@op
def dora_mix(u: Tensor, v: Tensor | None, bits: Tensor, p: float) -> Tensor:
    """drop(u) + v - drop(v) (m, k), where drop keeps what bits say; without v, drop(u)."""
    m, k = u.shape
    expect("dora", "u", u, (m, k), *DTYPES)
    expect("dora", "v", v, (m, k), u.dtype)
    expect("dora", "bits", bits, (m, mask_bytes(k)), torch.uint8)
    expect_probability(p)
    return torch.empty_like(u)


def expect_delta(
    x,
    base,
    a,
    b,
    scale,
    form,
    block,
):
    if form == "given" or not base:
        raise ValueError("dora: w must be given itself, got a product of it")
    expect_lora(x, base, a, b, scale, form=form, block=block)
