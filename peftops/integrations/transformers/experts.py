"""Expert weights of three dimensions in 4 bits, dequantized only while their module runs."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...nn import LinearNF4
from ...nn.nf4_packed import PackedNF4
from ...nn.nf4_peft import meet
from ...ops.nf4 import NF4Weight

# The weights of the one module that backward is at: (module, name, dtype) -> dequantized weight.
_recent: dict[tuple[nn.Module, str, torch.dtype], Tensor] = {}


class PackedExperts(PackedNF4):
    """A weight (experts, n, k) in 4 bits.

    Its state dict holds the dequantized weight, which every loader of the model understands.
    """

    if TYPE_CHECKING:
        shape: tuple[int, ...]

    def __init__(self, q: NF4Weight):
        super().__init__()
        self.shape = tuple(q.shape)
        self.hold(q.base, q.dtype, q.block, q.quant_type)
        meet(LinearNF4, PackedNF4)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix[:-1]] = self.dequantize()

    def extra_repr(self) -> str:
        return (
            f"{self.shape}, {self.quant_type}, blocksize={self.blocksize}, "
            f"double_quant={self.double_quant}"
        )


def pack(
    module: nn.Module,
    name: str,
    weight: Tensor | NF4Weight,
    double_quant: bool,
    quant_type: str,
) -> None:
    """Replaces parameter `name` by PackedExperts: NF4 of the flattened weight.

    Args:
        module: the module of the experts. It gets hooks that dequantize the weight for its forward.
        name: the parameter.
        weight: (experts, n, k), quantized or not.
        double_quant: quantize the scales, too.
        quant_type: "nf4" or "fp4".
    """
    if not isinstance(weight, NF4Weight):
        weight = NF4Weight.quantize(weight.data, 64, double_quant, quant_type)
    delattr(module, name)
    module.add_module(name, PackedExperts(weight))
    if all(hook is not unpack for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(unpack)
        module.register_forward_hook(drop, always_call=True)


def packed(module: nn.Module) -> dict[str, PackedExperts]:
    """{name: PackedExperts} of a module's children."""
    children = module._modules.items()
    return {name: child for name, child in children if isinstance(child, PackedExperts)}


def unpack(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Before forward: sets the weights, dequantized in x's dtype, as attributes.

    Autograd saves where in a weight a tensor lies instead of the tensor; backward dequantizes the
    weight again.
    """
    dtype = args[0].dtype
    state = vars(module)
    names = {}  # address of a dequantized weight -> its name
    for name, weight in packed(module).items():
        state[name] = weight.dequantize(dtype)
        names[state[name].untyped_storage().data_ptr()] = name

    def save(t):
        name = names.get(t.untyped_storage().data_ptr())
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


def drop(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
    """After forward, also one that raised: removes what unpack has set."""
    state = vars(module)
    for name in packed(module):
        state.pop(name, None)
    state.pop("_peftops_hooks").__exit__()


def experts(model: nn.Module, wanted: Callable[[str], bool]) -> list[str]:
    """The names of the expert weights of three dimensions for which wanted(name) is true."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3
        and "expert" in name
        and isinstance(parameter, nn.Parameter)
        and wanted(name)
    ]
