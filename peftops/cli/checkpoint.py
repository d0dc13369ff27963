"""A transformers checkpoint folder: its shards, and which of their tensors are weights of linear layers.

What is quantized is what transformers would quantize on loading: it makes the model on the meta device, names the
modules to leave alone, and maps each tensor of the checkpoint to a parameter, all by transformers' own functions.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import BadInput, sentence

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS = {"F64", *DTYPES}
PARTS = (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4")  # keys beside that of a quantized weight


@dataclass
class Checkpoint:
    """config and index are the JSON objects of the files (index is None for a single file)."""

    folder: Path
    config: dict
    index: dict | None
    shards: dict[str, list[str]]  # the keys of each file
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
    """The Checkpoint of a folder, or BadInput: whatever is wrong with it is said before anything is written."""
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}")
    if not (folder / CONFIG).is_file():
        raise BadInput(f"{folder} holds no model: there is no {CONFIG}")
    config = read_json(folder / CONFIG)
    nested = [value for value in config.values() if isinstance(value, dict)]
    if any(part.get(name) for part in [config, *nested] for name in ("quantization_config", "compression_config")):
        raise BadInput(f"{folder} is already quantized: {CONFIG} has a quantization_config")
    index = None
    if not (folder / SINGLE).is_file():
        if not (folder / INDEX).is_file():
            raise BadInput(f"{folder} has no weights in safetensors: neither {SINGLE} nor {INDEX}")
        index = read_json(folder / INDEX)
    tensors = {name: header(folder / name) for name in shard_names(folder, index)}
    if index:
        for key, name in index["weight_map"].items():
            if key not in tensors[name]:
                raise BadInput(f"{folder / name} lacks {key}, which {INDEX} says it holds")
    model, dtype = meta_model(folder, tensors)
    checkpoint = Checkpoint(folder, config, index, {name: list(keys) for name, keys in tensors.items()}, dtype)
    plan(checkpoint, model, {key: value for keys in tensors.values() for key, value in keys.items()})
    return checkpoint


def read_json(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"cannot read {path}: it must hold a JSON object")
    return value


def shard_names(folder, index):
    if index is None:
        return [SINGLE]
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise BadInput(f"cannot read {folder / INDEX}: weight_map must name the file of each tensor")
    names = sorted(set(files.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BadInput(f"{folder / INDEX} must name safetensors files beside it, got {name!r}")
        if not (folder / name).is_file():
            raise BadInput(f"{folder} lacks the shard {name}")
    return names


def header(path):
    """{key: (dtype, shape)} of a file that is whole, or BadInput."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot read the shard {path}: {sentence(error)}") from None


def meta_model(folder, tensors):
    """(the model without its weights, the dtype it is loaded in)"""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    try:
        from transformers.initialization import meta_device_safe_creation_ops, no_tie_weights
        from transformers.modeling_utils import local_torch_dtype
    except ImportError:
        raise BadInput(f"transformers must be 5.0 or newer, got {transformers.__version__}") from None
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        stored = (DTYPES[dtype] for keys in tensors.values() for dtype, _ in keys.values() if dtype in DTYPES)
        dtype = config.dtype or next(stored, None)
        if dtype not in DTYPES.values():
            raise ValueError(f"it must be in float32, float16 or bfloat16, got {dtype}")
        named = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"), local_torch_dtype(dtype), no_tie_weights(), meta_device_safe_creation_ops():
            model = named(config) if named else transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a model's own code may raise anything
        raise BadInput(f"transformers cannot make the model of {folder}: {sentence(error)}") from None
    return model, dtype


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
    special = model._get_dtype_plan(checkpoint.dtype)
    match, names, _ = build_glob_alternation(list(special)) if special else (None, {}, None)
    for key, parameter in targets(model, tensors).items():
        dtype, shape = tensors[key]
        if dtype in FLOATS and parameters[parameter].is_floating_point():
            found = match and match.search(parameter)
            checkpoint.dtypes[key] = special[names[found.lastgroup]] if found else parameters[parameter].dtype
        if parameter not in wanted:
            continue
        if dtype not in FLOATS:
            raise BadInput(f"{checkpoint.folder} is already quantized: {key} is {dtype}")
        if shape != tuple(parameters[parameter].shape):
            raise BadInput(f"{key} must be {tuple(parameters[parameter].shape)} by {CONFIG}, got {shape}")
        checkpoint.linear[key] = wanted.pop(parameter)
    if not checkpoint.linear:
        raise BadInput(f"{checkpoint.folder} has no linear layers that bitsandbytes would quantize")
    checkpoint.kept = sorted(name.removesuffix(".weight") for name in wanted)
    if checkpoint.kept:
        checkpoint.skipped = sorted({*left, *checkpoint.kept})


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
        beside = [apply_renamings(key + part, renamings).removesuffix(part) for part in PARTS]
        if all(found(other)[0] == name for other in beside):
            direct[key] = name
    return direct
