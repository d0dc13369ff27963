"""merge and unmerge: adapters into the weights of a whole model, all or none, and back."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from ...ops.lora_base import Base
from ...ops.merge import add, delta_of
from . import layer_merge
from .layer import FusedLinear
from .report import lora_layers


def merge(model: nn.Module, *, adapter_names: Sequence[str] | None = None) -> nn.Module:
    """Merges adapters into the weights of all LoRA layers, in place: into all of them or none.

        W' = round(W + Σ scaling · B·A), and what DoRA makes of it; see functional.merge_lora

    The model runs as fast as its base then, and `unmerge` gives every bit back, whatever becomes of
    the adapters meanwhile. Over a LinearNF4 the sum is quantized anew, which loses most of a small
    delta. What has a layer of its own in PEFT (embeddings, convolutions, other quantizers) is
    merged by PEFT. The model need not be patched.

    Args:
        model: a model with LoRA layers of PEFT.
        adapter_names: which adapters to merge; None: the active ones.

    Returns:
        The model.

    Raises:
        ValueError: the model has no LoRA layers; no layer has an adapter of that name, or it is
            merged already; an adapter holds NaN or infinity, or a sum is too large for its dtype.
            Nothing is changed then.

    Source: Hu et al., LoRA, arXiv 2106.09685, section 4.1.
    """
    found = lora_layers(model)
    if not found:
        raise ValueError("merge: the model has no LoRA layers")
    expect_adapters(found.values(), adapter_names)
    for name, layer in found.items():
        if why := fault(layer, adapter_names):
            raise ValueError(f"merge: {name} cannot be merged: {why}")
    for layer in found.values():
        names = None if adapter_names is None else [*adapter_names]
        if is_linear(layer):
            layer_merge.merge(layer, False, names)
        else:
            layer.merge(adapter_names=names)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Takes all merged adapters out of the weights again, in place.

    Layers that `merge` or a patched model has merged get every bit back.

    Args:
        model: a model with LoRA layers of PEFT. One without merged adapters is warned of.

    Returns:
        The model.

    Raises:
        ValueError: somebody changed a merged weight since. Nothing is changed then.
    """
    merged = {name: layer for name, layer in lora_layers(model).items() if layer.merged}
    if not merged:
        warnings.warn("unmerge: no adapter is merged", stacklevel=2)
    for name, layer in merged.items():
        if is_linear(layer) and (why := layer_merge.fault(layer)):
            raise ValueError(f"unmerge: {name} cannot be unmerged: {why}")
    for layer in merged.values():
        if type(layer) is Linear:
            layer_merge.unmerge(layer)
        else:
            layer.unmerge()
    return model


def is_linear(layer: Any) -> bool:
    """Whether this is PEFT's layer over nn.Linear, Conv1D or LinearNF4, patched or not."""
    return type(layer) in (Linear, FusedLinear)


def expect_adapters(found: Iterable[Any], names: Sequence[str] | None) -> None:
    """Raises for a name that no layer has, or that is merged already in all layers that have it."""
    for name in names or ():
        having = [layer for layer in found if name in adapters_of(layer)]
        if not having:
            raise ValueError(f"merge: the model has no adapter {name!r}")
        if all(name in layer.merged_adapters for layer in having):
            raise ValueError(f"merge: adapter {name!r} is merged already")


def adapters_of(layer: Any) -> set[str]:
    return {*layer.lora_A, *layer.lora_embedding_A}


@torch.no_grad()
def fault(layer: Any, adapter_names: Sequence[str] | None) -> str | None:
    """Why merging adapters into this layer would go wrong, or None."""
    wanted = layer.active_adapters if adapter_names is None else adapter_names
    names = [
        name
        for name in wanted
        if name in layer.lora_A and name not in layer.merged_adapters
    ]
    for name in names:
        parts = [layer.lora_A[name], layer.lora_B[name]]
        if name in layer.lora_magnitude_vector:
            parts.append(layer.lora_magnitude_vector[name])
        for part in parts:
            if not all(t.isfinite().all() for t in part.parameters()):
                return f"adapter {name!r} holds NaN or infinity"
        if layer.lora_bias[name] and getattr(layer.base_layer, "bias", None) is None:
            return f"adapter {name!r} has a bias, and the base layer has none"
    if not is_linear(layer) or not names:
        return None
    if why := layer_merge.fault(layer):
        return why
    if layer_merge.is_dense(layer, names) and overflows(layer, names):
        return f"the sum is too large for {layer.base_layer.weight.dtype}"
    return None


def overflows(layer: Any, names: Sequence[str]) -> bool:
    """Whether a dense weight would get infinite elements, which only fp16 is likely to get."""
    weight: Tensor = layer_merge.dense_weight(layer.base_layer).detach()
    if weight.dtype is not torch.float16:
        return False
    base = Base.of(weight)
    delta = delta_of(base, *layer_merge.factors_of(layer, names))
    merged, _ = add(base, delta, weight.dtype)
    return not merged.isfinite().all()
