"""A saved PEFT adapter: its config and the tensors of its safetensors file, read without torch and without a model."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from . import BadInput

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}
EXPONENT = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}  # all set: infinite or NaN
PART = re.compile(r"(.+)\.lora_(?:(?:embedding_)?([AB])(?:\.weight)?|(B\.bias)|(magnitude_vector)(?:\.weight)?)")
LISTS = "target_parameters", "modules_to_save"


@dataclass
class Stored:
    """One tensor of the file."""

    dtype: str
    shape: tuple
    start: int  # in the file


@dataclass
class Adapter:
    folder: Path
    config: dict
    tensors: dict[str, Stored]
    modules: dict[str, dict[str, Stored]] = field(default_factory=dict)  # module -> A, B, B.bias, magnitude_vector
    others: list[str] = field(default_factory=list)  # keys that are of no LoRA layer

    def __post_init__(self):
        for key, stored in self.tensors.items():
            if found := PART.fullmatch(key):
                module, *parts = found.groups()
                self.modules.setdefault(plain(module), {})[next(filter(None, parts))] = stored
            else:
                self.others.append(key)

    @property
    def is_lora(self):
        return self.config.get("peft_type") == "LORA"

    @property
    def rank(self):
        """The largest of the config."""
        return max(self.config["r"], *self.config["rank_pattern"].values(), 0)

    def rank_of(self, module):
        """What the config wants, by PEFT's rule for patterns; None where A and B of several experts are stacked."""
        owners = {f".{name}".rpartition(".")[0] for name in self.config["target_parameters"]}
        if any(f".{module.removesuffix('.base_layer')}".endswith(owner) for owner in owners if owner):
            return None
        ranks = (r for key, r in self.config["rank_pattern"].items() if re.match(rf"(.*\.)?({key})$", module))
        return next(ranks, self.config["r"])

    def __str__(self):
        dtypes = " and ".join({stored.dtype: None for stored in self.tensors.values()}) or "no tensors"
        kind = f"LoRA, rank {self.rank}, {len(self.modules)} modules" if self.is_lora else self.config.get("peft_type")
        saved = self.config.get("peft_version")
        return f"{self.folder}: {kind}, {dtypes}" + f", saved by PEFT {saved}" * bool(saved)


def plain(key):
    return key.removeprefix("base_model.model.")


def load(folder):
    """The Adapter in a folder, or BadInput where a file is missing or broken."""
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}")
    config = read_config(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        held = next((f", only {file.name}: save it as safetensors" for file in folder.glob("adapter_model.*")), "")
        raise BadInput(f"{folder} has no {WEIGHTS}{held}")
    return Adapter(folder, config, read_header(folder / WEIGHTS))


def read_config(path):
    """The JSON object, with PEFT's defaults for what is read here."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(config, dict):
        raise BadInput(f"{path} must hold a JSON object, got {type(config).__name__}")
    defaults = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}} | {name: [] for name in LISTS}
    config |= {name: default for name, default in defaults.items() if config.get(name) is None}
    try:
        numbers = [config["lora_alpha"], *config["alpha_pattern"].values()]
        ranks = [config["r"], *config["rank_pattern"].values()]
        wrong = [r for r in ranks if type(r) is not int or r < 1] + [n for n in numbers if type(n) not in (int, float)]
        wrong += [name for names in LISTS for name in config[names] if not isinstance(name, str)]
        re.compile("|".join([*config["rank_pattern"], *config["alpha_pattern"]]))
    except (AttributeError, TypeError, re.error) as error:
        wrong = [error]
    if wrong:
        raise BadInput(f"{path} is no adapter's: {wrong[0]} in r, lora_alpha, their patterns, {' or '.join(LISTS)}")
    return config


def read_header(path):
    """{key: Stored}. The format: 8 bytes of length, that much JSON, and the tensors one after the other."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            end = 8 + int.from_bytes(file.read(8), "little")
            if not 8 < end <= size:
                raise ValueError(f"the header should end at {end}, and the file does at {size}")
            header, first = json.loads(file.read(end - 8)), end
        header.pop("__metadata__", None)
        tensors = {}
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = (first + offset for offset in entry["data_offsets"])
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            if start != end or (dtype in BITS and 8 * (stop - start) != BITS[dtype] * math.prod(shape)):
                raise ValueError(f"{key} does not lie where it should")
            tensors[key], end = Stored(dtype, shape, start), stop
        if end != size:
            raise ValueError(f"the last tensor should end at {end}, and the file does at {size}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is not a whole safetensors file: {error}") from None
    return tensors


def finite(path, stored):
    """Whether no entry is NaN or infinite. The file is mapped, not read into memory."""
    import numpy

    count = math.prod(stored.shape)
    if not count:
        return True
    entries = numpy.memmap(path, f"<u{BITS[stored.dtype] // 8}", "r", stored.start, count)
    mask = entries.dtype.type(EXPONENT[stored.dtype])
    return not (entries & mask == mask).any()


def faults(adapter):
    """What is wrong with the files, whoever loads them."""
    path, said = adapter.folder / WEIGHTS, {"magnitude_vector": "use_dora", "B.bias": "lora_bias"}
    if not adapter.tensors:
        yield "no tensors are there"
    for key, stored in adapter.tensors.items():
        if stored.dtype not in BITS:
            yield f"{key} is {stored.dtype}, which is no floating point type of 16 bits or more"
        elif not finite(path, stored):
            yield f"{key} holds NaN or infinity"
    for module, parts in adapter.modules.items() if adapter.is_lora else ():
        if wrong := misshapen(adapter, module, parts):
            yield f"{module}: {wrong}"
        for part, name in said.items():
            if bool(adapter.config.get(name)) != (part in parts):
                yield f"{module} has {'a' if part in parts else 'no'} lora_{part}, unlike {name} in {CONFIG}"


def misshapen(adapter, module, parts):
    """What is wrong with the tensors of a layer, or None: A is (r, in, …), B (out, r, …), others hold out entries."""
    for part, other in ("A", "B"), ("B", "A"):
        if part not in parts:
            return f"lora_{other} has no lora_{part}" if other in parts else "there is no lora_A and no lora_B"
    a, b, rank = parts["A"], parts["B"], adapter.rank_of(module)
    if a.dtype != b.dtype:
        return f"lora_A is {a.dtype} and lora_B {b.dtype}"
    if adapter.config.get("use_bdlora"):  # blocks, of other shapes
        return None
    if min(len(a.shape), len(b.shape)) < 2 or a.shape[0] != b.shape[1]:
        return f"lora_A is {a.shape} and lora_B {b.shape}, which have no rank in common"
    if rank not in (None, a.shape[0]):
        return f"the rank is {a.shape[0]}, and {rank} in {CONFIG}"
    wrong = [name for name in parts if name not in "AB" and math.prod(parts[name].shape) != b.shape[0]]
    return f"lora_{wrong[0]} is {parts[wrong[0]].shape} and lora_B {b.shape}" if wrong else None
