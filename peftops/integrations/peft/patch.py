"""patch and unpatch: PEFT's LoRA layers run on peftops where that gives what PEFT gives."""

import logging
from collections import Counter
from typing import Any

from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn

from .. import liger
from .layer import Fused, Patched, become, fused_classes, has_own_forward
from .report import lora_layers, why_not
from .routed import RoutedModel
from .sharded import gathered

log = logging.getLogger("peftops")


def patch(model: nn.Module, *, strict: bool = False) -> nn.Module:
    """Lets peftops run the LoRA layers of a PEFT model, in place.

        y = base_layer(x) + scaling · lora_B(lora_A(dropout(x))), or what DoRA makes of it

    A call that peftops cannot run as PEFT would runs PEFT's own forward; `report` counts these
    calls by reason. Patch again after adding adapters to new layers.

    Bases that are read directly are nn.Linear, Conv1D and LinearNF4, over which unmerge restores
    every bit, and bitsandbytes' Linear4bit, whose bytes are read where they lie. Any other base
    (GPTQ, AWQ, HQQ, int8, torchao, a subclass of nn.Linear, ...) is called for its product, and one
    operation adds the low-rank update. Adapters in fp32 over a bf16 base, PEFT's default, are
    computed as PEFT does under autocast (see functional.lora_linear). Over an fp16 base, whose
    range is too small for that, they are PEFT's own outside autocast.

    Args:
        model: a model with LoRA layers of PEFT; nested models are searched.
        strict: raise instead of falling back, and leave the model as it is.

    Returns:
        The model.

    Raises:
        ValueError: the model has no LoRA layers; with strict, the first layer that cannot be fused
            and the reason.

    Source: Hu et al., LoRA, arXiv 2106.09685; Liu et al., DoRA, arXiv 2402.09353.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("patch: the model has no LoRA layers")
    reasons = {}
    with gathered(model):
        for name, layer in layers.items():
            if reason := why_not(layer):
                reasons[name] = reason
    if strict and reasons:
        name, reason = next(iter(reasons.items()))
        raise ValueError(f"patch: {name} cannot be fused: {reason}")
    change_classes(model, layers)
    say(len(layers), reasons)
    for name in liger.untrained(model):
        log.warning(
            "%s does not train: Liger-Kernel's fused cross entropy uses its base weight alone",
            name,
        )
    return model


def change_classes(model: nn.Module, layers: dict[str, LoraLayer]) -> None:
    """Gives our classes to PEFT's layers, and to the model that tells them names: all or none."""
    classes = fused_classes()
    changed: list[Any] = []
    try:
        for layer in layers.values():
            if type(layer) in classes and not has_own_forward(layer):
                become(layer, classes[type(layer)])
                changed.append(layer)
            if isinstance(layer, Fused) and layer.magnitudes():
                layer.keep_gains()
        for module in model.modules():
            if type(module) is LoraModel:
                become(module, RoutedModel)
                changed.append(module)
    except BaseException:
        for layer in changed:
            layer.restore()
        raise


def say(layers: int, reasons: dict[str, str]) -> None:
    """Logs how many of the layers are fused: a warning where it is less than nine in ten."""
    fused = layers - len(reasons)
    level = logging.INFO if fused >= 0.9 * layers else logging.WARNING
    counts = Counter(reasons.values()).most_common()
    own = ""
    if reasons:
        own = "; PEFT's own: " + ", ".join(
            f"{count} {reason}" for reason, count in counts
        )
    log.log(level, "%d/%d LoRA layers fused%s", fused, layers, own)


def unpatch(model: nn.Module) -> nn.Module:
    """Restores the model as it was before patch (and mlp.fuse), in place.

    Args:
        model: a model that `patch` has run on. Modules that are not patched are left alone.

    Returns:
        The model.

    Raises:
        ValueError: a layer is merged, or was sharded by itself or given a forward of its own since
            patch. Nothing is changed then.
    """
    patched = {name: m for name, m in model.named_modules() if isinstance(m, Patched)}
    for name, module in patched.items():
        if reason := module.refusal():
            raise ValueError(f"unpatch: {name} {reason}")
    for module in patched.values():
        module.restore()
    return model
