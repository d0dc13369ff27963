"""enable: transformers reads, makes and writes bitsandbytes' 4-bit checkpoints without it."""

import logging
import math
import warnings
from functools import partial
from importlib.util import find_spec
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps, _IdentityOp
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import (
    get_module_from_name,
    should_convert_module,
)

from ...nn import LinearNF4
from ...nn.nf4_packed import PackedNF4
from ...ops.nf4 import NF4Weight
from ...ops.nf4_state import STATE
from ...ops.nf4_tables import FOUR_BITS
from .. import Enabled
from .experts import PackedExperts, experts, pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

if find_spec("peft"):  # PEFT has to know LinearNF4 before it adapts a model
    from ..peft import layer_merge  # noqa: F401

log = logging.getLogger("peftops")
METHOD = "bitsandbytes_4bit"
# What follows `weight.` in the keys of a quantized weight.
ENDINGS = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    *(f"{STATE}{quant_type}" for quant_type in FOUR_BITS),
)
QUANTIZERS: dict[str, Any] = AUTO_QUANTIZER_MAPPING  # transformers calls what it finds
STOCK = QUANTIZERS[METHOD]
DeviceMap = dict[str, Any] | None


def enable(experts: bool = False) -> Enabled:
    """From now on, or inside `with enable():`, from_pretrained makes LinearNF4, not Linear4bit.

    It loads checkpoints that bitsandbytes saved, bit for bit, and quantizes others under
    BitsAndBytesConfig(load_in_4bit=True, ...); save_pretrained writes the bytes that bitsandbytes
    would. bitsandbytes need not be installed. Layers that bitsandbytes skips stay as they were.

    Args:
        experts: quantize expert weights of three dimensions, too. They are dequantized only while
            their module runs, forward and backward. They are saved in 16 bits, since no loader
            knows another form, and PEFT's target_parameters do not find them. By default they stay
            in 16 bits, as with bitsandbytes, and a warning names them.

    Returns:
        A context manager whose end puts back what was there before. Without `with`, disable() puts
        transformers' own quantizer back.
    """
    before = QUANTIZERS[METHOD]
    QUANTIZERS[METHOD] = partial(NF4Quantizer, experts=experts)
    return Enabled(lambda: QUANTIZERS.update({METHOD: before}))


def disable() -> None:
    """Lets from_pretrained make bitsandbytes' Linear4bit again."""
    QUANTIZERS[METHOD] = STOCK


def enable_nf4(experts: bool = False) -> Enabled:
    """Deprecated name of enable."""
    warnings.warn("enable_nf4 is now called enable", FutureWarning, stacklevel=2)
    return enable(experts)


class NF4Quantizer(HfQuantizer):
    """transformers' quantizer for load_in_4bit, whose layers are LinearNF4."""

    requires_calibration = False
    quantized_element_size = 0.5
    serialized_names = {  # noqa: RUF012
        "weight": ["weight", *(f"weight.{ending}" for ending in ENDINGS)],
    }
    is_trainable = True
    is_compileable = True
    quantization_config: BitsAndBytesConfig

    def __init__(
        self,
        quantization_config: BitsAndBytesConfig,
        experts: bool = False,
        **options: Any,
    ):
        super().__init__(quantization_config, **options)
        self.experts = experts
        # Name of an expert weight -> its NF4Weight, or None until it is loaded.
        self.packed: dict[str, NF4Weight | None] = {}

    def validate_environment(
        self, *args: Any, device_map: DeviceMap = None, **kwargs: Any
    ) -> None:
        """Refuses a device_map that offloads modules, as bitsandbytes does.

        accelerate brings such modules for a call only, and does not find their codes on the disk.
        """
        if not isinstance(device_map, dict):
            return
        if self.quantization_config.llm_int8_enable_fp32_cpu_offload:
            return
        offloaded = [
            f"{name or 'the model'} on {device}"
            for name, device in device_map.items()
            if device in ("cpu", "disk")
        ]
        if offloaded and set(device_map.values()) != {"cpu"}:
            raise ValueError(
                "load_in_4bit: device_map must leave no quantized module on the CPU or the disk "
                f"while others are elsewhere, got {offloaded[0]} "
                f"({len(offloaded)} of {len(device_map)}); "
                "llm_int8_enable_fp32_cpu_offload=True keeps them as they are, not quantized"
            )

    def update_device_map(self, device_map: DeviceMap) -> DeviceMap:
        if device_map is None and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return device_map

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        return {key: value * 0.9 for key, value in max_memory.items()}

    def param_needs_quantization(
        self, model: "PreTrainedModel", param_name: str, **kwargs: Any
    ) -> bool:
        module, name = get_module_from_name(model, param_name)
        return (
            isinstance(module, LinearNF4) and name == "weight"
        ) or param_name in self.packed

    def _process_model_before_weight_loading(self, model, device_map=None, **kwargs):
        config = self.quantization_config
        if getattr(model.config, "model_type", None) == "rwkv":
            raise ValueError(
                "load_in_4bit: rwkv models cannot be quantized, "
                "for their forward divides weights in place"
            )
        skip = self.get_modules_to_not_convert(
            model, config.llm_int8_skip_modules, model._keep_in_fp32_modules
        )
        if config.llm_int8_enable_fp32_cpu_offload and isinstance(device_map, dict):
            skip += [
                name for name, device in device_map.items() if device in ("disk", "cpu")
            ]
        self.modules_to_not_convert = skip
        for name, module in [*model.named_modules()]:
            is_linear = type(module) is nn.Linear or isinstance(module, Conv1D)
            if is_linear and should_convert_module(name, skip):
                model.set_submodule(name, empty(module, config))
        expert_names = experts(model, lambda name: should_convert_module(name, skip))
        self.packed = dict.fromkeys(expert_names) if self.experts else {}
        if expert_names and not self.experts:
            log.warning(
                "load_in_4bit: %d expert weights stay in 16 bits, %s and so on",
                len(expert_names),
                expert_names[0],
            )

    def _process_model_after_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        for name, weight in self.packed.items():
            module, attribute = get_module_from_name(model, name)
            pack(
                module,
                attribute,
                getattr(module, attribute) if weight is None else weight,
                config.bnb_4bit_use_double_quant,
                config.bnb_4bit_quant_type,
            )
        self.packed = {}
        model.is_loaded_in_4bit = True
        # transformers' own method imports bitsandbytes.
        model.num_parameters = MethodType(num_parameters, model)
        return model

    def _dequantize(self, model, dtype=None):
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, module in [*model.named_modules()]:
            if isinstance(module, PackedExperts):
                raise NotImplementedError(
                    f"load_in_4bit: {name} cannot be dequantized for good"
                )
            if isinstance(module, LinearNF4):
                linear = nn.Linear(
                    module.in_features,
                    module.out_features,
                    module.bias is not None,
                    device="meta",
                )
                linear.weight = nn.Parameter(
                    module.dequantize(dtype), requires_grad=False
                )
                linear.bias = module.bias
                model.set_submodule(name, linear.train(module.training))
        model.is_loaded_in_4bit = False
        vars(model).pop("num_parameters", None)
        return model

    def take(self, name: str, weight: Tensor) -> nn.Parameter:
        """Quantizes an expert weight as soon as it is loaded.

        Returns an empty parameter, which takes its place until all are loaded.
        """
        config = self.quantization_config
        options = config.bnb_4bit_use_double_quant, config.bnb_4bit_quant_type
        self.packed[name] = NF4Weight.quantize(weight.contiguous(), 64, *options)
        return nn.Parameter(weight.new_empty(0), requires_grad=False)

    def is_serializable(self) -> bool:
        return True

    def get_quantize_ops(self) -> "Quantize":
        return Quantize(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": Deserialize}


def empty(module: nn.Linear | Conv1D, config: BitsAndBytesConfig) -> LinearNF4:
    """The LinearNF4, on the meta device, that a layer becomes under a BitsAndBytesConfig."""
    if isinstance(module, Conv1D):
        k, n = module.weight.shape
    else:
        k, n = module.in_features, module.out_features
    layer = LinearNF4(
        k,
        n,
        module.bias is not None,
        double_quant=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        compute_dtype=config.bnb_4bit_compute_dtype,
        quant_storage=config.bnb_4bit_quant_storage,
        device="meta",
        dtype=module.weight.dtype,
    )
    layer.columns = isinstance(module, Conv1D)
    return layer.requires_grad_(False).train(module.training)


class Quantize(ConversionOps):
    """Quantizes the weights of a checkpoint that is not quantized."""

    def __init__(self, hf_quantizer: NF4Quantizer):
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str] | None = None,
        target_patterns: list[str] | None = None,
        *,
        model: Any = None,
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Any]:
        result = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            try:
                result[name] = self.quantized(name, value, model)
            except (TypeError, ValueError) as error:
                raise type(error)(f"load_in_4bit: {name}: {error}") from error
        return result

    def quantized(
        self, name: str, value: Tensor, model: "PreTrainedModel"
    ) -> nn.Parameter:
        """The parameter that holds the codes of a weight, once it is quantized."""
        if name in self.hf_quantizer.packed:
            return self.hf_quantizer.take(name, value)
        module, _ = get_module_from_name(model, name)
        module.quantize((value.T if module.columns else value).contiguous())
        module._is_hf_initialized = True
        return module.weight


class Deserialize(ConversionOps):
    """Loads the tensors of a weight that is quantized in the checkpoint.

    transformers leaves the tensors alone if the operation has an attribute hf_quantizer.
    """

    def __init__(self, hf_quantizer: NF4Quantizer):
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str] | None = None,
        target_patterns: list[str] | None = None,
        *,
        model: Any = None,
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Any]:
        if len(input_dict) == 1:
            return input_dict
        module, _ = get_module_from_name(model, full_layer_name)
        if not isinstance(module, LinearNF4):
            got = type(module).__name__
            raise TypeError(
                f"load_in_4bit: {full_layer_name} must be of a linear layer, got {got}"
            )
        module.load(
            {key: t[0] if isinstance(t, list) else t for key, t in input_dict.items()}
        )
        module._is_hf_initialized = True
        return {"weight": module.weight}

    @property
    def reverse_op(self) -> ConversionOps:
        return _IdentityOp()


def num_parameters(
    self: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """PreTrainedModel.num_parameters, where codes count as the elements of their weight.

    Scales do not count.
    """
    sizes = {}
    skipped = set()
    for module in self.modules():
        if isinstance(module, PackedNF4):
            sizes[id(module.weight)] = math.prod(module.shape)
            skipped |= {id(module.absmax), id(module.nested_absmax)}
        elif exclude_embeddings and isinstance(module, nn.Embedding):
            skipped.add(id(module.weight))
    return sum(
        sizes.get(id(p), p.numel())
        for p in self.parameters()
        if (p.requires_grad or not only_trainable) and id(p) not in skipped
    )
