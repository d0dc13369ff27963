"""The frozen layer below an adapter: how a call reads its weight, and when it may."""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import Base
from .nf4 import LinearNF4

PLAIN = nn.Parameter, Tensor  # the exact types that our kernels may read


class Operands(NamedTuple):
    """What a call reads of its base layer.

    Attributes:
        x: the input in the dtype of the product.
        weight: (n, k), as lora_linear takes it.
        bias: (n,) or None.
        cast: the dtype of the result, or None for that of the product.
    """

    x: Tensor
    weight: Tensor | Base
    bias: Tensor | None
    cast: torch.dtype | None


def operands_of(base: Any, x: Tensor) -> Operands:
    """What a call with x reads of nn.Linear, LinearNF4 or transformers' Conv1D."""
    if isinstance(base, LinearNF4):
        cast = None if base.compute_dtype is None else x.dtype
        x = x.to(base.computes(x))
        return Operands(x, base.base(x.dtype), base.bias_for(x.dtype), cast)
    return Operands(x, dense_weight(base), base.bias, None)


def dense_weight(base: Any) -> Tensor:
    """The weight (n, k) of nn.Linear or Conv1D."""
    return base.weight if isinstance(base, nn.Linear) else base.weight.T


def is_conv1d(layer: object) -> bool:
    """Whether this is transformers' Conv1D, whose weight is (k, n)."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and type(layer) is transformers.Conv1D


def readable(base: nn.Module) -> bool:
    """Whether a call may read the weight in the place of calling the layer.

    Not where another class, hooks, or a weight of another type make more of it than x·Wᵀ + bias.
    """
    known = type(base) is nn.Linear or type(base) is LinearNF4 or is_conv1d(base)
    if not known or type(base._parameters.get("weight")) not in PLAIN:
        return False
    return not hooked(base)


def hooked(module: object) -> object:
    """Whether the module has hooks or a forward of its own: fused layers do not call it."""
    state = module.__dict__
    return (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def features_of(base: Any) -> tuple[int, int]:
    """(k, n) of a linear layer of any class."""
    if is_conv1d(base):
        k, n = base.weight.shape
        return k, n
    return base.in_features, base.out_features


def weight_of(base: Any) -> tuple[Tensor | Base, torch.dtype]:
    """The weight of a readable layer, and the dtype in which it computes."""
    if isinstance(base, LinearNF4):
        dtype = base.compute_dtype or base.weight_dtype
        return base.base(dtype), dtype
    weight = dense_weight(base)
    return weight, weight.dtype
