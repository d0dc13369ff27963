"""One call of a patched layer: what it runs with, and its result, fused or PEFT's own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...functional import Base
from ...ops.dora import linear_of_gain
from ...ops.lora import linear
from ...ops.multi import mixed, mixed_of_stacks, stacked_gains
from .foundation import Fallback
from .mixed import STACKS, MixedPlan, plan_mixed, stack_of
from .plan import Plan, plan

EXTRA = Fallback("extra arguments")


def plan_call(
    layer: Any, x: Tensor, args: tuple, kwargs: dict
) -> Plan | MixedPlan | Fallback:
    """What a call of a layer runs with."""
    if not args and not kwargs:
        return plan(layer, x)
    names = kwargs.get("adapter_names")
    if args or len(kwargs) > 1 or names is None:
        return EXTRA
    return plan_mixed(layer, x, names)


def stock_forward(layer: Any, stock: Any, x: Tensor, args: tuple, kwargs: dict) -> Any:
    """PEFT's forward. It refuses DoRA in mixed batches, which its parts compute."""
    names = kwargs.get("adapter_names")
    if names is None or layer.disable_adapters or layer.merged or len(names) != len(x):
        return stock.forward(layer, x, *args, **kwargs)
    if any(layer.use_dora.get(name, False) for name in names):
        return stock._mixed_batch_forward(layer, x, *args, **kwargs)
    return stock.forward(layer, x, *args, **kwargs)


def fused(layer: Any, layer_class: Any, x: Tensor, call: Plan) -> Tensor:
    """The result of a call with one adapter."""
    weight: Any
    weight, a, b, bias, scaling, dropout_p, cast, dora, widen, own = call
    if widen:
        x = x.float()
    if own is not None:

        def update(x, base, wide):
            if wide:
                return linear(x, base, a.float(), b.float(), bias, scaling, dropout_p)
            return linear(x, base, a, b, bias, scaling, dropout_p)

        return on_top(layer, layer_class.widens, x, update)
    if dora is None:
        y = linear(x, weight, a, b, bias, scaling, dropout_p)
    else:
        gain = layer_class.gain(layer, layer_class, dora, x, weight, a, b, scaling)
        y = linear_of_gain(
            x,
            weight,
            a,
            b,
            gain,
            bias,
            scaling=scaling,
            dropout_p=dropout_p,
        )
    return y if cast is None else y.to(cast)


def fused_mixed(layer: Any, layer_class: Any, x: Tensor, call: MixedPlan) -> Tensor:
    """The result of a call whose samples have several adapters."""
    first = call.plans[0]
    a = [plan.a for plan in call.plans]
    b = [plan.b for plan in call.plans]
    scaling = tuple([plan.scaling for plan in call.plans])
    dropout_p = tuple([plan.dropout_p for plan in call.plans])
    if first.widen:
        x = x.float()
    if first.own is not None:

        def update(x, base, wide):
            matrices = (
                ([t.float() for t in a], [t.float() for t in b]) if wide else (a, b)
            )
            return mixed(x, base, *matrices, call.slots, first.bias, scaling, dropout_p)

        return on_top(layer, layer_class.widens, x, update)
    weight: Any = first.weight
    gain = None
    if any(plan.dora is not None for plan in call.plans):
        gain = stacked_gains(
            [
                None
                if plan.dora is None
                else layer_class.gain(
                    layer,
                    layer_class,
                    plan.dora,
                    x,
                    weight,
                    plan.a,
                    plan.b,
                    plan.scaling,
                )
                for plan in call.plans
            ]
        )
    kept = not (torch.is_grad_enabled() or any(dropout_p))
    if not kept or torch.compiler.is_compiling():
        STACKS.pop(layer, None)
        y = mixed(x, weight, a, b, call.slots, first.bias, scaling, dropout_p, gain)
    else:
        stack = stack_of(layer, x, call.plans)
        y = mixed_of_stacks(x, weight, *stack, call.slots, first.bias, scaling, gain)
    return y if first.cast is None else y.to(first.cast)


def on_top(
    layer: Any,
    widens: bool,
    x: Tensor,
    update: Callable[[Tensor, Base, bool], Tensor],
) -> Tensor:
    """Calls the base layer as PEFT does, and adds the low-rank update to its result.

    The sum is fp32 where the base's result and x differ in dtype.

    Args:
        widens: see Fused.
        update: a function of x, the base and whether adapters are to be fp32; returns the sum.
    """
    modules, device_type = layer._modules, x.device.type
    product = modules.get("quant_linear_module", modules["base_layer"])(x)
    dtype = x.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    if product.dtype is dtype:
        y = update(x, Base("given", [product]), False)
    else:
        with torch.autocast(device_type, enabled=False):
            y = update(x.float(), Base("given", [product.float()]), True)
    return y if widens and torch.is_autocast_enabled() else y.to(product.dtype)


def in_backward() -> bool:
    """Whether this thread computes gradients now."""
    return torch._C._current_graph_task_id() != -1
