"""Expert weights of three dimensions in 4 bits, dequantized for the time that their module runs."""

import torch
from torch import nn

from ...nn.nf4_packed import PackedNF4
from ...ops.nf4 import NF4Weight

_recent = {}  # (module, name, dtype) -> the weights that backward is at, of one module


class PackedExperts(PackedNF4):
    """A weight (experts, n, k). Its state dict is the dequantized one, which every loader of the model understands."""

    def __init__(self, q):
        super().__init__()
        self.shape = tuple(q.shape)
        self.hold(q.base, q.dtype, q.block, q.quant_type)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix[:-1]] = self.dequantize()

    def extra_repr(self):
        return f"{self.shape}, {self.quant_type}, blocksize={self.blocksize}, double_quant={self.double_quant}"


def pack(module, name, weight, double_quant, quant_type):
    """Replaces parameter `name` by PackedExperts: NF4 of the flattened weight."""
    q = (
        weight
        if isinstance(weight, NF4Weight)
        else NF4Weight.quantize(weight.data, 64, double_quant, quant_type)
    )
    delattr(module, name)
    module.add_module(name, PackedExperts(q))
    if all(hook is not unpack for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(unpack)
        module.register_forward_hook(drop, always_call=True)


def packed(module):
    return {
        name: part for name, part in module._modules.items() if isinstance(part, PackedExperts)
    }


def unpack(module, args):
    """Before forward: the weights, in x's dtype, as attributes, and a way for backward to do without them."""
    dtype, parts, state = args[0].dtype, packed(module), vars(module)
    for name, part in parts.items():
        state[name] = part.dequantize(dtype)
    homes = {state[name].untyped_storage().data_ptr(): name for name in parts}

    def save(t):
        name = homes.get(t.untyped_storage().data_ptr())
        return t if name is None else (name, t.size(), t.stride(), t.storage_offset())

    def load(saved):
        if isinstance(saved, torch.Tensor):
            return saved
        name, *view = saved
        if (module, name, dtype) not in _recent:
            if any(owner is not module for owner, *_ in _recent):
                _recent.clear()
            if not _recent:
                torch.autograd.Variable._execution_engine.queue_callback(_recent.clear)
            _recent[module, name, dtype] = packed(module)[name].dequantize(dtype)
        return _recent[module, name, dtype].as_strided(*view)

    hooks = torch.autograd.graph.saved_tensors_hooks(save, load)
    hooks.__enter__()
    state["_peftops_hooks"] = hooks


def drop(module, args, out):
    """After forward, whatever became of it."""
    state = vars(module)
    for name in packed(module):
        state.pop(name, None)
    state.pop("_peftops_hooks").__exit__()


def experts(model, wanted):
    """The names of expert weights that are not linear layers, where wanted(name) is true."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3
        and "expert" in name
        and isinstance(parameter, nn.Parameter)
        and wanted(name)
    ]
