"""LoRA: y = g ⊙ (x·Ŵᵀ + s · (gate ⊙ drop(x)·Aᵀ)·Bᵀ) + bias"""

from importlib import import_module

import torch
from torch import Tensor

from .. import backends
from .._arguments import explained, number, probability, size, tensor, tensor_or_none
from .lora_autograd import LoRA, forward, plain
from .lora_base import Base, no_delta, prepared, weight_fault
from .lora_contract import (  # noqa: F401  testing/law.py gets a row's ops from the row's own file
    FEW,
    lora_bwd,
    lora_fwd,
    lora_gemv,
    lora_mask,
)
from .lora_formula import applied, by_formula, differentiable
from .nf4 import NF4Weight

ADAPTER = {  # the checks of arguments that LoRA and DoRA share, for @explained
    "x": tensor,
    "weight": weight_fault,
    "lora_A": tensor,
    "lora_B": tensor,
    "bias": tensor_or_none,
    "scaling": number,
    "dropout_p": probability,
}


@explained("lora", **ADAPTER, gain=tensor_or_none, gate=tensor_or_none)
def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight | Base,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    gain: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """y = gain ⊙ (x·Wᵀ + scaling · (gate ⊙ drop(x)·Aᵀ)·Bᵀ) + bias

    Differentiable in everything but weight and scaling.

    lora_A, lora_B, drop(x)·Aᵀ and the gated product are rounded to x's dtype, and sums are fp32.
    Gradients come from fp32 sums, each in its argument's dtype. This is what PEFT computes under
    autocast; without autocast, PEFT makes an fp32 copy of x and multiplies it by fp32 adapters.

    Args:
        x: (..., k), in fp32, bf16, fp16 or fp64.
        weight: (n, k), frozen: a tensor in x's dtype, an NF4Weight, or a Base.
        lora_A: (r, k), in x's dtype or fp32. A rank r of 0 means no delta.
        lora_B: (n, r), or (n, e·r) for e experts; in x's dtype or fp32.
        bias: (n,), in x's dtype or fp32.
        scaling: a number or a (1,) fp32 tensor.
        dropout_p: the probability with which an entry of lora_A's input is dropped.
            `dropout_mask` tells which entries a seed keeps.
        training: if False, nothing is dropped.
        gain: (n,) fp32.
        gate: (..., e) fp32, a weight for each of e experts.

    Returns:
        y (..., n), in x's dtype.

    Raises:
        ValueError: for shapes, and for a weight or scaling that requires grad.
        TypeError: for dtypes.

    Source:
        Hu et al., LoRA, arXiv 2106.09685.
    """
    p = dropout_p if training else 0.0
    return linear(x, weight, lora_A, lora_B, bias, scaling, p, gain, gate)


def linear(
    x: Tensor,
    weight: Tensor | NF4Weight | Base,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
    p: float,
    gain: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """lora_linear for callers whose arguments are right: errors are not explained."""
    args = arguments(x, weight, a, b, bias, scaling, p, gain, gate)
    if by_formula():
        return plain(*args)
    if differentiable(*args[:6], *args[9:]):
        return applied(LoRA, *args)
    return forward(None, *args)


def arguments(
    x: Tensor,
    weight: Tensor | NF4Weight | Base,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
    p: float,
    gain: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple:
    """The arguments of lora_autograd's forward after ctx; draws the seed of dropout."""
    x, base, scale = prepared(x, weight, lora_A, lora_B, scaling)
    seed = torch.randint(2**62, (1,), device=x.device) if p else None
    return (
        x,
        lora_A,
        lora_B,
        bias,
        gain,
        gate,
        scale,
        seed,
        (base.form, base.block, p),
        *base.tensors,
    )


@explained("lora", x=tensor, bias=tensor_or_none)
def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """y = x·Ŵᵀ + bias, differentiable in x and bias: lora_linear without a delta.

    Args:
        x: (..., k), in fp32, bf16 or fp16.
        weight: (n, k).
        bias: (n,), in x's dtype or fp32.

    Returns:
        y (..., n), in x's dtype.

    Raises:
        ValueError: for shapes.
        TypeError: for dtypes, and for a weight that is not an NF4Weight.

    Source:
        Dettmers et al., QLoRA, arXiv 2305.14314.
    """
    if not isinstance(weight, NF4Weight):
        raise TypeError(f"lora: w must be NF4Weight, got {type(weight).__name__}")
    if len(weight.shape) != 2:
        raise ValueError(f"lora: w must be (n, k), got {tuple(weight.shape)}")
    n, k = weight.shape
    return lora_linear(x, weight, *no_delta(k, n, x.dtype, x.device), bias)


def served_by(
    x: Tensor, m: int, n: int, k: int, r: int, p: float = 0.0, form: str = "dense"
) -> tuple[str, str, str]:
    """What serves lora_linear for m rows of x's dtype and device.

    Returns:
        The op, the backend, and the backend's name for the product it uses, which may be empty.
    """
    op = "lora_gemv" if m <= FEW and not p else "lora_fwd"
    name = backends.find(op, x).__module__.split(".")[1]
    describe = getattr(import_module(f"peftops.{name}.lora"), "describe", None)
    product = describe(op, x, m, n, k, r, form) if describe else ""
    return op, name, product


@explained("lora", seed=tensor, m=size, k=size, p=probability)
def dropout_mask(seed: Tensor, m: int, k: int, p: float) -> Tensor:
    """keep (m, k) bool: the entries of x that lora_linear keeps; drop(x) = keep ⊙ x / (1 - p).

    Args:
        seed: (1,) int64.
        m: rows of x.
        k: columns of x.
        p: the probability with which an entry is dropped.

    Raises:
        ValueError: for the shape of seed and a p outside of [0, 1].
        TypeError: for dtypes.
    """
    return lora_mask(seed, m, k, p)
