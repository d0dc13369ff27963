"""A transformers checkpoint folder: its shards, and which of their tensors are weights of linear layers.

What is quantized is what transformers would quantize on loading: it makes the model on the meta device, names the
modules to leave alone, and maps each tensor of the checkpoint to a parameter, all by transformers' own functions.
"""

import re
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from ..._errors import sentence
from .folder import exists, inside, is_plain, read_json, refuse_counts

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS = {"F64", *DTYPES}
UNREADABLE = {"F6_E2M3", "F6_E3M2"}  # safetensors has them, torch does not
PARAMETERS_PER_TENSOR = 64  # a stacked tensor of a checkpoint may be as many experts of the model
PARAMETERS = 10_000


@dataclass
class Checkpoint:
    """config and index are the JSON objects of the files (index is None for a single file)."""

    folder: Path
    config: dict
    index: dict | None
    shards: dict[str, list[str]]  # the keys that loading takes from each file
    dtype: torch.dtype  # that the model is loaded in
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # and its tensors, which loading would cast
    linear: dict[str, bool] = field(default_factory=dict)  # weights to quantize: are they (in, out), as Conv1D's are
    kept: list[str] = field(default_factory=list)  # linear layers that loading makes of several tensors, or of none
    skipped: list[str] | None = None  # modules to leave alone, where transformers' own choice is not enough

    @property
    def files(self):
        """Everything that the result depends on."""
        return [self.folder / name for name in [CONFIG, *([INDEX] if self.index else []), *self.shards]]


def load(folder):
    """The Checkpoint of a folder, or ValueError: whatever is wrong with it is said before anything is written."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    if not exists(folder / CONFIG):
        raise ValueError(f"{folder} holds no model: there is no {CONFIG}")
    config = read_config(folder)
    index = None
    if not exists(folder / SINGLE):
        if not exists(folder / INDEX):
            raise ValueError(f"{folder} has no weights in safetensors: neither {SINGLE} nor {INDEX}")
        index = read_index(folder)
    headers = {name: header(inside(folder, name)) for name in shard_names(folder, index)}
    if index:
        for key, name in index["weight_map"].items():
            if key not in headers[name]:
                raise ValueError(f"{folder / name} lacks {key}, which {INDEX} says it holds")
    tensors = {key: value for keys in headers.values() for key, value in keys.items()}
    last = {key: name for name, keys in headers.items() for key in keys}  # loading takes the last of equal keys
    shards = {name: [key for key in keys if last[key] == name] for name, keys in headers.items()}
    model, dtype = meta_model(folder, tensors)
    checkpoint = Checkpoint(folder, config, index, shards, dtype)
    plan(checkpoint, model, tensors)
    return checkpoint


def read_config(folder):
    path = inside(folder, CONFIG)
    config = read_json(path)
    nested = [value for value in config.values() if isinstance(value, dict)]
    if any(part.get(name) for part in [config, *nested] for name in ("quantization_config", "compression_config")):
        raise ValueError(f"{folder} is already quantized: {CONFIG} has a quantization_config")
    refuse_counts(path, config)
    if config.get("configuration_files"):
        raise ValueError(f"cannot read {path}: it names configuration_files in its place")
    return config


def read_index(folder):
    path = inside(folder, INDEX)
    index = read_json(path)
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"cannot read {path}: weight_map must name the file of each tensor")
    metadata = index.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError(f"cannot read {path}: metadata must be a JSON object")
    return index


def shard_names(folder, index):
    if index is None:
        return [SINGLE]
    names = sorted(set(index["weight_map"].values()))
    for name in names:
        if not is_plain(name) or not name.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX} must name safetensors files beside it, got {name!r}")
        if not exists(folder / name):
            raise ValueError(f"{folder} lacks the shard {name}")
    return names


def header(path):
    """{key: (dtype, shape)} of a file that is whole, or ValueError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            tensors = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the shard {path}: {sentence(error)}") from None
    for key, (dtype, _) in tensors.items():
        if dtype in UNREADABLE:
            raise ValueError(f"cannot read the shard {path}: {key} is {dtype}, which torch does not have")
    return tensors


def meta_model(folder, tensors):
    """(the model without its weights, the dtype it is loaded in)"""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    try:
        from transformers.initialization import meta_device_safe_creation_ops, no_tie_weights
        from transformers.modeling_utils import local_torch_dtype
    except ImportError:
        raise ValueError(f"transformers must be 5.0 or newer, got {transformers.__version__}") from None
    most = PARAMETERS + PARAMETERS_PER_TENSOR * len(tensors)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config._attn_implementation = "eager"  # another may be code that is fetched from the hub
        stored = (DTYPES[dtype] for dtype, _ in tensors.values() if dtype in DTYPES)
        dtype = config.dtype or next(stored, None)
        if dtype not in DTYPES.values():
            raise ValueError(f"it must be in float32, float16 or bfloat16, got {dtype}")
        places = torch.device("meta"), local_torch_dtype(dtype), no_tie_weights(), meta_device_safe_creation_ops()
        with ExitStack() as stack:
            for place in (*places, bounded_parameters(most), warnings.catch_warnings()):
                stack.enter_context(place)
            warnings.simplefilter("ignore")
            model = make(config)
    except Exception as error:  # a model's own code may raise anything
        raise ValueError(f"transformers cannot make the model of {folder}: {sentence(error)}") from None
    return model, dtype


def make(config):
    """The class that config names, where transformers has it; code that comes with a model never runs."""
    import transformers

    named = getattr(transformers, (config.architectures or [""])[0], None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named(config)
    return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def bounded_parameters(most):
    """A context in which a model of more parameters is not made to its end."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    made = 0

    def count(module, name, parameter):
        nonlocal made
        made += 1
        if made > most:
            raise ValueError(f"{CONFIG} asks for more than {most} parameters, far more than the tensors of the weights")

    return register_module_parameter_registration_hook(count)


def plan(checkpoint, model, tensors):
    """Fills dtypes, linear, kept and skipped."""
    from transformers.core_model_loading import build_glob_alternation
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    left = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    wanted = {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if should_convert_module(name, left) and (type(module) is torch.nn.Linear or isinstance(module, Conv1D))
    }
    parameters = model.state_dict()
    refuse_state(checkpoint.folder, tensors, parameters)
    special = model._get_dtype_plan(checkpoint.dtype)
    match, names, _ = build_glob_alternation(list(special)) if special else (None, {}, None)
    loaded = {}
    for key, parameter in targets(model, tensors).items():
        dtype, shape = tensors[key]
        if dtype in FLOATS and parameters[parameter].is_floating_point():
            found = match and match.search(parameter)
            checkpoint.dtypes[key] = special[names[found.lastgroup]] if found else parameters[parameter].dtype
        if parameter not in wanted:
            continue
        if parameter in loaded:
            raise ValueError(f"{checkpoint.folder} holds {parameter} twice: as {loaded[parameter]} and as {key}")
        if dtype not in FLOATS:
            raise ValueError(f"{checkpoint.folder} is already quantized: {key} is {dtype}")
        if shape != tuple(parameters[parameter].shape) or 0 in shape:
            raise ValueError(f"{key} must be {tuple(parameters[parameter].shape)} by {CONFIG}, got {shape}")
        loaded[parameter] = key
        checkpoint.linear[key] = wanted[parameter]
    checkpoint.kept = sorted(name.removesuffix(".weight") for name in wanted.keys() - loaded.keys())
    refuse_packed(checkpoint, tensors)
    if not checkpoint.linear:
        raise ValueError(f"{checkpoint.folder} has no linear layers that bitsandbytes would quantize")
    if checkpoint.kept:
        checkpoint.skipped = sorted({*left, *checkpoint.kept})


@cache
def state_parts():
    """The endings of the keys that stand beside a weight in 4 bits, in any of bitsandbytes' formats."""
    from ...ops.nf4 import NF4Weight
    from ...ops.nf4_tables import FOUR_BITS

    w = torch.zeros(64)
    states = [NF4Weight.quantize(w, 64, double, name).state_dict("") for double in (False, True) for name in FOUR_BITS]
    return sorted({key for state in states for key in state if key})


def refuse_state(folder, keys, parameters):
    """ValueError where a key would be read as a part of a weight in 4 bits: it would take the place of ours."""
    parts = re.compile(f"(?:{'|'.join(map(re.escape, state_parts()))})(?!\\w)")
    stray = sorted(key for key in keys if key not in parameters and parts.search(key))
    if stray:
        raise ValueError(f"{folder} is already quantized, or was in part: it holds {some(stray)}")


def refuse_packed(checkpoint, keys):
    """ValueError where a layer has tensors of another quantizer in the place of its weight."""
    lost = set(checkpoint.kept)
    ours = {"weight", "bias"}
    packed = [key for key in keys if key.rpartition(".")[0] in lost and key.rpartition(".")[2] not in ours]
    if packed:
        raise ValueError(f"{checkpoint.folder} is already quantized: it holds {some(sorted(packed))} and no weight")


def some(keys):
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more such keys"


def targets(model, keys):
    """{key: parameter} of the tensors that are loaded one for one, also when they are quantized."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        apply_renamings,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    names = model.state_dict()

    def found(key, *rules):
        return rename_source_key(key, *(rules or ([], [])), model.base_model_prefix, names)

    direct = {}
    for key in sorted(keys, key=dot_natural_key):  # some renamings depend on what came before
        name, converter = found(key, renamings, converters)
        if name not in names and key in names:
            name, converter = found(key)
        if converter is not None or name not in names:
            continue
        beside = [apply_renamings(key + part, renamings).removesuffix(part) for part in state_parts()]
        if all(found(other)[0] == name for other in beside):
            direct[key] = name
    return direct
