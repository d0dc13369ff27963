"""One call of a patched layer: what it runs with, and its result, fused or PEFT's own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...functional import Base
from ...ops.dora import linear_of_gain
from ...ops.lora import linear
from ...ops.lora_base import rows, shaped
from ...ops.lora_formula import by_formula
from ...ops.multi import arguments_of_stacks, mixed, stacked_gains
from ...ops.multi_autograd import y_alone
from .foundation import Fallback
from .mixed import STACKS, MixedPlan, Repeat, plan_mixed, remember, repeatable, stack_of
from .plan import Plan, plan

EXTRA = Fallback("extra arguments")


def plan_call(
    layer: Any, x: Tensor, args: tuple, kwargs: dict
) -> Plan | MixedPlan | Repeat | Fallback:
    """What a call of a layer runs with."""
    if not args and not kwargs:
        return plan(layer, x)
    names = kwargs.get("adapter_names")
    if args or len(kwargs) > 1 or names is None:
        return EXTRA
    return plan_mixed(layer, x, names)


def stock_forward(
    layer: Any,
    stock: Any,
    x: Tensor,
    args: tuple,
    kwargs: dict,
) -> Any:
    """PEFT's forward. It refuses DoRA in mixed batches, which its parts compute."""
    names = kwargs.get("adapter_names")
    if names is None or layer.disable_adapters or layer.merged or len(names) != len(x):
        return stock.forward(layer, x, *args, **kwargs)
    if any(layer.use_dora.get(name, False) for name in names):
        return stock._mixed_batch_forward(layer, x, *args, **kwargs)
    return stock.forward(layer, x, *args, **kwargs)


def of_base(layer: Any, x: Tensor) -> Tensor:
    """The result of a call all of whose samples meet the base alone."""
    modules = layer._modules
    return modules.get("quant_linear_module", modules["base_layer"])(x)


def fused(
    layer: Any,
    layer_class: Any,
    x: Tensor,
    call: Plan,
) -> Tensor:
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


def fused_mixed(
    layer: Any,
    layer_class: Any,
    x: Tensor,
    call: MixedPlan,
) -> Tensor:
    """The result of a call whose samples have several adapters."""
    first = call.first
    plans = [*call.plans.values()]
    a = [plan.a for plan in plans]
    b = [plan.b for plan in plans]
    scaling = tuple([plan.scaling for plan in plans])
    dropout_p = tuple([plan.dropout_p for plan in plans])
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
    if (
        torch.is_grad_enabled()
        or any(dropout_p)
        or torch.compiler.is_compiling()
        or by_formula()
    ):
        STACKS.pop(layer, None)
        gain = gains(layer, layer_class, x, plans)
        y = mixed(x, weight, a, b, call.slots, first.bias, scaling, dropout_p, gain)
        return y if first.cast is None else y.to(first.cast)
    repeat = repeatable(layer, x, call)
    gain = gains(layer, layer_class, x, plans)
    stack = stack_of(layer, x, plans)
    args = arguments_of_stacks(x, weight, *stack, call.slots, first.bias, scaling, gain)
    remember(layer, call, repeat, args[1:])
    return of_arguments(x.shape, args, first.cast)


def gains(
    layer: Any,
    layer_class: Any,
    x: Tensor,
    plans: list[Plan],
) -> Tensor | None:
    """The gains of the adapters (adapters, n), or None without DoRA."""
    if all(one.dora is None for one in plans):
        return None
    each: list[Tensor | None] = []
    for one in plans:
        operands = one.weight, one.a, one.b, one.scaling
        if one.dora is None:
            each.append(None)
        else:
            each.append(layer_class.gain(layer, layer_class, one.dora, x, *operands))
    return stacked_gains(each)


def fused_again(x: Tensor, call: Repeat) -> Tensor:
    """The result of a call that repeats an earlier one with another x."""
    return of_arguments(x.shape, (rows(x), *call.args), call.cast)


def of_arguments(
    shape: Sequence[int],
    args: tuple,
    cast: torch.dtype | None,
) -> Tensor:
    """y_alone of these arguments, for an x of this shape."""
    y = shaped(y_alone(*args), shape)
    return y if cast is None else y.to(cast)


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
    device_type = x.device.type
    product = of_base(layer, x)
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
