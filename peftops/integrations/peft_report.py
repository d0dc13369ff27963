"""What peftops.report returns, and the rows that it asks layers about."""

from collections import Counter
from dataclasses import dataclass, field

import torch
from peft.tuners.lora.layer import LoraLayer


@dataclass
class Report:
    """How the LoRA layers of a model run now, and how they ran since patch."""

    fused: int = 0
    reasons: Counter = field(default_factory=Counter)  # why a layer is PEFT's own -> layers
    calls: Counter = field(default_factory=Counter)  # peft.FUSED, peft.OWN or why not -> calls, compiled ones excluded
    mlps: Counter = field(default_factory=Counter)  # peft.FUSED or why by layers -> calls of what patch(fuse=...) found
    norms: int = 0  # of DoRA, computed since patch
    paths: Counter = field(default_factory=Counter)  # backend, its way for rows of the base's dtype, why the base's own

    @property
    def fallback(self):
        return self.reasons.total()

    def __str__(self):
        lines = [f"{self.fused}/{self.fused + self.fallback} LoRA layers fused"]
        titles = {"PEFT's own": self.reasons, "calls": self.calls, "MLPs": self.mlps, "kernels": self.paths}
        for title, counts in titles.items():
            if counts:
                lines.append(f"{title}: " + ", ".join(f"{count} {key}" for key, count in counts.most_common()))
        if self.norms:
            lines.append(f"norms: {self.norms} computed")
        return "\n".join(lines)


def lora_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def count(module, key, ours):
    """ours: the module's class when the call began; one that was unpatched since, in another thread, keeps no count."""
    calls = vars(module).setdefault("_peftops_calls", {})
    calls[key] = calls.get(key, 0) + 1
    if not isinstance(module, ours):
        vars(module).pop("_peftops_calls", None)


def parameter(module, name):
    """What module.name is, read where nn.Module keeps parameters, since its __getattr__ would cost more.

    A module may also hold it as a buffer or a plain attribute.
    """
    held = vars(module)["_parameters"]
    return held[name] if name in held else getattr(module, name, None)


def rows_like(layer):
    """No rows, of what this layer's base computes in, or its adapter where the base does not tell."""
    weight = parameter(layer.get_base_layer(), "weight")
    held = next(layer.lora_A.parameters(), torch.empty(0)) if not isinstance(weight, torch.Tensor) else weight
    return torch.empty(0, dtype=dtype_of(layer), device=held.device)


def dtype_of(layer):
    """What this layer's base computes in, or its adapter where the base does not tell."""
    base = layer.get_base_layer()
    weight = parameter(base, "weight")
    state = getattr(weight, "quant_state", None)
    dtype = getattr(base, "compute_dtype", None) or getattr(base, "weight_dtype", None) or getattr(state, "dtype", None)
    dtype = dtype or getattr(weight, "dtype", None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
        return dtype
    return next(layer.lora_A.parameters(), torch.empty(0)).dtype
