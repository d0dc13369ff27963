"""report: how the LoRA layers of a model run now, and how they ran since patch."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...ops.lora import FEW, served_by
from .foundation import Fallback, rows_like
from .layer import FUSED, OWN, Fused, fused_classes, has_own_forward
from .layer_merge import ORIGINAL
from .plan import FP16, Plan, plan
from .sharded import gathered

REPLACED = "its forward was replaced"


@dataclass
class Report:
    """How the LoRA layers of a model run now, and how they ran since patch.

    Attributes:
        fused: the layers that run on peftops now.
        reasons: reason why a layer is PEFT's own -> layers.
        calls: FUSED, OWN or the reason why PEFT ran the call -> calls, compiled ones excluded.
        merged: the layers whose adapters are merged, which run as their base.
        undo_bytes: what merged layers keep, so that unmerge restores every bit.
        norms: DoRA's norms that were computed since patch, compiled calls excluded.
        paths: backend and product, as `describe` says it -> layers.
    """

    fused: int = 0
    reasons: Counter = field(default_factory=Counter)
    calls: Counter = field(default_factory=Counter)
    merged: int = 0
    undo_bytes: int = 0
    norms: int = 0
    paths: Counter = field(default_factory=Counter)

    @property
    def fallback(self) -> int:
        """The layers that PEFT runs."""
        return self.reasons.total()

    def __str__(self) -> str:
        lines = [f"{self.fused}/{self.fused + self.fallback} LoRA layers fused"]
        titles = {
            "PEFT's own": self.reasons,
            "calls": self.calls,
            "kernels": self.paths,
        }
        for title, counts in titles.items():
            if counts:
                items = ", ".join(
                    f"{count} {key}" for key, count in counts.most_common()
                )
                lines.append(f"{title}: {items}")
        if self.merged:
            lines.append(f"merged: {self.merged}, {self.undo_bytes:,} bytes to undo it")
        if self.norms:
            lines.append(f"norms: {self.norms} computed")
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """Says how the LoRA layers of a model run now, and how they ran since patch.

    A layer counts as fused if a call now would be and, where it was called, at least one call was.

    Args:
        model: a model with LoRA layers of PEFT, patched or not. Nothing is changed.

    Returns:
        A Report, which can be printed.
    """
    result = Report()
    with gathered(model):
        for layer in lora_layers(model).values():
            calls = Counter(vars(layer).get("_peftops_calls", {}))
            reason = why_not(layer)
            if reason != REPLACED and type(layer) in fused_classes():
                reason = "not patched"
            if not reason and calls and not calls[FUSED] + calls[OWN]:
                reason = calls.most_common(1)[0][0]
            if layer.merged and reason == "merged":
                result.merged += 1
                held = vars(layer).get(ORIGINAL)
                result.undo_bytes += 0 if held is None else held.nbytes
            elif reason:
                result.reasons[reason] += 1
            else:
                result.fused += 1
                result.paths[describe(layer)] += 1
            result.calls.update(calls)
            result.norms += vars(layer).get("_peftops_norms", 0)
    return result


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """{name: layer} of PEFT's LoRA layers, patched or not."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def why_not(layer: LoraLayer) -> str | None:
    """Why PEFT would run this layer, called now with rows of its weight's dtype, or None."""
    if has_own_forward(layer) and not vars(layer).get("_peftops_calls"):
        return REPLACED
    if type(layer) not in fused_classes() and not isinstance(layer, Fused):
        home = type(layer).__module__.removeprefix("peft.tuners.")
        return f"layer is {home}.{type(layer).__name__}"
    planned = plan_of(layer)
    return planned.reason if isinstance(planned, Fallback) else None


def plan_of(layer: LoraLayer) -> Plan | Fallback:
    """What `plan` says for rows_like(layer), under autocast where only that runs fused."""
    like = rows_like(layer)
    planned = plan(layer, like)
    if type(planned) is not Fallback:
        return planned
    adapter = next(layer.lora_A.parameters(), like)
    dtypes = {"dtype of the adapter": adapter.dtype, FP16: like.dtype}
    dtype = dtypes.get(planned.reason, torch.float32)
    if dtype.itemsize == 2:
        with torch.autocast(like.device.type, dtype):
            planned = plan(layer, like)
    return planned


def describe(layer: LoraLayer) -> str:
    """The backend and product for many rows of a fused layer, and why its base is called."""
    like = rows_like(layer)
    planned = plan_of(layer)
    assert isinstance(planned, Plan)
    own = ""
    if planned.own is not None:
        form = "given"
        own = f"base's own product: {planned.own}"
    elif isinstance(planned.weight, torch.Tensor):
        form = "transposed" if type(layer.base_layer) is Conv1D else "dense"
    else:
        form = "nf4"
    rank = next(iter(layer.r.values()), 1)
    n: Any = layer.out_features
    k: Any = layer.in_features
    _, backend, product = served_by(like, FEW + 1, n, k, rank, form=form)
    return ", ".join(filter(None, (backend, product, own)))
