"""Whether a call of a PEFT layer runs fused, and with what. Nothing here changes a layer.

Where the base layer is one that we know, its product is part of our operation. Where only the
layer itself can compute it (another quantizer's, a subclass, one with hooks), it is called as PEFT
calls it, and our operation adds the low-rank update.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from ... import backends
from ...functional import Base
from ...nn.lora import biases
from ...ops.lora_formula import exporting, transformed
from .foundation import (
    HOOKED,
    PLAIN,
    Fallback,
    Foundation,
    foundation_of,
    hooked,
    parameter,
)

DTYPES = torch.float32, torch.bfloat16, torch.float16

# In PEFT, x·Aᵀ is fp32 here, and it may be too large for fp16.
FP16 = "fp32 adapters over fp16 outside autocast"

# (op, device type) -> whether it has kernels; filled by calls, since asking wakes CUDA
ACCELERATED: dict[tuple[str, str], bool] = {}


@final
class Plan(NamedTuple):
    """The arguments of lora_linear for one call of a layer.

    Attributes:
        weight: (n, k) or a Base. None: only the base layer computes its product, see `own`.
        a: lora_A's weight (r, k).
        b: lora_B's weight (n, r).
        bias: (n,), the base's and lora_B's together.
        scaling: lora_alpha / r, or what the layer has in its place.
        dropout_p: 0 where the layer does not train.
        cast: the dtype that the result is cast to. None: it stays in x's dtype.
        dora: the adapter whose magnitude scales the rows. None: plain LoRA.
        widen: x is cast to fp32 first, since the 4-bit base computes in it.
        own: why the base layer is called for its product. None: it is not.
    """

    weight: Tensor | Base | None
    a: Tensor
    b: Tensor
    bias: Tensor | None
    scaling: float
    dropout_p: float
    cast: torch.dtype | None
    dora: str | None
    widen: bool
    own: str | None

    def operand(self) -> tuple:
        """One weight of lora_mlp."""
        return self.weight, self.a, self.b, self.bias, self.scaling, self.dropout_p


NO_ADAPTER = Fallback("no active adapter")


def plan(layer: object, x: Tensor) -> Plan | Fallback:
    """The Plan for layer(x), or a Fallback where our operation would not give what PEFT gives.

    x: (..., k), whose values are not read. Everything may change between two calls, so every call
    looks. Modules are read where nn.Module keeps them: its __getattr__ would double the cost.
    """
    state = layer.__dict__
    if state["_disable_adapters"]:
        return Fallback("adapters disabled")
    if state["merged_adapters"]:
        return Fallback("merged")
    name = state["_active_adapter"]
    if type(name) is not str:
        adapters = state["_modules"]["lora_A"].__dict__["_modules"]
        names = [name for name in name if name in adapters]
        if len(names) > 1:
            return plan_several(layer, x, names)
        if not names:
            return NO_ADAPTER
        name = names[0]
    return plan_one(layer, x, name)


def plan_one(layer: object, x: Tensor, name: str) -> Plan | Fallback:
    """The Plan for layer(x) with this adapter alone, or a Fallback."""
    state = layer.__dict__
    modules = state["_modules"]
    adapters = modules["lora_A"].__dict__["_modules"]
    if name not in adapters:
        return NO_ADAPTER
    dora = None
    if name in state["lora_variant"]:
        variant = type(state["lora_variant"][name])
        if variant is not DoraLinearVariant:
            return Fallback(f"variant {variant.__name__}")
        dora = name
    base = modules["base_layer"]
    lora_a = adapters[name]
    lora_b = modules["lora_B"].__dict__["_modules"][name]
    dropout = modules["lora_dropout"].__dict__["_modules"][name]
    foundation = HOOKED if hooked(base) else foundation_of(base, x)
    reason = modules_misfit(lora_a, lora_b, dropout)
    if reason:
        return Fallback(reason)
    a = parameter(lora_a, "weight")
    b = parameter(lora_b, "weight")
    b_bias = parameter(lora_b, "bias")
    reason = misfit(x, foundation, a, b, b_bias, dora is not None)
    if reason:
        return Fallback(reason)
    if not state.get("cast_input_dtype_enabled", True) and a.dtype is not x.dtype:
        return Fallback("input casting disabled")
    scaling = state["scaling"][name]
    if type(scaling) is not float and type(scaling) is not int:
        return Fallback("scaling is not a number")
    if dora is not None:
        magnitude = modules["lora_magnitude_vector"].__dict__["_modules"][dora]
        reason = dora_misfit(x, foundation, b_bias, magnitude)
        if reason:
            return Fallback(reason)
    weight, _, computes, bias, cast, own = foundation
    if b_bias is not None:
        bias = biases(bias, b_bias, scaling)
    widen = computes is torch.float32 and x.dtype is not computes
    if widen and torch.is_autocast_enabled(x.device.type):
        widen = False
    if widen and bias is not None:
        bias = bias.float()
    dropout_p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    return Plan(weight, a, b, bias, scaling, dropout_p, cast, dora, widen, own)


def plan_several(layer: Any, x: Tensor, names: Sequence[str]) -> Plan | Fallback:
    """The Plan for layer(x) with several active adapters: one adapter of all their ranks.

    Where their scalings differ, each is multiplied into its lora_B, in fp32.
    """
    plans = []
    for name in names:
        call = plan_one(layer, x, name)
        if type(call) is Fallback:
            return call
        if call.dora is not None:
            return Fallback("DoRA among several active adapters")
        if call.dropout_p:
            return Fallback("dropout of several active adapters")
        plans.append(call)
    first = plans[0]
    bias = first.bias
    for name, call in zip(names[1:], plans[1:], strict=True):
        b_bias = parameter(layer.lora_B[name], "bias")
        if b_bias is not None:
            bias = biases(bias, b_bias, call.scaling)
    scaling = first.scaling
    b = [call.b for call in plans]
    if any(call.scaling != scaling for call in plans):
        b = [call.b.float() * call.scaling for call in plans]
        scaling = 1.0
    a = torch.cat([call.a for call in plans])
    return first._replace(a=a, b=torch.cat(b, 1), bias=bias, scaling=scaling)


def modules_misfit(
    lora_a: nn.Module, lora_b: nn.Module, dropout: nn.Module
) -> str | None:
    """Why the adapter's modules do something else than multiply and drop, or None."""
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        return "adapter layer is not nn.Linear"
    if type(dropout) is not nn.Identity and (
        type(dropout) is not nn.Dropout or dropout.inplace
    ):
        return f"dropout is {dropout}"
    if _has_any_global_hook() or hooked(lora_a) or hooked(lora_b) or hooked(dropout):
        return "hooks on a part"
    return None


def misfit(
    x: Tensor,
    foundation: Foundation,
    a: Tensor,
    b: Tensor,
    b_bias: Tensor | None,
    dora: bool,
) -> str | None:
    """Why lora_linear would not compute what PEFT does with these tensors, or None.

    dora: whether the adapter is DoRA's.
    """
    held, bias = foundation.held, foundation.bias
    if type(a) not in PLAIN or type(b) not in PLAIN or type(x) not in PLAIN:
        return "a tensor is not plain"
    if (bias is not None and type(bias) not in PLAIN) or (
        b_bias is not None and type(b_bias) not in PLAIN
    ):
        return "a tensor is not plain"
    if hasattr(held, "ds_id") or hasattr(a, "ds_id"):
        return "ZeRO-3"
    # An export runs by PEFT's own code, DoRA's apart, which dynamo cannot follow.
    if transformed() or torch._C._get_tracing_state() or (exporting() and not dora):
        return "torch.func, forward-mode AD, tracing or export"
    device = x.device
    if held is not None:
        if held.requires_grad:
            return "base weight is trained"
        if device != held.device:
            return "tensors on different devices"
    if device != a.device or device != b.device:
        return "tensors on different devices"
    device_type = device.type  # read once, since torch makes a new text at each reading
    if not accelerated(device_type):
        return f"no kernels for {device_type}"
    return dtype_misfit(x.dtype, device_type, foundation, a, b, b_bias)


def accelerated(device_type: str, op: str = "lora_fwd") -> bool:
    """Whether there are kernels of this op for this type of device.

    True while dynamo traces, unless a call before has found that there are none.
    """
    key = op, device_type
    if key not in ACCELERATED and not is_compiling():
        cell = backends.choose(op, None, device_type, False)
        ACCELERATED[key] = "reference" not in cell.__module__
    return ACCELERATED.get(key, True) or exporting()


def dtype_misfit(
    given: torch.dtype,
    device_type: str,
    foundation: Foundation,
    a: Tensor,
    b: Tensor,
    b_bias: Tensor | None,
) -> str | None:
    """Why lora_linear would not round as PEFT does for these dtypes, or None.

    given: the dtype of x.
    """
    held = foundation.held
    computes = foundation.computes
    bias = foundation.bias
    if given not in DTYPES or (computes is not None and computes not in DTYPES):
        return "dtype of x or of the base weight"
    dtype = given
    adapter = a.dtype
    in_4_bits = held is not None and held.dtype is torch.uint8
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        if in_4_bits and not {given, computes} <= {dtype, torch.float32, None}:
            return "compute_dtype or x is not of autocast's dtype"
    elif computes is not None and dtype is not computes:
        # A 4-bit base that computes in fp32 widens x.
        if not in_4_bits or computes is not torch.float32 or adapter is not computes:
            return "x is not of the base weight's dtype"
    elif dtype is torch.float16 and adapter is torch.float32:
        return FP16
    narrow = dtype, torch.float32
    if adapter is not b.dtype or adapter not in narrow:
        return "dtype of the adapter"
    if bias is not None and bias.dtype not in narrow:
        return "dtype of a bias"
    if b_bias is not None and b_bias.dtype not in narrow:
        return "dtype of a bias"
    return None


def dora_misfit(
    x: Tensor, foundation: Foundation, b_bias: Tensor | None, magnitude: nn.Module
) -> str | None:
    """Why dora_linear would not compute what PEFT does, or None."""
    if foundation.own is not None:
        return "DoRA over a base that only its layer computes"
    if b_bias is not None or hooked(magnitude):
        return "DoRA with a bias or hooks of its own"
    length = parameter(magnitude, "weight")
    if type(length) not in PLAIN or length.device != x.device:
        return "a tensor is not plain"
    return None
