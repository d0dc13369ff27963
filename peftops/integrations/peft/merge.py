"""Merging adapters into a LinearNF4: the sum is quantized anew, and unmerge restores every bit."""

import warnings
from typing import cast

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from ...nn.nf4 import LinearNF4
from ...nn.nf4_packed import PackedNF4
from ...nn.nf4_peft import meet
from ...ops.nf4 import NF4Weight

meet(LinearNF4, PackedNF4)
ORIGINAL = (
    "_peftops_unmerged"  # attribute of a merged layer: its weight and bias before
)


@torch.no_grad()
def merge(layer: Linear, safe_merge: bool, adapter_names: list[str] | None) -> None:
    """Quantizes the original weight plus the deltas of all adapters, merged before or now.

    Args:
        layer: a LoRA layer over a LinearNF4.
        safe_merge: refuse adapters with NaN or infinity.
        adapter_names: the adapters to merge; None: the active ones.

    Raises:
        ValueError: safe_merge, and an adapter holds NaN or infinity.
        RuntimeError: an adapter has a bias and the base layer has none.
    """
    if layer.merged_adapters and ORIGINAL not in vars(layer):  # merged before patch
        Linear.merge(layer, safe_merge, adapter_names)
        return
    base = cast(LinearNF4, layer.get_base_layer())
    for name in check_adapters_to_merge(layer, adapter_names) or []:
        if name not in layer.lora_A:
            continue
        warnings.warn(
            "merge: a merged weight in 4 bits is rounded again, which may change what is generated",
            stacklevel=3,
        )
        original = vars(layer).get(ORIGINAL)
        if original is None:
            original = base.quantized, None if base.bias is None else base.bias.clone()
        weight = merged_weight(layer, original[0], [*layer.merged_adapters, name])
        bias = merged_bias(layer, base, name)
        checked = [weight] if bias is None else [weight, bias]
        if safe_merge and not all(t.isfinite().all() for t in checked):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
            )
        q = NF4Weight.quantize(
            weight, base.blocksize, base.double_quant, base.quant_type
        )
        base.hold(q.base, base.weight_dtype, q.block, q.quant_type)
        if bias is not None:
            base.bias.copy_(bias)
        vars(layer)[ORIGINAL] = original
        layer.merged_adapters.append(name)


def merged_weight(layer: Linear, original: NF4Weight, names: list[str]) -> Tensor:
    """The weight (n, k) in fp32 with the deltas of these adapters."""
    weight = original.dequantize(torch.float32)
    for name in names:
        if name in layer.lora_variant:
            weight = layer.lora_variant[name].merge_safe(layer, name, weight)
        else:
            weight += layer.get_delta_weight(name).float()
    return weight


def merged_bias(layer: Linear, base: LinearNF4, name: str) -> Tensor | None:
    """The base's bias with that of this adapter; None where the adapter has none."""
    if not layer.lora_bias[name]:
        return None
    if base.bias is None:
        raise RuntimeError(
            f"merge: {name} must come without lora_bias, for the base layer has no bias"
        )
    return base.bias + layer.lora_B[name].bias * layer.scaling[name]


@torch.no_grad()
def unmerge(layer: Linear) -> None:
    """Restores the bits of before the first merge. (PEFT subtracts the delta and rounds again.)"""
    if ORIGINAL not in vars(layer):  # merged before patch
        Linear.unmerge(layer)
        return
    base = cast(LinearNF4, layer.get_base_layer())
    original, bias = vars(layer).pop(ORIGINAL)
    original = original.to(base.weight.device)
    base.hold(original.base, original.dtype, original.block, original.quant_type)
    if bias is not None:
        base.bias.copy_(bias)
    for name in layer.merged_adapters:
        # DoRA's merge leaves its norm there for PEFT's unmerge.
        layer._caches.pop(f"{name}-weight_norm", None)
    layer.merged_adapters.clear()
