"""Liger-Kernel's fused cross entropy reads the weight of a model's head, and skips its adapter."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from .._errors import naming_extra

with naming_extra("peft", "peft", "transformers"):
    from peft.tuners.lora.layer import LoraLayer


def untrained(model: nn.Module) -> list[str]:
    """Names of the LoRA layers that do not train because of it (huggingface/trl#4612)."""
    heads = set()
    modules: Iterator[Any] = model.modules()
    for module in modules:
        home = getattr(module.forward, "__module__", "")
        if home.startswith("liger_kernel.") and hasattr(module, "lm_head"):
            heads.add(id(module.get_output_embeddings()))
    return [
        name
        for name, layer in model.named_modules()
        if id(layer) in heads and isinstance(layer, LoraLayer)
    ]
