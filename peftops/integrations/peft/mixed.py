"""Batches that mix adapters: whether a call with adapter_names runs fused, and with what.

Samples with an adapter that the layer does not have, and those of "__base__", meet the base alone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...nn.dora import moves, one_position, sharded
from ...ops.multi_autograd import stacked
from ...ops.multi_tables import slots_of
from .foundation import Fallback
from .plan import NO_ADAPTER, Plan, accelerated, ground_of, plan_on

# layer -> (stamp, Stack, what is stacked) of its last mixed batch without gradient
STACKS: WeakKeyDictionary[Any, tuple] = WeakKeyDictionary()


@final
class MixedPlan(NamedTuple):
    """The arguments of multi_lora_linear for one call of a layer.

    Attributes:
        slots: (m,), each row's place among the adapters, or -1.
        plans: each adapter's Plan for all rows; they share the base.
    """

    slots: Tensor
    plans: list[Plan]

    @property
    def own(self) -> str | None:
        """Why the base layer is called for its product, or None."""
        return self.plans[0].own


def plan_mixed(
    layer: Any, x: Tensor, names: Sequence[str]
) -> MixedPlan | Plan | Fallback:
    """The plan for layer(x, adapter_names=names), or a Fallback where PEFT has to run the call.

    Where all samples have the same adapter, it is a Plan.

    Args:
        layer: a LoRA layer of PEFT.
        x: (samples, ..., k), whose values are not read.
        names: each sample's adapter.
    """
    state = layer.__dict__
    if state["_disable_adapters"]:
        return Fallback("adapters disabled")
    if state["merged_adapters"]:
        return Fallback("merged")
    if len(names) != len(x):
        return Fallback("adapter_names are not as many as samples")
    adapters = state["_modules"]["lora_A"].__dict__["_modules"]
    present = [name for name in dict.fromkeys(names) if name in adapters]
    if not present:
        return NO_ADAPTER
    ground = ground_of(layer, x)
    if type(ground) is Fallback:
        return ground
    plans: list[Plan] = []
    for name in present:
        call = plan_on(ground, layer, x, name)
        if type(call) is Fallback:
            return call
        plans.append(call)
    if len(present) == 1 and all(name == present[0] for name in names):
        return plans[0]
    if any(state["lora_bias"][name] for name in present):
        return Fallback("an adapter has a bias, in a mixed batch")
    if any(call.dora is not None and call.dropout_p for call in plans):
        return Fallback("DoRA with dropout, in a mixed batch")
    if not accelerated(x.device.type, "multi_fwd"):
        return Fallback(f"no kernels for {x.device.type}")
    samples = tuple([present.index(name) if name in present else -1 for name in names])
    rows = x.shape[:-1].numel() // len(x)
    return MixedPlan(slots_of(samples, rows, x.device), plans)


class Stack(NamedTuple):
    """The adapters of a mixed batch, one below the other, for calls without gradient."""

    a: Tensor
    b: Tensor
    ranks: tuple[int, ...]


def stack_of(layer: Any, x: Tensor, plans: Sequence[Plan]) -> Stack:
    """The Stack of these adapters.

    The tokens of a generation reuse that of the call before, while nothing shows that an adapter
    has changed; see nn/dora.py, which keeps gains by the same rule.
    """
    matrices = [t for plan in plans for t in (plan.a, plan.b)]
    now = stamp_of(x, matrices)
    known = STACKS.get(layer)
    if known is not None and now is not None and known[0] == now and one_position(x):
        return known[1]
    narrow = x.dtype.itemsize == 2 and not torch.is_autocast_enabled(x.device.type)
    dtype = x.dtype if narrow else torch.float32
    a = stacked([plan.a for plan in plans]).to(dtype)
    b = stacked([plan.b.T for plan in plans]).to(dtype)
    stack = Stack(a, b, tuple([plan.a.shape[0] for plan in plans]))
    STACKS[layer] = (
        now,
        stack,
        matrices,
    )  # as long as they are held, no other has their ids
    return stack


def stamp_of(x: Tensor, matrices: Sequence[Tensor]) -> tuple | None:
    """Identifies the adapters as they are now; None where their versions do not show a change."""
    if sharded():
        return None
    try:
        versions = [(id(t), t.data_ptr(), t._version) for t in matrices]
    except RuntimeError:
        return None  # tensors of inference_mode count no versions
    autocast = torch.is_autocast_enabled(x.device.type)
    return moves(), x.dtype, autocast, versions
