"""PEFT's LoRA layers with our forward: the classes that patch puts in the place of PEFT's own.

A patched layer owns nothing but counts and kept gains, so it saves and copies as before. Each
patched module, here and in mlp.py, is `Patched`: it can be restored.
"""

import functools
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor

from ...nn.dora import Normed, Operands
from ...nn.dora_magnitude import Magnitude
from . import layer_merge
from .call import (
    fused,
    fused_again,
    fused_mixed,
    in_backward,
    of_base,
    plan_call,
    stock_forward,
)
from .foundation import Fallback, dtype_of, foundation_of, rows_like
from .mixed import BASE_ALONE, STACKS, MixedPlan, Repeat

FUSED = "fused"
OWN = "fused, base's own product"


class Patched:
    """A module whose class was changed by us, in place."""

    def refusal(self) -> str | None:
        """Why the module cannot be restored as it is now, or None."""
        raise NotImplementedError

    def restore(self) -> None:
        """Makes the module one of its class before, with nothing of ours left on it."""
        raise NotImplementedError


def count(module: object, key: str, patched_class: type[Patched]) -> None:
    """Counts a call of a patched module under `key`.

    patched_class: Fused or FusedMLP, which the module was when the call began. If another thread
    has restored the module since, it keeps no count.
    """
    calls = module.__dict__.setdefault("_peftops_calls", {})
    calls[key] = calls.get(key, 0) + 1
    if not isinstance(module, patched_class):
        vars(module).pop("_peftops_calls", None)


class Fused(Patched, Normed):
    """A layer of PEFT with another forward."""

    if TYPE_CHECKING:  # what each subclass has, and what PEFT's class gives its layers
        stock: type[Any]  # PEFT's class of the layer
        in_features: Any  # int
        out_features: Any  # int
        scaling: dict[str, Any]
        lora_A: Any  # ModuleDict of nn.Linear
        lora_B: Any  # ModuleDict of nn.Linear
        lora_variant: dict[str, Any]

    widens = False  # whether PEFT's forward leaves the sum in its dtype under CUDA's autocast

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The class is read once: another thread may restore the layer during this call.
        layer_class = type(self)
        if not issubclass(layer_class, Fused):
            return layer_class.forward(self, x, *args, **kwargs)
        call = plan_call(self, x, args, kwargs)
        if not torch.compiler.is_compiling():
            count(self, key_of(call), Fused)
            if kwargs or "_peftops_routed" in self.__dict__:
                watch_route(self, bool(kwargs))
        if type(call) is Fallback:
            if call is BASE_ALONE:
                return of_base(self, x)
            return stock_forward(self, layer_class.stock, x, args, kwargs)
        if type(call) is Repeat:
            y = fused_again(x, call)
        elif type(call) is MixedPlan:
            y = fused_mixed(self, layer_class, x, call)
        else:
            y = fused(self, layer_class, x, call)
        if not isinstance(self, Fused):
            Fused.leave_nothing(self)
        return y

    def unmerge(self) -> None:
        type(self).stock.unmerge(self)
        self.refresh_gains()

    def computes_in(self) -> torch.dtype:
        return dtype_of(self)

    def operands(self, name: str) -> Operands | None:
        scaling = self.scaling[name]
        weight = foundation_of(self._modules["base_layer"], rows_like(self)).weight
        if weight is None or type(scaling) not in (int, float):
            return None
        return weight, self.lora_A[name].weight, self.lora_B[name].weight, scaling

    def magnitudes(self) -> dict[str, Magnitude]:
        variants = self.lora_variant
        return {
            name: magnitude
            for name, magnitude in super().magnitudes().items()
            if type(variants.get(name)) is DoraLinearVariant
        }

    def refusal(self) -> str | None:
        if layer_merge.ORIGINAL in vars(self):
            return "must be unmerged first, since PEFT would not restore every bit"
        if type(self) not in fused_classes().values():
            return f"has been made a {type(self).__name__} since patch"
        if has_own_forward(self):
            return "has been given a forward of its own since patch"
        return None

    def restore(self) -> None:
        # The class changes first. A call in another thread looks at the class whenever it has left
        # something on the layer, and removes it where the class is not ours.
        become(self, type(self).stock)
        Normed.forget_gains(self)
        Fused.leave_nothing(self)

    def leave_nothing(self) -> None:
        """Removes what calls have left on the layer, whose class may be another already."""
        vars(self).pop("_peftops_calls", None)
        vars(self).pop("_peftops_routed", None)
        STACKS.pop(self, None)
        Normed.drop_gains(self)


def key_of(call: Any) -> str:
    """What a call counts as: FUSED, OWN, or the reason why it was PEFT's own."""
    if type(call) is Fallback:
        return call.reason
    return FUSED if call.own is None else OWN


def watch_route(layer: Any, routed: bool) -> None:
    """Raises where a layer that had adapter_names runs again in backward, and has them no more.

    Some checkpoint that we do not know runs it, and would train another adapter.
    """
    state = layer.__dict__
    if routed and layer.training:
        state["_peftops_routed"] = True
    elif not routed and in_backward():
        raise RuntimeError(
            "patch: a layer of a mixed batch ran again in backward without adapter_names; "
            "checkpoint by the model's gradient_checkpointing_enable"
        )
    elif not routed and layer.training:
        state.pop("_peftops_routed", None)
    if not isinstance(layer, Fused):  # restored by another thread
        state.pop("_peftops_routed", None)


class FusedLinear(Fused, Linear):
    """PEFT's layer for all bases without a layer of their own, such as nn.Linear and LinearNF4."""

    stock = Linear

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        layer_merge.merge(self, safe_merge, adapter_names)

    def unmerge(self) -> None:
        layer_merge.unmerge(self)
        self.refresh_gains()


# PEFT's layers of other quantizers -> where PEFT defines each, in peft.tuners.lora, if its
# quantizer is installed.
HOMES = {
    "AqlmLoraLinear": "aqlm",
    "AwqLoraLinear": "awq",
    "EetqLoraLinear": "eetq",
    "GPTQLoraLinear": "gptq",
    "HqqLoraLinear": "hqq",
    "IncLoraLinear": "inc",
    "Linear4bit": "bnb",
    "Linear8bitLt": "bnb",
    "TeLinear": "te",
    "TorchaoLoraLinear": "torchao",
}
WIDENING = {
    "AwqLoraLinear",
    "EetqLoraLinear",
    "HqqLoraLinear",
    "Linear4bit",
    "Linear8bitLt",
}


def fused_classes() -> dict[type, type[Fused]]:
    """PEFT's class -> ours, for those that PEFT has defined by now. It imports nothing."""
    classes: dict[type, type[Fused]] = {Linear: FusedLinear}
    for name, home in HOMES.items():
        stock = getattr(sys.modules.get(f"peft.tuners.lora.{home}"), name, None)
        if stock is not None:
            classes[stock] = fused_class(stock)
    return classes


@functools.cache
def fused_class(stock: type) -> type[Fused]:
    """Our class for one of PEFT's. It merges, saves and is copied as PEFT's."""
    name = stock.__name__
    body = {
        "__module__": __name__,
        "__doc__": f"PEFT's {name}, with our forward.",
        "stock": stock,
        "widens": name in WIDENING,
    }
    return type(f"Fused{name}", (Fused, stock), body)


def __getattr__(name: str) -> type[Fused]:
    """One of the classes that fused_class makes, by its name: pickle asks for it."""
    stock = name.removeprefix("Fused")
    if stock == name or stock not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return fused_class(
        getattr(import_module(f"peft.tuners.lora.{HOMES[stock]}"), stock)
    )


def has_own_forward(layer: object) -> bool:
    """Whether the instance has a forward that replaces its class's.

    accelerate sets one when it dispatches a model. That one does not count: it calls
    `_old_forward`, which `become` keeps up to date.
    """
    return "forward" in vars(layer) and not dispatched(layer)


def dispatched(layer: Any) -> bool:
    """Whether accelerate's forward calls that of the layer's class."""
    return (
        getattr(vars(layer).get("_old_forward"), "__func__", None)
        is type(layer).forward
    )


def become(layer: Any, layer_class: type[Any]) -> None:
    """Changes the layer's class, and the forward that accelerate calls, if it dispatched it."""
    was_dispatched = dispatched(layer)
    layer.__class__ = layer_class
    if was_dispatched:
        layer._old_forward = layer_class.forward.__get__(layer)
