"""What patch has to know of bases in 4 bits: how to merge into a LinearNF4, and how to read a Linear4bit in place."""

import warnings

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge

from ..functional import Base
from ..nn.nf4 import LinearNF4
from ..nn.nf4_packed import PackedNF4
from ..nn.nf4_peft import meet
from ..ops.nf4 import NF4Weight
from ..ops.nf4_state import NESTED, scales_of, table_of

meet(LinearNF4, PackedNF4)
ORIGINAL = "_peftops_unmerged"  # attribute of a merged layer: its weight and bias before


@torch.no_grad()
def merge(layer, safe_merge, adapter_names):
    """Quantizes the sum of the weight and of all that is merged anew, from the weight there was at first."""
    if layer.merged_adapters and ORIGINAL not in vars(layer):  # merged before patch
        Linear.merge(layer, safe_merge, adapter_names)
        return
    base, adapter_names = layer.get_base_layer(), check_adapters_to_merge(layer, adapter_names) or []
    for name in adapter_names:
        if name not in layer.lora_A:
            continue
        warnings.warn(
            "merge: a merged weight in 4 bits is rounded again, which may change what is generated", stacklevel=3
        )
        original, bias = vars(layer).get(ORIGINAL) or (base.quantized, None if base.bias is None else base.bias.clone())
        names = [*layer.merged_adapters, name]
        weight = original.dequantize(torch.float32)
        for one in names:
            if one in layer.lora_variant:
                weight = layer.lora_variant[one].merge_safe(layer, one, weight)
            else:
                weight += layer.get_delta_weight(one).float()
        new_bias = None
        if layer.lora_bias[name]:
            if base.bias is None:
                raise RuntimeError(f"merge: {name} must come without lora_bias, for the base layer has no bias")
            new_bias = base.bias + layer.lora_B[name].bias * layer.scaling[name]
        if safe_merge and not all(t.isfinite().all() for t in (weight, new_bias) if t is not None):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        q = NF4Weight.quantize(weight, base.blocksize, base.double_quant, base.quant_type)
        base.hold(q.base, base.weight_dtype, q.block, q.quant_type)
        if new_bias is not None:
            base.bias.copy_(new_bias)
        vars(layer)[ORIGINAL] = original, bias
        layer.merged_adapters.append(name)


@torch.no_grad()
def unmerge(layer):
    """Restores the bits there were before the first merge, where PEFT subtracts and rounds once more."""
    if ORIGINAL not in vars(layer):  # merged before patch
        Linear.unmerge(layer)
        return
    base = layer.get_base_layer()
    original, bias = vars(layer).pop(ORIGINAL)
    original = original.to(base.weight.device)
    base.hold(original.base, original.dtype, original.block, original.quant_type)
    if bias is not None:
        base.bias.copy_(bias)
    for name in layer.merged_adapters:
        layer._caches.pop(f"{name}-weight_norm", None)  # where DoRA's merge leaves it for PEFT's unmerge
    layer.merged_adapters.clear()


def packed(base, weight):
    """(codes, Base, the dtype it computes in) of a bitsandbytes layer, or, as a string, why it is PEFT's own."""
    state = getattr(weight, "quant_state", None)
    if type(base).__name__ not in ("Linear4bit", "LinearNF4", "LinearFP4"):
        return f"base layer is {type(base).__name__}"
    if state is None:
        return "base weight is not quantized yet"
    if getattr(state, "packing_format_for_cpu", False):
        return "base weight is repacked for inference on a CPU"
    if tuple(state.shape) != (base.out_features, base.in_features):
        return "base weight is transposed"
    if state.nested and (state.state2.blocksize != NESTED or state.state2.dtype is not torch.float32):
        return "scales of the base weight"
    with torch._C.DisableTorchFunctionSubclass():
        codes = weight.detach().view(torch.uint8)
    if type(codes) is not torch.Tensor:
        return "a tensor is not plain"
    return codes, Base("nf4", [codes, table_of(state), *scales_of(state)], state.blocksize), base.compute_dtype
