"""A transformers checkpoint: its shards, and which tensors are weights of linear layers.

What is quantized is what transformers would quantize on loading. It makes the model on the meta
device, names the modules to leave alone, and maps each tensor of the checkpoint to a parameter,
all by transformers' own functions.
"""

import re
from collections.abc import Callable, Collection, Container, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..._errors import sentence
from .folder import (
    CONFIG,
    INDEX,
    SINGLE,
    file_in,
    is_file,
    is_plain,
    read_json,
    refuse_counts,
)
from .meta_model import DTYPES, Header, make_on_meta

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOATS = {"F64", *DTYPES}
UNREADABLE = {"F6_E2M3", "F6_E3M2"}  # safetensors has them, torch does not


@dataclass
class Checkpoint:
    """A folder whose files are whole and fit its config.

    Attributes:
        config: the JSON object in config.json.
        index: that in the index, or None for a single file.
        shards: the keys that loading takes from each file.
        dtype: the dtype in which the model is loaded.
        dtypes: the dtypes to which loading casts tensors, by key.
        linear: the weights to quantize, by key: are they (in, out), as Conv1D's are?
        kept: linear layers that loading makes of several tensors, or of none.
        skipped: modules to leave alone, where transformers' own choice is not enough.
    """

    folder: Path
    config: dict
    index: dict | None
    shards: dict[str, list[str]]
    dtype: torch.dtype
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    linear: dict[str, bool] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    skipped: list[str] | None = None

    @property
    def files(self) -> list[Path]:
        """Everything that the result depends on."""
        index = [INDEX] if self.index else []
        return [self.folder / name for name in [CONFIG, *index, *self.shards]]

    def stamps(self) -> dict[str, list[int]]:
        """[bytes, time of the last change] of each file, by name."""
        stats = {file.name: file.stat() for file in self.files}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def load(folder: Path) -> Checkpoint:
    """Reads everything but the weights, so that errors come before anything is written.

    Raises:
        ValueError: something is wrong with the folder. The text is one sentence for the user.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    if not is_file(folder / CONFIG):
        raise ValueError(f"{folder} holds no model: there is no {CONFIG}")
    config = read_config(folder)
    index = None
    if not is_file(folder / SINGLE):
        if not is_file(folder / INDEX):
            raise ValueError(
                f"{folder} has no weights in safetensors: neither {SINGLE} nor {INDEX}"
            )
        index = read_index(folder)
    headers = {
        name: read_header(file_in(folder, name)) for name in shard_names(folder, index)
    }
    if index:
        refuse_lost(folder, index, headers)
    tensors = {key: value for keys in headers.values() for key, value in keys.items()}
    homes = {
        key: name for name, keys in headers.items() for key in keys
    }  # the last one counts
    shards = {
        name: [key for key in keys if homes[key] == name]
        for name, keys in headers.items()
    }
    model, dtype = make_on_meta(folder, tensors)
    checkpoint = Checkpoint(folder, config, index, shards, dtype)
    map_tensors(checkpoint, model, tensors)
    return checkpoint


def refuse_lost(folder: Path, index: dict, headers: dict[str, Header]) -> None:
    """Refuses an index that names a tensor which its shard does not hold."""
    for key, name in index["weight_map"].items():
        if key not in headers[name]:
            raise ValueError(
                f"{folder / name} lacks {key}, which {INDEX} says it holds"
            )


def read_config(folder: Path) -> dict:
    """The content of config.json. Refuses a model that is quantized already."""
    path = file_in(folder, CONFIG)
    config = read_json(path)
    nested = [value for value in config.values() if isinstance(value, dict)]
    names = "quantization_config", "compression_config"
    if any(value.get(name) for value in [config, *nested] for name in names):
        raise ValueError(
            f"{folder} is already quantized: {CONFIG} has a quantization_config"
        )
    refuse_counts(path, config)
    if config.get("configuration_files"):
        raise ValueError(
            f"cannot read {path}: it names configuration_files in its place"
        )
    return config


def read_index(folder: Path) -> dict:
    """The content of the index of the shards."""
    path = file_in(folder, INDEX)
    index = read_json(path)
    files = index.get("weight_map")
    names = list(files.values()) if isinstance(files, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"cannot read {path}: weight_map must name the file of each tensor"
        )
    metadata = index.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError(f"cannot read {path}: metadata must be a JSON object")
    return index


def shard_names(folder: Path, index: dict | None) -> list[str]:
    """The files of the weights, each of which lies in the folder."""
    if index is None:
        return [SINGLE]
    names = sorted(set(index["weight_map"].values()))
    for name in names:
        if not is_plain(name) or not name.endswith(".safetensors"):
            raise ValueError(
                f"{folder / INDEX} must name safetensors files beside it, got {name!r}"
            )
        if not is_file(folder / name):
            raise ValueError(f"{folder} lacks the shard {name}")
    return names


def read_header(path: Path) -> Header:
    """{key: (dtype, shape)} of a file that is whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            tensors = {
                key: (entry.get_dtype(), tuple(entry.get_shape()))
                for key, entry in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the shard {path}: {sentence(error)}") from None
    for key, (dtype, _) in tensors.items():
        if dtype in UNREADABLE:
            raise ValueError(
                f"cannot read the shard {path}: {key} is {dtype}, which torch does not have"
            )
    return tensors


def map_tensors(
    checkpoint: Checkpoint, model: "PreTrainedModel", tensors: Header
) -> None:
    """Fills dtypes, linear, kept and skipped."""
    from transformers.quantizers.base import HfQuantizer

    in_fp32: Any = model._keep_in_fp32_modules
    excluded = HfQuantizer.get_modules_to_not_convert(model, None, in_fp32)
    wanted = linear_weights(model, excluded)
    parameters = model.state_dict()
    refuse_state(checkpoint.folder, tensors, parameters)
    special_dtype = dtype_rule(model, checkpoint.dtype)
    loaded: dict[str, str] = {}
    for key, parameter in loaded_alone(model, tensors).items():
        dtype, shape = tensors[key]
        if dtype in FLOATS and parameters[parameter].is_floating_point():
            checkpoint.dtypes[key] = (
                special_dtype(parameter) or parameters[parameter].dtype
            )
        if parameter not in wanted:
            continue
        if parameter in loaded:
            raise ValueError(
                f"{checkpoint.folder} holds {parameter} twice: as {loaded[parameter]} and as {key}"
            )
        if dtype not in FLOATS:
            raise ValueError(
                f"{checkpoint.folder} is already quantized: {key} is {dtype}"
            )
        if shape != tuple(parameters[parameter].shape) or 0 in shape:
            raise ValueError(
                f"{key} must be {tuple(parameters[parameter].shape)} by {CONFIG}, got {shape}"
            )
        loaded[parameter] = key
        checkpoint.linear[key] = wanted[parameter]
    checkpoint.kept = sorted(
        name.removesuffix(".weight") for name in wanted.keys() - loaded.keys()
    )
    refuse_packed(checkpoint, tensors)
    if not checkpoint.linear:
        raise ValueError(
            f"{checkpoint.folder} has no linear layers that bitsandbytes would quantize"
        )
    if checkpoint.kept:
        checkpoint.skipped = sorted({*excluded, *checkpoint.kept})


def linear_weights(model: "PreTrainedModel", excluded: list[str]) -> dict[str, bool]:
    """{name of a weight that transformers would quantize: is it (in, out)?}"""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    weights = {}
    for name, module in model.named_modules():
        is_linear = type(module) is torch.nn.Linear or isinstance(module, Conv1D)
        if is_linear and should_convert_module(name, excluded):
            weights[f"{name}.weight"] = isinstance(module, Conv1D)
    return weights


def dtype_rule(
    model: "PreTrainedModel", dtype: torch.dtype
) -> Callable[[str], torch.dtype | None]:
    """A function of a parameter's name: the dtype in which the model keeps it, or None."""
    from transformers.core_model_loading import build_glob_alternation

    special = model._get_dtype_plan(dtype)
    if not special:
        return lambda parameter: None
    pattern, globs = build_glob_alternation(list(special))[:2]

    def special_dtype(parameter):
        match = pattern.search(parameter)
        return special[globs[match.lastgroup]] if match else None

    return special_dtype


@cache
def state_endings() -> list[str]:
    """What bitsandbytes appends to the key of a weight in 4 bits, in any of its formats."""
    from ...ops.nf4 import NF4Weight
    from ...ops.nf4_tables import FOUR_BITS

    w = torch.zeros(64)
    endings = set()
    for quant_type in FOUR_BITS:
        for double_quant in (False, True):
            endings |= set(
                NF4Weight.quantize(w, 64, double_quant, quant_type).state_dict("")
            )
    return sorted(endings - {""})


def refuse_state(folder: Path, keys: Iterable[str], parameters: Container[str]) -> None:
    """Refuses a key that loading would take for a part of a weight in 4 bits."""
    endings = re.compile(f"(?:{'|'.join(map(re.escape, state_endings()))})(?!\\w)")
    stray = sorted(key for key in keys if key not in parameters and endings.search(key))
    if stray:
        raise ValueError(
            f"{folder} is already quantized, or was in part: it holds {listed(stray)}"
        )


def refuse_packed(checkpoint: Checkpoint, keys: Iterable[str]) -> None:
    """Refuses a layer that has tensors of another quantizer in the place of its weight."""
    lost = set(checkpoint.kept)
    packed = []
    for key in keys:
        layer, name = key.rpartition(".")[::2]
        if layer in lost and name not in ("weight", "bias"):
            packed.append(key)
    if packed:
        raise ValueError(
            f"{checkpoint.folder} is already quantized: "
            f"it holds {listed(sorted(packed))} and no weight"
        )


def listed(keys: list[str]) -> str:
    """The first key and how many more there are, for a message."""
    return (
        keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more such keys"
    )


def loaded_alone(model: "PreTrainedModel", keys: Collection[str]) -> dict[str, str]:
    """{key: parameter} of tensors that are loaded one for one, also when they are quantized."""
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

    def renamed(key, *rules):
        return rename_source_key(key, *rules, model.base_model_prefix, names)

    alone = {}
    for key in sorted(
        keys, key=dot_natural_key
    ):  # some renamings depend on what came before
        name, converter = renamed(key, renamings, converters)
        if name not in names and key in names:
            name, converter = renamed(key, [], [])
        if converter is not None or name not in names:
            continue
        beside = [
            apply_renamings(key + ending, renamings).removesuffix(ending)
            for ending in state_endings()
        ]
        if all(renamed(other, [], [])[0] == name for other in beside):
            alone[key] = name
    return alone
