"""StateDictNF4: how a LinearNF4 is saved to and loaded from bitsandbytes' state dict."""

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops.nf4 import NF4Weight
from ..ops.nf4_state import write
from ..ops.nf4_tables import FOUR_BITS
from .nf4_packed import PackedNF4


class StateDictNF4(PackedNF4):
    """A PackedNF4 of two dimensions whose state dict is that of bitsandbytes' Linear4bit.

    A subclass gives it `bias` and `quant_storage`, the dtype in which the codes are saved. A weight
    that is not quantized is quantized when it is loaded. What cannot be loaded changes nothing.
    """

    if TYPE_CHECKING:
        bias: Any  # nn.Parameter or None, which nn.Linear's own type does not say
        quant_storage: torch.dtype

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        name = f"{prefix}weight"
        codes = self.weight if keep_vars else self.weight.detach()
        if self.quant_storage is not torch.uint8:
            codes = codes.flatten().view(self.quant_storage)[:, None]
        destination[name] = codes
        if self.bias is not None:
            destination[f"{prefix}bias"] = (
                self.bias if keep_vars else self.bias.detach()
            )
        if not self.weight.is_meta:
            base = [whole(t) for t in self.base().tensors]
            tensors = write(
                name,
                base,
                self.shape,
                self.weight_dtype,
                self.blocksize,
                self.quant_type,
            )
            destination.update({key: t for key, t in tensors.items() if key != name})

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in nn.Module. With strict, a missing or unexpected key leaves the layer as it is."""
        self._all_keys = strict  # _load_from_state_dict always gets strict=True
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:
            del self._all_keys

    def _load_from_state_dict(
        self,
        state_dict,
        prefix,
        local_metadata,
        strict,
        missing_keys,
        unexpected_keys,
        error_msgs,
    ):
        for hook in self._load_state_dict_pre_hooks.values():
            hook(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        name, bias_key = f"{prefix}weight", f"{prefix}bias"
        assign = local_metadata.get("assign_to_params_buffers", False)
        has_bias = self.bias is not None and bias_key in state_dict
        tensors = {
            key: t
            for key, t in state_dict.items()
            if key == name or key.startswith(f"{name}.")
        }
        missing, unexpected = [], []
        if strict:
            missing = self.find_missing(state_dict, prefix)
            unexpected = self.find_unexpected(state_dict, prefix, tensors)
        missing_keys += missing
        unexpected_keys += unexpected
        weight = None
        try:
            # torch.distributed.checkpoint adds the layer's own weight, which is not loaded.
            if tensors.get(name, self.weight) is not self.weight:
                weight = self.readied(tensors, name, assign)
            if has_bias:
                expect_bias(bias_key, state_dict[bias_key], self.bias)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix[:-1] or 'LinearNF4'}: {error}")
            return
        if (missing or unexpected) and vars(self).get("_all_keys"):
            return
        if weight is not None:
            self.take(*weight, assign)
        if has_bias:
            self.take_bias(state_dict[bias_key], assign)

    def find_missing(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """The keys of weight and bias that a state dict lacks."""
        own = {f"{prefix}weight": self.weight, f"{prefix}bias": self.bias}
        return [
            key for key, t in own.items() if t is not None and key not in state_dict
        ]

    def find_unexpected(
        self, state_dict: Mapping[str, Any], prefix: str, tensors: Mapping[str, Any]
    ) -> list[str]:
        """The keys with this prefix that are neither the layer's nor those of `tensors`."""
        known = set(tensors)
        for key, t in (*self._parameters.items(), *self._buffers.items()):
            if t is not None:
                known.add(f"{prefix}{key}")
        return [
            key for key in state_dict if key.startswith(prefix) and key not in known
        ]

    def take_bias(self, bias: Tensor, assign: bool) -> None:
        """Loads a bias that expect_bias has checked."""
        if assign or self.bias.is_meta:
            self.bias = nn.Parameter(bias, self.bias.requires_grad)
        else:
            with torch.no_grad():
                self.bias.copy_(bias)

    def load(
        self,
        tensors: dict[str, Tensor],
        name: str = "weight",
        assign: bool = False,
    ) -> None:
        """Loads the weight from a state dict, where it may be quantized or not.

        Args:
            tensors: the tensors of the weight by their keys: `name`, and those that begin with
                `name` and a dot.
            name: the key of the weight.
            assign: share the tensors, and their device, instead of copying them to the layer's.

        Raises:
            ValueError: a tensor does not fit the layer. The text names its key.
            TypeError: a tensor is of a dtype that cannot be loaded. The text names its key.
        """
        self.take(*self.readied(tensors, name, assign), assign)

    def readied(
        self, tensors: Mapping[str, Any], name: str, assign: bool
    ) -> tuple[NF4Weight, torch.dtype]:
        """(NF4Weight that fits this layer, dtype of its stored codes) of a state dict."""
        value = tensors.get(name)
        if (
            set(tensors) == {name}
            and isinstance(value, Tensor)
            and value.is_floating_point()
        ):
            return self.quantized_now(value, name, assign), self.quant_storage
        q = NF4Weight.load({key: whole(t) for key, t in tensors.items()}, name)
        if q.shape != self.shape:
            raise ValueError(
                f"LinearNF4: {name} must be {self.shape}, got {tuple(q.shape)}"
            )
        return q, tensors[name].dtype

    def quantized_now(self, value: Tensor, name: str, assign: bool) -> NF4Weight:
        """The NF4Weight of a weight that is not quantized in its state dict."""
        if value.shape != self.shape:
            raise ValueError(
                f"LinearNF4: {name} must be {self.shape}, got {tuple(value.shape)}"
            )
        if value.is_meta and not self.weight.is_meta:
            raise ValueError(
                f"LinearNF4: {name} must have data, got a tensor on the meta device"
            )
        if not assign and not self.weight.is_meta:
            value = value.to(self.weight.device)
        try:
            return NF4Weight.quantize(
                whole(value), self.blocksize, self.double_quant, self.quant_type
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}, in {name}") from None

    def take(self, q: NF4Weight, quant_storage: torch.dtype, assign: bool) -> None:
        """Loads what `readied` has returned."""
        device = self.weight.device
        move = not assign and device.type != "meta"
        self.quant_storage = quant_storage
        base, own = q.base, self.base().tensors
        if move and shapes_of(base[1:]) == shapes_of(own[1:]):
            for mine, theirs in zip(own, base, strict=True):
                fill(mine.detach(), theirs.view(mine.shape))
            self.weight_dtype = q.dtype
            self.blocksize = q.block
            self.quant_type = q.quant_type
            return
        if move:
            base = [t.to(device, copy=True) for t in base]
        self.hold([base[0].flatten(), *base[1:]], q.dtype, q.block, q.quant_type)

    def _fqn_modifiers(self):
        """Tells torch.distributed.checkpoint where to find the dotted keys below `weight`.

        It looks for an attribute of the weight behind every part of a key.
        """
        return {"weight": "_keys"}

    @property
    def _keys(self):
        """Has an attribute for every dotted key of the state dict."""
        states = SimpleNamespace(
            **{f"bitsandbytes__{name}": None for name in FOUR_BITS}
        )
        scales = "absmax", "quant_map", "nested_absmax", "nested_quant_map"
        return SimpleNamespace(
            weight=SimpleNamespace(quant_state=states, **dict.fromkeys(scales))
        )


def shapes_of(tensors: Iterable[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each."""
    return [(t.shape, t.dtype) for t in tensors]


def expect_bias(key: str, bias: object, own: Tensor) -> None:
    """Raises ValueError or TypeError for a bias that can neither replace `own` nor fill it."""
    if not isinstance(bias, Tensor):
        raise TypeError(f"LinearNF4: {key} must be a tensor, got {type(bias).__name__}")
    if bias.shape != own.shape:
        raise ValueError(
            f"LinearNF4: {key} must be {tuple(own.shape)}, got {tuple(bias.shape)}"
        )
    if not bias.is_floating_point():
        raise TypeError(
            f"LinearNF4: {key} must be of a floating point dtype, got {bias.dtype}"
        )
    if bias.layout is not torch.strided or (bias.is_meta and not own.is_meta):
        raise ValueError(
            f"LinearNF4: {key} must be a dense tensor with data, "
            f"got {bias.layout} on {bias.device}"
        )


def whole(t: Any) -> Tensor:
    """All of a tensor that FSDP2 may have sharded."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def fill(t: Any, source: Tensor) -> None:
    """Copies `source`, which every rank has all of, into a tensor that FSDP2 may have sharded."""
    if hasattr(t, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        source = distribute_tensor(
            source.to(t.device), t.device_mesh, t.placements, src_data_rank=None
        )
    t.copy_(source)
