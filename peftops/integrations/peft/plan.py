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
from ...nn.base_layer import PLAIN, hooked
from ...nn.lora import biases
from ...ops.lora_formula import exporting, transformed
from .foundation import (
    HOOKED,
    Fallback,
    Foundation,
    foundation_of,
    parameter,
)

DTYPES = torch.float32, torch.bfloat16, torch.float16

# The dtypes of adapters over fp16 outside autocast, and why they may not be fp32: in PEFT, x·Aᵀ is
# fp32 then, and it may be too large for fp16.
HALF_ALONE = (torch.float16,)
FP16 = "fp32 adapters over fp16 outside autocast"
NO_KERNELS: tuple[torch.dtype, ...] = ()
TRACED = Fallback("torch.func, forward-mode AD, tracing or export")

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


def plan_one(
    layer: object,
    x: Tensor,
    name: str,
) -> Plan | Fallback:
    """The Plan for layer(x) with this adapter alone, or a Fallback."""
    if name not in layer.__dict__["_modules"]["lora_A"].__dict__["_modules"]:
        return NO_ADAPTER
    ground = ground_of(layer, x)
    return ground if type(ground) is Fallback else plan_on(ground, layer, x, name)


class Ground(NamedTuple):
    """What all adapters of a layer stand on in one call.

    Attributes:
        foundation: what the base layer gives.
        dtypes: those that an adapter may have, none where the device has no kernels.
        widen: see Plan.
    """

    foundation: Foundation
    dtypes: tuple[torch.dtype, ...]
    widen: bool


def ground_of(layer: object, x: Tensor) -> Ground | Fallback:
    """The Ground of a layer's adapters for this x, or why none of them runs fused."""
    base = layer.__dict__["_modules"]["base_layer"]
    foundation = HOOKED if hooked(base) else foundation_of(base, x)
    held = foundation.held
    bias = foundation.bias
    if type(x) not in PLAIN or (bias is not None and type(bias) not in PLAIN):
        return Fallback("a tensor is not plain")
    if transformed() or torch._C._get_tracing_state():
        return TRACED
    device = x.device
    if held is not None:
        if hasattr(held, "ds_id"):
            return Fallback("ZeRO-3")
        if held.requires_grad:
            return Fallback("base weight is trained")
        if device != held.device:
            return Fallback("tensors on different devices")
    device_type = device.type  # read once, since torch makes a new text at each reading
    if not accelerated(device_type):
        return Ground(foundation, NO_KERNELS, False)
    return ground_in(x.dtype, device_type, foundation)


def ground_in(
    given: torch.dtype, device_type: str, foundation: Foundation
) -> Ground | Fallback:
    """The Ground for an x of this dtype, or why lora_linear would not round as PEFT does."""
    computes = foundation.computes
    bias = foundation.bias
    if given not in DTYPES or (computes is not None and computes not in DTYPES):
        return Fallback("dtype of x or of the base weight")
    held = foundation.held
    in_4_bits = held is not None and held.dtype is torch.uint8
    dtypes: tuple[torch.dtype, ...] = given, torch.float32
    widen = False
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        dtypes = dtype, torch.float32
        if in_4_bits and not {given, computes} <= {*dtypes, None}:
            return Fallback("compute_dtype or x is not of autocast's dtype")
    elif computes is not None and given is not computes:
        # A 4-bit base that computes in fp32 widens x.
        if not in_4_bits or computes is not torch.float32:
            return Fallback("x is not of the base weight's dtype")
        dtypes = (torch.float32,)
        widen = True
    elif given is torch.float16:
        dtypes = HALF_ALONE
    if (
        bias is not None
        and bias.dtype is not torch.float32
        and bias.dtype not in dtypes
    ):
        return Fallback("dtype of a bias")
    return Ground(foundation, dtypes, widen)


def plan_on(
    ground: Ground,
    layer: object,
    x: Tensor,
    name: str,
) -> Plan | Fallback:
    """The Plan for layer(x) with an adapter that it has, or a Fallback."""
    state = layer.__dict__
    modules = state["_modules"]
    dora = None
    if name in state["lora_variant"]:
        variant = type(state["lora_variant"][name])
        if variant is not DoraLinearVariant:
            return Fallback(f"variant {variant.__name__}")
        dora = name
    lora_a = modules["lora_A"].__dict__["_modules"][name]
    lora_b = modules["lora_B"].__dict__["_modules"][name]
    dropout = modules["lora_dropout"].__dict__["_modules"][name]
    reason = modules_misfit(lora_a, lora_b, dropout)
    if reason:
        return Fallback(reason)
    a = parameter(lora_a, "weight")
    b = parameter(lora_b, "weight")
    b_bias = parameter(lora_b, "bias")
    reason = misfit(x, ground.dtypes, a, b, b_bias, dora is not None)
    if reason:
        return Fallback(reason)
    if not state.get("cast_input_dtype_enabled", True) and a.dtype is not x.dtype:
        return Fallback("input casting disabled")
    scaling = state["scaling"][name]
    if type(scaling) is not float and type(scaling) is not int:
        return Fallback("scaling is not a number")
    if dora is not None:
        magnitude = modules["lora_magnitude_vector"].__dict__["_modules"][dora]
        reason = dora_misfit(x, ground.foundation, b_bias, magnitude)
        if reason:
            return Fallback(reason)
    foundation, _, widen = ground
    weight, _, _, bias, cast, own = foundation
    if b_bias is not None:
        bias = biases(bias, b_bias, scaling)
    if widen and bias is not None:
        bias = bias.float()
    dropout_p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    return Plan(weight, a, b, bias, scaling, dropout_p, cast, dora, widen, own)


def plan_several(
    layer: Any,
    x: Tensor,
    names: Sequence[str],
) -> Plan | Fallback:
    """The Plan for layer(x) with several active adapters: one adapter of all their ranks.

    Where their scalings differ, each is multiplied into its lora_B, in fp32.
    """
    ground = ground_of(layer, x)
    if type(ground) is Fallback:
        return ground
    plans = []
    for name in names:
        call = plan_on(ground, layer, x, name)
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
    dtypes: tuple[torch.dtype, ...],
    a: Tensor,
    b: Tensor,
    b_bias: Tensor | None,
    dora: bool,
) -> str | None:
    """Why lora_linear would not compute what PEFT does with an adapter, or None.

    Args:
        dtypes: see Ground.
        dora: whether the adapter is DoRA's.
    """
    if type(a) not in PLAIN or type(b) not in PLAIN:
        return "a tensor is not plain"
    if b_bias is not None and type(b_bias) not in PLAIN:
        return "a tensor is not plain"
    if hasattr(a, "ds_id"):
        return "ZeRO-3"
    # An export runs by PEFT's own code, DoRA's apart, which dynamo cannot follow.
    if exporting() and not dora:
        return TRACED.reason
    device = x.device
    if device != a.device or device != b.device:
        return "tensors on different devices"
    if not dtypes:
        return f"no kernels for {device.type}"
    dtype = a.dtype
    if dtypes is HALF_ALONE and dtype is torch.float32:
        return FP16
    if dtype is not b.dtype or dtype not in dtypes:
        return "dtype of the adapter"
    if b_bias is not None and b_bias.dtype not in (*dtypes, torch.float32):
        return "dtype of a bias"
    return None


def accelerated(device_type: str, op: str = "lora_fwd") -> bool:
    """Whether there are kernels of this op for this type of device.

    True while dynamo traces, unless a call before has found that there are none.
    """
    key = op, device_type
    if key not in ACCELERATED and not is_compiling():
        cell = backends.choose(op, None, device_type, False)
        ACCELERATED[key] = "reference" not in cell.__module__
    return ACCELERATED.get(key, True) or exporting()


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
