"""Batches that mix adapters: whether a call with adapter_names runs fused, and with what.

Samples with an adapter that the layer does not have, and those of "__base__", meet the base alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ...nn.base_layer import PLAIN
from ...nn.dora import CHECKING, moves, one_position, sharded
from ...ops.lora_formula import transformed
from ...ops.multi_autograd import stacked
from ...ops.multi_tables import slots_of
from .foundation import Fallback
from .plan import NO_ADAPTER, Plan, accelerated, ground_of, plan_on

# A call none of whose samples has an adapter of the layer.
BASE_ALONE = Fallback(NO_ADAPTER.reason)
# layer -> (stamp, Stack, what is stacked) of its last mixed batch without gradient
STACKS: WeakKeyDictionary[Any, tuple] = WeakKeyDictionary()
# id of the names that a model has told its layers -> what belongs to them
TOLD: dict[int, "Told"] = {}


@final
class MixedPlan(NamedTuple):
    """The arguments of multi_lora_linear for one call of a layer.

    Attributes:
        names: each sample's adapter.
        slots: (m,), each row's place among the adapters, or -1.
        plans: {adapter: its Plan for all rows}; they share the base.
    """

    names: Sequence[str]
    slots: Tensor
    plans: dict[str, Plan]

    @property
    def own(self) -> str | None:
        """Why the base layer is called for its product, or None."""
        return self.first.own

    @property
    def first(self) -> Plan:
        """Any of the plans, for what they share."""
        return next(iter(self.plans.values()))


@final
class Repeat(NamedTuple):
    """What a call of one position ran with, so that the next token need not look at everything.

    Inside one call of the model, the layers' modules, hooks and scalings are taken not to change.
    Weights are looked at.

    Attributes:
        shape: of x.
        homes: where the modules hold the weights: adapters', DoRA's magnitudes and the base's.
        stamp: of x and these weights; see stamp_of.
        weights: held, so that no others have their ids.
        args: of y_alone after x.
        cast: see Plan.
        dora: whether an adapter is DoRA's.
    """

    shape: torch.Size
    homes: list[dict[str, Tensor]]
    stamp: tuple
    weights: list[Tensor]
    args: tuple
    cast: torch.dtype | None
    dora: bool

    @property
    def own(self) -> None:
        """The base's product is part of the operation."""

    def fits(self, x: Tensor) -> bool:
        """Whether a call with x would run with the same."""
        if x.shape != self.shape or type(x) not in PLAIN:
            return False
        if torch.is_grad_enabled() or transformed() or (self.dora and CHECKING):
            return False
        return stamp_of(x, [home["weight"] for home in self.homes]) == self.stamp


class Told(NamedTuple):
    """The names that a model tells its layers, each once, and what a layer's last call ran with."""

    names: list[str]
    repeats: dict[Any, Repeat]


@contextmanager
def remembered(names: tuple[str, ...]) -> Iterator[None]:
    """Inside, layers that are told these very names remember their calls."""
    TOLD[id(names)] = Told([*dict.fromkeys(names)], {})
    try:
        yield
    finally:
        del TOLD[id(names)]


def plan_mixed(
    layer: Any, x: Tensor, names: Sequence[str]
) -> MixedPlan | Repeat | Plan | Fallback:
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
    told = None if is_compiling() else TOLD.get(id(names))
    repeat = None if told is None else told.repeats.get(layer)
    if repeat is not None and repeat.fits(x):
        return repeat
    adapters = state["_modules"]["lora_A"].__dict__["_modules"]
    each = dict.fromkeys(names) if told is None else told.names
    present = [name for name in each if name in adapters]
    if not present:
        return BASE_ALONE
    ground = ground_of(layer, x)
    if type(ground) is Fallback:
        return ground
    plans: dict[str, Plan] = {}
    for name in present:
        call = plan_on(ground, layer, x, name)
        if type(call) is Fallback:
            return call
        plans[name] = call
    if len(present) == 1 and all(name == present[0] for name in names):
        return plans[present[0]]
    if any(state["lora_bias"][name] for name in present):
        return Fallback("an adapter has a bias, in a mixed batch")
    if any(call.dora is not None and call.dropout_p for call in plans.values()):
        return Fallback("DoRA with dropout, in a mixed batch")
    if not accelerated(x.device.type, "multi_fwd"):
        return Fallback(f"no kernels for {x.device.type}")
    samples = tuple([present.index(name) if name in present else -1 for name in names])
    rows = x.shape[:-1].numel() // len(x)
    return MixedPlan(names, slots_of(samples, rows, x.device), plans)


def repeatable(
    layer: Any,
    x: Tensor,
    call: MixedPlan,
) -> Repeat | None:
    """A Repeat of this call, before its weights are read and without args; None if it has none."""
    if id(call.names) not in TOLD or not one_position(x) or call.first.widen:
        return None
    modules = layer.__dict__["_modules"]
    owners: list[Any] = []
    for name, plan in call.plans.items():
        owners += modules["lora_A"][name], modules["lora_B"][name]
        if plan.dora is not None:
            owners.append(modules["lora_magnitude_vector"][name])
    dora = len(owners) > 2 * len(call.plans)
    owners.append(modules["base_layer"])
    homes = [owner.__dict__["_parameters"] for owner in owners]
    if not all("weight" in home for home in homes):
        return None
    weights = [home["weight"] for home in homes]
    stamp = stamp_of(x, weights)
    if stamp is None or torch.is_autocast_enabled(x.device.type):
        return None
    return Repeat(x.shape, homes, stamp, weights, (), call.first.cast, dora)


def remember(
    layer: Any,
    call: MixedPlan,
    repeat: Repeat | None,
    args: tuple,
) -> None:
    """Lets the layer's next call repeat this one. args: of y_alone after x."""
    told = TOLD.get(id(call.names))
    if repeat is not None and told is not None:
        told.repeats[layer] = repeat._replace(args=args)


class Stack(NamedTuple):
    """The adapters of a mixed batch, one below the other, for calls without gradient."""

    a: Tensor
    b: Tensor
    ranks: tuple[int, ...]


def stack_of(
    layer: Any,
    x: Tensor,
    plans: Sequence[Plan],
) -> Stack:
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
    # as long as the matrices are held, no others have their ids
    STACKS[layer] = now, stack, matrices
    return stack


def stamp_of(x: Tensor, weights: Sequence[Tensor]) -> tuple | None:
    """Identifies weights as they are now; None where their versions do not show a change."""
    if sharded():
        return None
    try:
        versions = [t._version for t in weights]
    except RuntimeError:
        return None  # tensors of inference_mode count no versions
    # lists that C fills: a token looks at the weights of all its adapters in every layer
    ids = [*map(id, weights)]
    addresses = [*map(Tensor.data_ptr, weights)]
    autocast = torch.is_autocast_enabled(x.device.type)
    return moves(), x.dtype, x.device, autocast, ids, addresses, versions
