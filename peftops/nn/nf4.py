"""LinearNF4: a frozen linear layer in 4 bits an element, under the keys of bitsandbytes."""

import math
import sys
from types import SimpleNamespace

import torch
from torch import nn

from ..functional import lora_linear
from ..ops.lora_base import no_delta
from ..ops.lora_formula import formula
from ..ops.nf4 import NF4Weight, expect_block, expect_quant_type
from ..ops.nf4_state import NESTED, scales_of, table_of, write
from ..ops.nf4_tables import FOUR_BITS
from .nf4_packed import PackedNF4
from .nf4_peft import meet


class LinearNF4(PackedNF4, nn.Linear):
    """y = x·Ŵᵀ + bias, where Ŵ = table[code] · absmax is read as it is, differentiable in x and bias.

    x (..., in_features) -> (..., out_features), in x's dtype, or autocast's. compute_dtype: x is cast to it first and
    y back to x's dtype, as bitsandbytes does. None: each call computes in its own x's dtype, where bitsandbytes keeps
    that of the first call. dtype is that of the weight before it was quantized, and of the bias.
    State dict, byte for byte, and options are those of bitsandbytes' Linear4bit (blocksize, double_quant for its
    compress_statistics, quant_type "nf4" or "fp4"). A state dict with a weight that is not quantized is quantized
    where it is loaded.

    Codes and scales are frozen parameters, which FSDP2 shards and no cast to another dtype changes. PEFT counts,
    initializes and merges over this layer as over its dense weight; what it cannot do is refused by name (nf4_peft.py).

    Raises ValueError for sizes, blocksize, quant_type, and weights that are not finite; TypeError for float64 weights.
    Source: Dettmers et al., QLoRA, arXiv 2305.14314.
    """

    def __init__(
        self, in_features, out_features, bias=True, *, blocksize=64, double_quant=True, quant_type="nf4",
        compute_dtype=None, quant_storage=torch.uint8, device=None, dtype=None,
    ):  # fmt: skip
        nn.Module.__init__(self)
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"LinearNF4: features must be at least 1, got {in_features} and {out_features}"
            )
        expect_quant_type("LinearNF4", quant_type)
        expect_block(blocksize)
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype, self.quant_storage = compute_dtype, quant_storage
        size, dtype = in_features * out_features, dtype or torch.get_default_dtype()
        count, wide, narrow = -(-size // blocksize), torch.float32, torch.uint8
        shapes = [(-(-size // 2), narrow), (16, wide), (count, wide)]
        if double_quant:
            shapes[2:] = [
                (count, narrow),
                (-(-count // NESTED), wide),
                (NESTED, wide),
                ((), wide),
            ]
        base = [torch.empty(shape, dtype=kind, device=device) for shape, kind in shapes]
        self.hold(base, dtype, blocksize, quant_type)
        self.bias = (
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
            if bias
            else None
        )
        if not self.weight.is_meta:
            self.reset_parameters()

    def hold(self, base, dtype, blocksize, quant_type):
        super().hold(base, dtype, blocksize, quant_type)
        meet(LinearNF4, PackedNF4)

    def reset_parameters(self):
        """The initial values of nn.Linear, quantized."""
        weight = torch.empty(
            self.out_features,
            self.in_features,
            dtype=self.weight_dtype,
            device=self.weight.device,
        )
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.quantize(weight)
        if self.bias is not None:
            nn.init.uniform_(
                self.bias, -1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features)
            )

    def quantize(self, weight):
        """Replaces the weight by what bitsandbytes makes of this one (out_features, in_features).

        Raises ValueError for another shape and for NaN and infinite elements, TypeError for another dtype than float32,
        float16 and bfloat16; the layer stays as it is then.
        """
        if isinstance(weight, torch.Tensor) and weight.shape != self.shape:
            raise ValueError(
                f"LinearNF4: weight must be {self.shape}, got {tuple(weight.shape)}"
            )
        q = NF4Weight.quantize(weight, self.blocksize, self.double_quant, self.quant_type)
        self.hold(q.base, q.dtype, q.block, q.quant_type)

    @classmethod
    def of(cls, q, bias=None, *, compute_dtype=None, quant_storage=torch.uint8):
        """A layer of an NF4Weight (out_features, in_features) and a bias (out_features,), which it shares."""
        if len(q.shape) != 2:
            raise ValueError(
                f"LinearNF4: weight must be (out_features, in_features), got {tuple(q.shape)}"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.out_features, self.in_features = q.shape
        self.compute_dtype, self.quant_storage = compute_dtype, quant_storage
        self.hold(q.base, q.dtype, q.block, q.quant_type)
        self.bias = (
            bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        )
        return self

    @classmethod
    def from_linear(
        cls, linear, blocksize=64, double_quant=True, quant_type="nf4", compute_dtype=None
    ):
        """The layer of an nn.Linear's weight, or of a Conv1D's, quantized; they share the bias."""
        transformers = sys.modules.get("transformers.pytorch_utils")
        columns = transformers and type(linear) is transformers.Conv1D
        if type(linear) is not nn.Linear and not columns:
            got = type(linear).__name__
            raise TypeError(
                f"LinearNF4: linear must be nn.Linear or transformers' Conv1D, got {got}"
            )
        weight = linear.weight.T if columns else linear.weight
        q = NF4Weight.quantize(weight.contiguous(), blocksize, double_quant, quant_type)
        return cls.of(q, linear.bias, compute_dtype=compute_dtype).train(linear.training)

    @classmethod
    def from_bnb(cls, linear):
        """The layer of a bitsandbytes Linear4bit, whose bytes it shares.

        Raises ValueError for one that is not quantized yet, and for one that bitsandbytes has repacked for inference
        on a CPU: its scales were rounded to bf16 then, so the weight is another.
        """
        weight = linear.weight
        state = getattr(weight, "quant_state", None)
        if state is None:
            raise ValueError(
                "LinearNF4: linear must be quantized, which .to(device) does, got one that is not"
            )
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "LinearNF4: linear must be as it was loaded, got one repacked for inference on a CPU"
            )
        codes = weight.detach().as_subclass(torch.Tensor).contiguous()
        about = state.shape, state.dtype, state.blocksize, state.quant_type
        q = NF4Weight(codes, table_of(state), scales_of(state), *about)
        options = {"compute_dtype": linear.compute_dtype, "quant_storage": codes.dtype}
        return cls.of(q, linear.bias, **options).train(linear.training)

    @property
    def shape(self):
        """(out_features, in_features); `weight` holds packed bytes of another shape."""
        return self.out_features, self.in_features

    def computes(self, x):
        """The dtype that x is cast to, autocast aside."""
        return (
            x.dtype
            if self.compute_dtype is None or x.dtype is torch.float64
            else self.compute_dtype
        )

    def bias_for(self, dtype):
        """The bias as lora_linear takes it, where x is of this dtype."""
        bias = self.bias
        return bias if bias is None or bias.dtype in (dtype, torch.float32) else bias.to(dtype)

    def forward(self, x):
        dtype, given = self.computes(x), x.dtype
        if dtype is not given:
            x = x.to(dtype)
        if torch.compiler.is_exporting():
            y = self.exported(x)
        else:
            delta = no_delta(self.in_features, self.out_features, dtype, x.device)
            y = lora_linear(x, self.base(dtype), *delta, self.bias_for(dtype))
        return y if self.compute_dtype is None else y.to(given)

    def exported(self, x):
        """y by torch's own operations, in x's dtype, for graphs that run where peftops is not"""
        base, bias = self.base(x.dtype), self.bias
        weight = formula("nf4_plain", base.tensors, base.block, self.shape, x.dtype)
        return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @property
    def W_q(self):
        """The codes, by the name under which PEFT looks for a layer that has dequantize()."""
        return self.weight

    @property
    def quant_state(self):
        """The NF4Weight, by the name under which PEFT looks for a layer that LoRA-GA cannot start from."""
        return self.quantized

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        name = f"{prefix}weight"
        codes = self.weight if keep_vars else self.weight.detach()
        stored = self.quant_storage
        destination[name] = (
            codes if stored is torch.uint8 else codes.flatten().view(stored)[:, None]
        )
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()
        if not self.weight.is_meta:
            base = [whole(t) for t in self.base().tensors]
            tensors = write(
                name, base, self.shape, self.weight_dtype, self.blocksize, self.quant_type
            )
            destination.update({key: t for key, t in tensors.items() if key != name})

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As nn.Module has it. What is refused changes nothing; under strict, a key too many or too few is refused."""
        self._all_keys = strict  # _load_from_state_dict is not told
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
        name, assign = f"{prefix}weight", local_metadata.get("assign_to_params_buffers", False)
        own = {name: self.weight, f"{prefix}bias": self.bias}
        missing = [
            key for key, t in own.items() if strict and t is not None and key not in state_dict
        ]
        tensors = {
            key: t for key, t in state_dict.items() if key == name or key.startswith(f"{name}.")
        }
        members = {
            f"{prefix}{key}"
            for key, t in (*self._parameters.items(), *self._buffers.items())
            if t is not None
        }
        known = members | set(tensors)
        unexpected = [
            key for key in state_dict if strict and key.startswith(prefix) and key not in known
        ]
        missing_keys += missing
        unexpected_keys += unexpected
        ready, bias_key = None, f"{prefix}bias"
        has_bias = self.bias is not None and bias_key in state_dict
        try:
            if (
                tensors.get(name, self.weight) is not self.weight
            ):  # torch.distributed.checkpoint adds what is there
                ready = self.readied(tensors, name, assign)
            if has_bias:
                expect_bias(bias_key, state_dict[bias_key], self.bias)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix[:-1] or 'LinearNF4'}: {error}")
            return
        if (missing or unexpected) and vars(self).get("_all_keys"):
            return
        if ready is not None:
            self.take(*ready, assign)
        if has_bias:
            self.take_bias(state_dict[bias_key], assign)

    def take_bias(self, bias, assign):
        if assign or self.bias.is_meta:
            self.bias = nn.Parameter(bias, self.bias.requires_grad)
        else:
            with torch.no_grad():
                self.bias.copy_(bias)

    def load(self, tensors, name="weight", assign=False):
        """Takes the weight from a state dict, quantized or not; raises ValueError or TypeError, naming the key.

        What cannot be loaded changes nothing. assign: share the tensors, and their device, instead of copying them to
        the layer's.
        """
        self.take(*self.readied(tensors, name, assign), assign)

    def readied(self, tensors, name, assign):
        """The NF4Weight of a state dict, which fits this layer, and the dtype that its codes are stored as."""
        given = tensors.get(name)
        if (
            set(tensors) == {name}
            and isinstance(given, torch.Tensor)
            and given.is_floating_point()
        ):
            if given.shape != self.shape:
                raise ValueError(
                    f"LinearNF4: {name} must be {self.shape}, got {tuple(given.shape)}"
                )
            if given.is_meta and not self.weight.is_meta:
                raise ValueError(
                    f"LinearNF4: {name} must have data, got a tensor on the meta device"
                )
            dense = given if assign or self.weight.is_meta else given.to(self.weight.device)
            try:
                q = NF4Weight.quantize(
                    whole(dense), self.blocksize, self.double_quant, self.quant_type
                )
            except (TypeError, ValueError) as error:
                raise type(error)(f"{error}, in {name}") from None
            return q, self.quant_storage
        q = NF4Weight.load({key: whole(t) for key, t in tensors.items()}, name)
        if q.shape != self.shape:
            raise ValueError(f"LinearNF4: {name} must be {self.shape}, got {tuple(q.shape)}")
        return q, given.dtype

    def take(self, q, quant_storage, assign):
        """Holds what readied has found."""
        device = self.weight.device
        move = not assign and device.type != "meta"
        self.quant_storage = quant_storage
        base, own = q.base, self.base().tensors
        if move and [(t.shape, t.dtype) for t in base[1:]] == [
            (t.shape, t.dtype) for t in own[1:]
        ]:
            for mine, theirs in zip(own, base, strict=True):
                fill(mine.detach(), theirs.view(mine.shape))
            self.weight_dtype, self.blocksize, self.quant_type = q.dtype, q.block, q.quant_type
            return
        if move:
            base = [t.to(device, copy=True) for t in base]
        self.hold([base[0].flatten(), *base[1:]], q.dtype, q.block, q.quant_type)

    def _fqn_modifiers(self):
        """For torch.distributed.checkpoint, which looks for an attribute of the weight behind every dotted key."""
        return {"weight": "_keys"}

    @property
    def _keys(self):
        kinds = SimpleNamespace(**{f"bitsandbytes__{kind}": None for kind in FOUR_BITS})
        parts = "absmax", "quant_map", "nested_absmax", "nested_quant_map"
        return SimpleNamespace(
            weight=SimpleNamespace(quant_state=kinds, **dict.fromkeys(parts))
        )

    def extra_repr(self):
        text = f"{super().extra_repr()}, {self.quant_type}, blocksize={self.blocksize}, double_quant={self.double_quant}"
        return (
            text
            if self.compute_dtype is None
            else f"{text}, compute_dtype={self.compute_dtype}"
        )


def expect_bias(key, given, own):
    """A bias that can be copied to a layer's, or stand in its place."""
    if not isinstance(given, torch.Tensor):
        raise TypeError(f"LinearNF4: {key} must be a tensor, got {type(given).__name__}")
    if given.shape != own.shape:
        raise ValueError(
            f"LinearNF4: {key} must be {tuple(own.shape)}, got {tuple(given.shape)}"
        )
    if not given.is_floating_point():
        raise TypeError(
            f"LinearNF4: {key} must be of a floating point dtype, got {given.dtype}"
        )
    if given.layout is not torch.strided or (given.is_meta and not own.is_meta):
        raise ValueError(
            f"LinearNF4: {key} must be a dense tensor with data, got {given.layout} on {given.device}"
        )


def whole(t):
    """All of a tensor that FSDP2 may have sharded."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def fill(t, source):
    """Copies what every rank has all of into a tensor that FSDP2 may have sharded."""
    if hasattr(t, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        source = distribute_tensor(
            source.to(t.device), t.device_mesh, t.placements, src_data_rank=None
        )
    t.copy_(source)
