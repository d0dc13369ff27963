"""What a plan takes from the base layer: its weight as our operation reads it, bias and dtypes."""

from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...functional import Base
from ...nn import LinearNF4
from ...nn.base_layer import PLAIN
from ...ops.nf4_state import NESTED, scales_of, table_of


@final
class Fallback(NamedTuple):
    """Why a call has to be PEFT's own."""

    reason: str


class Foundation(NamedTuple):
    """What a plan takes from the base layer.

    Attributes:
        weight: as lora_linear takes it.
        held: the parameter, for checks of device and requires_grad.
        computes: the dtype that the layer computes in. None: x's.
        bias: (n,) or None.
        cast: the dtype that the layer casts its result to. None: it casts nothing.
        own: why only the layer computes its product. All else is None then.
    """

    weight: Tensor | Base | None = None
    held: Tensor | None = None
    computes: torch.dtype | None = None
    bias: Tensor | None = None
    cast: torch.dtype | None = None
    own: str | None = None


HOOKED = Foundation(own="hooks on the base layer")


def foundation_of(base: Any, x: Tensor) -> Foundation:
    """The Foundation of a base layer without hooks, for this x."""
    base_class = type(base)
    weight = parameter(base, "weight")
    bias = parameter(base, "bias")
    if base_class.__module__.startswith("bitsandbytes."):
        codes_and_base = packed(base, weight)
        if type(codes_and_base) is Fallback:
            return Foundation(own=codes_and_base.reason)
        held, weight = codes_and_base
        computes = base.compute_dtype
        cast: torch.dtype | None = x.dtype
    elif (
        base_class is not nn.Linear
        and base_class is not Conv1D
        and base_class is not LinearNF4
    ):
        return Foundation(own=f"base layer is {base_class.__name__}")
    elif type(weight) not in PLAIN:
        return Foundation(own=f"base weight is {type(weight).__name__}")
    elif base_class is LinearNF4:
        held, weight = weight, base.base()
        computes = base.compute_dtype
        cast = None if computes is None else x.dtype
    else:
        dense = weight if base_class is nn.Linear else weight.T
        return Foundation(dense, weight, weight.dtype, bias)
    if bias is not None and bias.dtype is not x.dtype:
        bias = bias.float()  # as these layers do
    return Foundation(weight, held, computes, bias, cast)


def packed(base: Any, weight: Any) -> tuple[Tensor, Base] | Fallback:
    """(codes, Base) of a bitsandbytes layer, whose bytes are read where they lie, or a Fallback."""
    state = getattr(weight, "quant_state", None)
    if type(base).__name__ not in ("Linear4bit", "LinearNF4", "LinearFP4"):
        return Fallback(f"base layer is {type(base).__name__}")
    if state is None:
        return Fallback("base weight is not quantized yet")
    if getattr(state, "packing_format_for_cpu", False):
        return Fallback("base weight is repacked for inference on a CPU")
    if tuple(state.shape) != (base.out_features, base.in_features):
        return Fallback("base weight is transposed")
    if state.nested and (
        state.state2.blocksize != NESTED or state.state2.dtype is not torch.float32
    ):
        return Fallback("scales of the base weight")
    with torch._C.DisableTorchFunctionSubclass():
        codes = weight.detach().view(torch.uint8)
    if type(codes) is not torch.Tensor:
        return Fallback("a tensor is not plain")
    return codes, Base(
        "nf4", [codes, table_of(state), *scales_of(state)], state.blocksize
    )


def parameter(module: Any, name: str) -> Any:
    """module.name, read where nn.Module keeps parameters, since its __getattr__ would cost more.

    A module may also hold it as a buffer or a plain attribute.
    """
    held = module.__dict__["_parameters"]
    return held[name] if name in held else getattr(module, name, None)


def rows_like(layer: Any) -> Tensor:
    """No rows, on the layer's device and in the dtype it computes in: an x for `plan` to judge."""
    weight = parameter(layer.get_base_layer(), "weight")
    if not isinstance(weight, torch.Tensor):
        weight = next(layer.lora_A.parameters(), torch.empty(0))
    return torch.empty(0, dtype=dtype_of(layer), device=weight.device)


def dtype_of(layer: Any) -> torch.dtype:
    """The dtype that the layer's base computes in, or the adapter's where the base has none."""
    base = layer.get_base_layer()
    weight = parameter(base, "weight")
    state = getattr(weight, "quant_state", None)
    dtype = (
        getattr(base, "compute_dtype", None)
        or getattr(base, "weight_dtype", None)
        or getattr(state, "dtype", None)
        or getattr(weight, "dtype", None)
    )
    if (
        isinstance(dtype, torch.dtype)
        and dtype.is_floating_point
        and dtype.itemsize > 1
    ):
        return dtype
    return next(layer.lora_A.parameters(), torch.empty(0)).dtype
