"""Merging adapters into a layer's weight, and unmerge, which restores every bit.

Dense weights get all adapters in one rounding, and keep a record. A LinearNF4 is quantized anew,
and keeps what it was. (PEFT's own unmerge subtracts the delta and rounds again.)
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...nn.base_layer import PLAIN, dense_weight
from ...nn.nf4 import LinearNF4
from ...nn.nf4_packed import PackedNF4
from ...nn.nf4_peft import meet
from ...ops.merge_contract import OUTPUTS
from ...ops.merge_undo import MergeRecord, merged_with_record, unchanged, unmerge_lora_
from ...ops.nf4 import NF4Weight

meet(LinearNF4, PackedNF4)
ORIGINAL = (
    "_peftops_unmerged"  # attribute of a merged layer: its weight and bias before
)
# What PEFT's layer holds while its own merge of a DoRA adapter merges the others again.
UNDER_WAY = "unmerged_base_weight"


class Unmerged(NamedTuple):
    """What a layer was before adapters were merged into it.

    Attributes:
        weight: the record of a dense weight, or the whole weight of a LinearNF4.
        bias: the base's bias, or None.
    """

    weight: MergeRecord | NF4Weight
    bias: Tensor | None

    @property
    def nbytes(self) -> int:
        """How much memory it takes."""
        bias = 0 if self.bias is None else self.bias.nbytes
        if isinstance(self.weight, MergeRecord):
            return self.weight.nbytes + bias
        return sum(t.nbytes for t in self.weight.base) + bias


@torch.no_grad()
def merge(layer: Any, safe_merge: bool, adapter_names: list[str] | None) -> None:
    """Merges adapters into the base layer, beside those that are merged already.

    Args:
        layer: a LoRA layer of PEFT.
        safe_merge: refuse adapters with NaN or infinity.
        adapter_names: the adapters to merge; None: the active ones.

    Raises:
        ValueError: safe_merge, and an adapter holds NaN or infinity.
        RuntimeError: an adapter has a bias and the base layer has none.
    """
    if not layer.merged_adapters:
        vars(layer).pop(ORIGINAL, None)  # of a merge that PEFT's own layer has undone
    merged_before_patch = layer.merged_adapters and ORIGINAL not in vars(layer)
    if merged_before_patch or UNDER_WAY in layer._caches:
        Linear.merge(layer, safe_merge, adapter_names)
        return
    names = check_adapters_to_merge(layer, adapter_names) or []
    names = [name for name in names if name in layer.lora_A]
    if type(layer.base_layer) is LinearNF4:
        for name in names:
            merge_packed(layer, safe_merge, name)
    elif names and is_dense(layer, names):
        merge_dense(layer, safe_merge, names)
    elif names:
        merged = [*layer.merged_adapters]
        if merged:  # PEFT can only unmerge what it has merged itself
            unmerge(layer)
        Linear.merge(layer, safe_merge, [*merged, *names])


def is_dense(layer: Any, names: Sequence[str]) -> bool:
    """Whether our operation merges these adapters into the layer's base as PEFT defines it."""
    base = layer.base_layer
    weight: Any = base._parameters.get("weight")
    if type(base) not in (nn.Linear, Conv1D) or type(weight) not in PLAIN:
        return False
    if layer.fan_in_fan_out != (type(base) is Conv1D):
        return False
    if weight.dtype not in OUTPUTS or weight.is_meta:
        return False
    return all(is_plain(layer, name, weight) for name in names)


def is_plain(layer: Any, name: str, weight: Tensor) -> bool:
    """Whether an adapter is LoRA or DoRA, in plain tensors on the weight's device."""
    variant = layer.lora_variant.get(name)
    if variant is not None and type(variant) is not DoraLinearVariant:
        return False
    parts = [layer.lora_A[name].weight, layer.lora_B[name].weight]
    if variant is not None:
        parts.append(layer.lora_magnitude_vector[name].weight)
    return all(
        type(t) in PLAIN and t.dtype in OUTPUTS and t.device == weight.device
        for t in parts
    )


def merge_dense(layer: Any, safe_merge: bool, names: list[str]) -> None:
    """Merges adapters into a dense base: one rounding for all, those that are merged included."""
    base = layer.base_layer
    held = vars(layer).get(ORIGINAL)
    factors, magnitudes = factors_of(layer, names)
    weight = dense_weight(base).detach()
    record = None if held is None else held.weight
    merged, record = merged_with_record(weight, factors, magnitudes, record)
    bias = merged_biases(layer, base.bias, names)
    expect_finite(merged, bias, names, safe_merge)
    if held is None:
        before = None if base.bias is None else base.bias.clone()
    else:
        before = held.bias
    (weight.T if record.transposed else weight).copy_(merged)
    if bias is not None:
        base.bias.copy_(bias)
    vars(layer)[ORIGINAL] = Unmerged(record, before)
    layer.merged_adapters.extend(names)


def factors_of(
    layer: Any, names: Sequence[str]
) -> tuple[list[tuple[Tensor, Tensor, float]], list[Tensor | None]]:
    """(lora_A, lora_B, scaling) and the magnitude of each adapter, as merge_lora takes them."""
    factors = []
    magnitudes = []
    for name in names:
        lora_A = layer.lora_A[name].weight
        lora_B = layer.lora_B[name].weight
        factors.append((lora_A, lora_B, layer.scaling[name]))
        dora = name in layer.lora_variant
        magnitudes.append(layer.lora_magnitude_vector[name].weight if dora else None)
    return factors, magnitudes


def expect_finite(
    weight: Tensor,
    bias: Tensor | None,
    names: Sequence[str],
    safe_merge: bool,
) -> None:
    """Raises if a merged weight or bias is to be checked and holds NaN or infinity."""
    checked = [weight] if bias is None else [weight, bias]
    if safe_merge and not all(t.isfinite().all() for t in checked):
        raise ValueError(
            f"NaNs detected in the merged weights."
            f" The adapter {', '.join(names)} seems to be broken"
        )


def merge_packed(layer: Any, safe_merge: bool, name: str) -> None:
    """Quantizes the original weight plus the deltas of all adapters, merged before or now."""
    base = cast(LinearNF4, layer.get_base_layer())
    warnings.warn(
        "merge: a merged weight in 4 bits is rounded again, which may change what is generated",
        stacklevel=4,
    )
    original: Any = vars(layer).get(ORIGINAL)
    if original is None:
        before = None if base.bias is None else base.bias.clone()
        original = Unmerged(base.quantized, before)
    weight = merged_weight(layer, original.weight, [*layer.merged_adapters, name])
    bias = merged_bias(layer, base.bias, name)
    expect_finite(weight, bias, [name], safe_merge)
    q = NF4Weight.quantize(weight, base.blocksize, base.double_quant, base.quant_type)
    base.hold(q.base, base.weight_dtype, q.block, q.quant_type)
    if bias is not None:
        base.bias.copy_(bias)
    vars(layer)[ORIGINAL] = original
    layer.merged_adapters.append(name)


def merged_weight(layer: Any, original: NF4Weight, names: list[str]) -> Tensor:
    """The weight (n, k) in fp32 with the deltas of these adapters."""
    weight = original.dequantize(torch.float32)
    for name in names:
        if name in layer.lora_variant:
            weight = layer.lora_variant[name].merge_safe(layer, name, weight)
        else:
            weight += layer.get_delta_weight(name).float()
    return weight


def merged_biases(
    layer: Any, bias: Tensor | None, names: Sequence[str]
) -> Tensor | None:
    """The base's bias with those of these adapters; None where none of them has one."""
    merged = None
    for name in names:
        more = merged_bias(layer, bias if merged is None else merged, name)
        merged = merged if more is None else more
    return merged


def merged_bias(layer: Any, bias: Tensor | None, name: str) -> Tensor | None:
    """The base's bias with that of this adapter; None where the adapter has none."""
    if not layer.lora_bias[name]:
        return None
    if bias is None:
        raise RuntimeError(
            f"merge: {name} must come without lora_bias, for the base layer has no bias"
        )
    return bias + layer.lora_B[name].bias * layer.scaling[name]


def fault(layer: Any) -> str | None:
    """Why a merged layer cannot be unmerged to the bit, or None."""
    held = vars(layer).get(ORIGINAL)
    if not layer.merged or held is None or not isinstance(held.weight, MergeRecord):
        return None
    if unchanged(dense_weight(layer.base_layer).detach(), held.weight):
        return None
    return "its merged weight was changed since"


@torch.no_grad()
def unmerge(layer: Any) -> None:
    """Restores the bits of before the first merge.

    Raises:
        ValueError: somebody changed the merged weight; nothing is changed then.
    """
    if ORIGINAL not in vars(layer):  # merged before patch, or not at all
        Linear.unmerge(layer)
        return
    base = layer.base_layer
    original, bias = vars(layer)[ORIGINAL]
    if isinstance(original, MergeRecord):
        unmerge_lora_(dense_weight(base), original)
    else:
        original = original.to(base.weight.device)
        base.hold(original.base, original.dtype, original.block, original.quant_type)
    if bias is not None:
        base.bias.copy_(bias)
    del vars(layer)[ORIGINAL]
    for name in layer.merged_adapters:
        # DoRA's merge leaves its norm there for PEFT's unmerge.
        layer._caches.pop(f"{name}-weight_norm", None)
    layer.merged_adapters.clear()
