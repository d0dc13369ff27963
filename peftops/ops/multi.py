"""Multi-LoRA: y_i = g[s] ⊙ (x_i·Ŵᵀ + scale[s] · (drop(x_i)·A[s]ᵀ)·B[s]ᵀ) + bias, s = slots[i]"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._arguments import LARGEST, explained, tensor, tensor_or_none
from .lora_base import (
    Base,
    base_rows,
    based,
    prepared,
    rows,
    weight_fault,
    wide_dtype,
)
from .lora_formula import applied, by_formula, differentiable
from .multi_autograd import MultiLoRA, forward, plain
from .multi_contract import (  # noqa: F401  testing/law.py gets a row's ops from the row's own file
    multi_add_,
    multi_bwd,
    multi_fwd,
    multi_gemv,
)
from .multi_tables import pages_of, tensor_of
from .nf4 import NF4Weight

Numbers = float | Sequence[float]
ADAPTERS = "a list of tensors, one for each adapter"


def matrices(value: object) -> str | None:
    """What a list of adapters must be, or None if it is that; a check for @explained."""
    good = isinstance(value, (list, tuple)) and not any(map(tensor, value))
    return None if good and value else ADAPTERS


def numbers(value: object) -> str | None:
    """What scaling and dropout_p must be, or None if they are that; a check for @explained."""
    each = value if isinstance(value, (list, tuple)) else [value]
    good = all(isinstance(v, (int, float)) for v in each)
    return None if good else "a number, or a list of one for each adapter"


@explained(
    "multi",
    x=tensor,
    weight=weight_fault,
    lora_A=matrices,
    lora_B=matrices,
    slots=tensor,
    bias=tensor_or_none,
    scaling=numbers,
    dropout_p=numbers,
)
def multi_lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight | Base,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    slots: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: Numbers = 1.0,
    dropout_p: Numbers = 0.0,
    training: bool = True,
    gain: Tensor | Sequence[Tensor | None] | None = None,
) -> Tensor:
    """y_i = gain[s] ⊙ (x_i·Wᵀ + scaling[s] · (drop(x_i)·A[s]ᵀ)·B[s]ᵀ) + bias, with s = slots[i]

    Each row of x meets the adapter of its slot, or the base alone where its slot is -1. Adapters
    may have unequal ranks. Differentiable in x, bias, gain and every lora_A and lora_B; each
    adapter's gradient is that of its own rows. It rounds as lora_linear does.

    Args:
        x: (..., k), in fp32, bf16, fp16 or fp64.
        weight: (n, k), frozen: a tensor in x's dtype, an NF4Weight, or a Base.
        lora_A: of each adapter (r, k), in x's dtype or fp32.
        lora_B: of each adapter (n, r), in x's dtype or fp32.
        slots: (...), integers: which adapter a row has, from -1 to len(lora_A) - 1.
        bias: (n,), in x's dtype or fp32.
        scaling: a number, or one for each adapter.
        dropout_p: the probability with which an entry of lora_A's input is dropped, or one for each
            adapter. A seed keeps the same entries as in lora_linear.
        training: if False, nothing is dropped.
        gain: (adapters, n) fp32, or a list of (n,) with None for 1.

    Returns:
        y (..., n), in x's dtype.

    Raises:
        ValueError: for shapes, a weight that requires grad, and, on a CPU, a slot out of range.
        TypeError: for dtypes.

    Source:
        Chen et al., Punica, arXiv 2310.18547; Sheng et al., S-LoRA, arXiv 2311.03285.
    """
    if isinstance(lora_A, Tensor):
        raise TypeError(f"multi: lora_A must be {ADAPTERS}, got a tensor")
    if slots.is_floating_point():
        raise TypeError(f"multi: slots must be integers, got {slots.dtype}")
    count = len(lora_A)
    p = each_of("dropout_p", dropout_p, count) if training else (0.0,) * count
    for probability in p:
        if not 0 <= probability <= 1:
            raise ValueError(f"multi: dropout_p must be in [0, 1], got {probability}")
    scales = each_of("scaling", scaling, count)
    return mixed(
        x, weight, lora_A, lora_B, slots, bias, scales, p, gains_of(gain, count)
    )


def mixed(
    x: Tensor,
    weight: Tensor | NF4Weight | Base,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    slots: Tensor,
    bias: Tensor | None,
    scaling: tuple[float, ...],
    p: tuple[float, ...],
    gain: Tensor | None = None,
) -> Tensor:
    """multi_lora_linear for callers whose arguments are right: errors are not explained."""
    args = arguments(x, weight, lora_A, lora_B, slots, bias, scaling, p, gain)
    if by_formula():
        return plain(*args)
    if differentiable(*args[:3], *args[10:]):
        return applied(MultiLoRA, *args)
    return forward(None, *args)


def arguments(
    x,
    weight,
    lora_A,
    lora_B,
    slots,
    bias,
    scaling,
    p,
    gain,
) -> tuple:
    """The arguments of multi_autograd's forward after ctx; draws the seed of dropout."""
    x, base, _ = prepared(x, weight, lora_A[0], lora_B[0], 1.0)
    device = x.device
    wide = wide_dtype(x.dtype)
    table, rank = pages_of(ranks_of(lora_A, lora_B), device)
    if slots.dtype is not torch.int32:
        slots = slots.long().clamp(-2, LARGEST).int()
    dropped = tensor_of(p, wide, device) if any(p) else None
    return (
        x,
        bias,
        gain if gain is None or gain.dtype is wide else gain.to(wide),
        slots.flatten(),
        table,
        rank,
        tensor_of(scaling, wide, device),
        dropped,
        None if dropped is None else torch.randint(2**62, (1,), device=device),
        (base.form, base.block, len(lora_A)),
        *base.tensors,
        *lora_A,
        *lora_B,
    )


def arguments_of_stacks(
    x: Tensor,
    weight: Tensor | NF4Weight | Base,
    a: Tensor,
    b: Tensor,
    ranks: tuple[int, ...],
    slots: Tensor,
    bias: Tensor | None,
    scaling: tuple[float, ...],
    gain: Tensor | None,
) -> tuple:
    """y_alone's arguments, for callers that keep what `stacked` returns.

    Args:
        a, b: every lora_A, and every lora_B turned, one below the other.
        ranks: of the adapters.
    """
    device = x.device
    scale = tensor_of(scaling, wide_dtype(x.dtype), device)
    route = slots, *pages_of(ranks, device), scale
    return arguments_of_pages(x, weight, a, b, *route, bias, gain)


def arguments_of_pages(
    x: Tensor,
    weight: Tensor | NF4Weight | Base,
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    table: Tensor,
    rank: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
) -> tuple:
    """y_alone's arguments, for callers whose adapters lie in pages."""
    x, base = based(x, weight)
    wide = wide_dtype(x.dtype)
    form = base.form
    return (
        rows(x),
        base_rows(base.tensors, form),
        a,
        b,
        slots,
        table,
        rank,
        scale,
        bias,
        gain if gain is None or gain.dtype is wide else gain.to(wide),
        form,
        base.block,
    )


def each_of(name: str, value: Numbers, count: int) -> tuple[float, ...]:
    """A number, or a list of numbers, as one number for each adapter."""
    if isinstance(value, (int, float)):
        return (value,) * count
    if len(value) != count:
        raise ValueError(
            f"multi: {name} must be a number or {count} numbers, got {len(value)}"
        )
    return tuple(value)


def gains_of(gain, count: int) -> Tensor | None:
    """The gain as (adapters, n), or None."""
    if gain is None or isinstance(gain, Tensor):
        return gain
    if len(gain) != count:
        raise ValueError(f"multi: gain must be {count} tensors, got {len(gain)}")
    return stacked_gains(gain)


def stacked_gains(each: Sequence[Tensor | None]) -> Tensor | None:
    """The gains (n,) of all adapters as one tensor, where None is 1; None if there is none."""
    given = [gain for gain in each if gain is not None]
    if not given:
        return None
    one = torch.ones_like(given[0])
    return torch.stack([one if gain is None else gain for gain in each])


def ranks_of(lora_A, lora_B) -> tuple[int, ...]:
    """The adapters' ranks. Raises ValueError for the first adapter of another shape."""
    if len(lora_A) != len(lora_B):
        raise ValueError(
            f"multi: lora_B must be {len(lora_A)} tensors, got {len(lora_B)}"
        )
    k = lora_A[0].shape[-1]
    n = lora_B[0].shape[0]
    ranks = []
    for at, (a, b) in enumerate(zip(lora_A, lora_B, strict=True)):
        if a.dim() != 2 or a.shape[1] != k:
            raise ValueError(
                f"multi: lora_A[{at}] must be (r, {k}), got {tuple(a.shape)}"
            )
        rank = a.shape[0]
        if b.shape != (n, rank):
            raise ValueError(
                f"multi: lora_B[{at}] must be {(n, rank)}, got {tuple(b.shape)}"
            )
        ranks.append(rank)
    return tuple(ranks)
