"""Merging adapters into a weight, rounded once, and what brings the weight back bit by bit."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._arguments import dtype_or_none, explained
from .lora_base import Base, weight_fault
from .merge_contract import (  # noqa: F401  testing/law.py gets a row's ops from the row's own file
    merge_add,
    merge_undo,
)
from .nf4 import NF4Weight

PART = 8 << 20  # bytes of a slice of a weight in fp64
Factors = Sequence[tuple[Tensor, Tensor, float]]


class Delta(NamedTuple):
    """What adapters add to a weight, as merge_add and merge_undo take it.

    Attributes:
        a: (R, k), the lora_A of all adapters one below the other.
        b: (n, R), their lora_B side by side.
        scale: (adapters,) fp64.
        ranks: (adapters,) int32.
        gain: (adapters, n) fp64, or None.
    """

    a: Tensor
    b: Tensor
    scale: Tensor
    ranks: Tensor
    gain: Tensor | None

    def to(self, device: torch.device) -> "Delta":
        """The same on another device."""
        return Delta(*(t if t is None else t.to(device) for t in self))

    def joined(self, other: "Delta") -> "Delta":
        """What these adapters add, and then the other's."""
        a = [self.a, other.a]
        b = [self.b, other.b]
        if self.a.dtype is not other.a.dtype:
            a = [t.float() for t in a]
            b = [t.float() for t in b]
        gain = None
        if self.gain is not None or other.gain is not None:
            gain = torch.cat([self.gains(), other.gains()])
        return Delta(
            torch.cat(a),
            torch.cat(b, 1),
            torch.cat([self.scale, other.scale]),
            torch.cat([self.ranks, other.ranks]),
            gain,
        )

    def gains(self) -> Tensor:
        """The gains, which are 1 where there are none."""
        if self.gain is not None:
            return self.gain
        return self.scale.new_ones(len(self.scale), len(self.b))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self if t is not None)


def factors_fault(value: object) -> str | None:
    """What factors must be, or None if they are that; a check for @explained."""
    wanted = "a sequence of (lora_A, lora_B, scaling)"
    if not isinstance(value, Sequence):
        return wanted
    for item in value:
        if not isinstance(item, tuple) or len(item) != 3:
            return wanted
        if not isinstance(item[0], Tensor) or not isinstance(item[1], Tensor):
            return wanted
    return None


@explained("merge", weight=weight_fault, factors=factors_fault, dtype=dtype_or_none)
@torch.no_grad()
def merge_lora(
    weight: Tensor | NF4Weight | Base,
    factors: Factors,
    *,
    magnitudes: Sequence[Tensor | None] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """W' = round(W + Σ scaling · B·A), with all adapters in one pass and one rounding.

    Sums are in fp64, over adapters and their ranks in order, so that every backend, device and
    number of threads gives the same bits. The error is at most half a unit in the last place and
    2⁻⁴⁰ · (|W| + Σ |scaling · B·A|). DoRA's adapters multiply what is there when their turn comes:
    W ← g ⊙ (W + scaling · B·A) with g = magnitude / ‖W₀ + scaling · B·A‖ in fp64, where W₀ is
    the weight without any adapter.

    Args:
        weight: (n, k): a tensor, an NF4Weight, or a Base; it is not changed.
        factors: of each adapter (lora_A (r, k), lora_B (n, r), scaling).
        magnitudes: of each adapter its magnitude (n,), or None for LoRA.
        dtype: of the result: fp32, bf16 or fp16; by default the weight's.

    Returns:
        W' (n, k), laid out in memory as the weight is.

    Raises:
        ValueError: for shapes.
        TypeError: for dtypes.

    Source: Hu et al., LoRA, arXiv 2106.09685, section 4.1; Liu et al., DoRA, arXiv 2402.09353.
    """
    base = Base.of(weight.detach() if isinstance(weight, Tensor) else weight)
    delta = delta_of(base, factors, magnitudes)
    if dtype is None:
        dtype = weight.dtype if base.form == "nf4" else base.tensors[0].dtype
    merged, _ = add(base, delta, dtype)
    return merged.T if base.form == "transposed" else merged


def delta_of(
    base: Base,
    factors: Factors,
    magnitudes: Sequence[Tensor | None] | None,
) -> Delta:
    """The Delta of these adapters. It shares no memory with them, so they may change."""
    device = base.tensors[0].device
    if not factors:
        raise ValueError("merge: factors must hold an adapter, got none")
    a = [lora_A for lora_A, _, _ in factors]
    b = [lora_B for _, lora_B, _ in factors]
    expect_one_shape(a, b)
    if len({t.dtype for t in (*a, *b)}) > 1:
        a = [t.float() for t in a]
        b = [t.float() for t in b]
    ranks = [len(t) for t in a]
    gain = None if magnitudes is None else gains(base, factors, magnitudes)
    scaling = [s for _, _, s in factors]
    return Delta(
        torch.cat(a),
        torch.cat(b, 1),
        torch.tensor(scaling, dtype=torch.float64, device=device),
        torch.tensor(ranks, dtype=torch.int32, device=device),
        gain,
    )


def expect_one_shape(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Raises unless the factors (r, k) and (n, r) of adapters fit each other."""
    k = a[0].shape[-1]
    n = b[0].shape[0]
    for lora_A, lora_B in zip(a, b, strict=True):
        if lora_A.dim() != 2 or lora_A.shape[1] != k:
            raise ValueError(
                f"merge: lora_A must be (r, {k}), got {tuple(lora_A.shape)}"
            )
        if lora_B.shape != (n, len(lora_A)):
            raise ValueError(
                f"merge: lora_B must be {(n, len(lora_A))}, got {tuple(lora_B.shape)}"
            )


def gains(
    base: Base,
    factors: Factors,
    magnitudes: Sequence[Tensor | None],
) -> Tensor | None:
    """magnitude / ‖W + scaling · B·A‖ of each adapter, in fp64 (adapters, n); 1 for LoRA.

    A row of zeros has gain 0. None where no adapter has a magnitude.
    """
    n = factors[0][1].shape[0]
    if len(magnitudes) != len(factors):
        raise ValueError(
            f"merge: magnitudes must be {len(factors)}, got {len(magnitudes)}"
        )
    if all(magnitude is None for magnitude in magnitudes):
        return None
    rows = []
    for (lora_A, lora_B, scaling), magnitude in zip(factors, magnitudes, strict=True):
        if magnitude is None:
            rows.append(lora_B.new_ones(n, dtype=torch.float64))
            continue
        if magnitude.shape != (n,):
            raise ValueError(
                f"merge: magnitude must be {(n,)}, got {tuple(magnitude.shape)}"
            )
        norm = weight_norm(base, lora_A, lora_B, scaling)
        rows.append(magnitude.double() / norm.masked_fill(norm == 0, float("inf")))
    return torch.stack(rows)


def weight_norm(base: Base, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W + scaling · B·A‖ of each row (n,), in fp64. It is made by slices of the weight."""
    n = lora_B.shape[0]
    a = lora_A.double()
    b = lora_B.double()
    w = dense(base, n, lora_A.shape[1])
    count = max(1, PART // (8 * max(1, a.shape[1])))
    norms = [
        torch.addmm(part.double(), rows, a, alpha=scaling).norm(dim=1)
        for part, rows in zip(w.split(count), b.split(count), strict=True)
    ]
    return torch.cat(norms)


def dense(base: Base, n: int, k: int) -> Tensor:
    """The weight (n, k) as a tensor; one in 4 bits is decoded to fp32."""
    if base.form == "nf4":
        codes, table, *scales = base.tensors
        return NF4Weight(
            codes, table, scales, (n, k), torch.float32, base.block
        ).dequantize()
    return base.tensors[0].T if base.form == "transposed" else base.tensors[0]


def add(
    base: Base, delta: Delta, dtype: torch.dtype, undo: bool = False
) -> tuple[Tensor, Tensor]:
    """What merge_add makes of a weight, laid out in memory as the weight is."""
    return merge_add(
        delta.a,
        delta.b,
        base.tensors,
        delta.scale,
        delta.ranks,
        dtype,
        delta.gain,
        form=base.form,
        block=base.block,
        undo=undo,
    )
