"""A saved PEFT adapter: its config and the tensors of its safetensors file, read without torch and without a model."""

import math
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from .._errors import sentence
from . import config as config_file
from . import names, values

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LONGEST = 1000  # characters of a key
LARGEST_HEADER = 48 << 20  # bytes; of factors for 61 layers of 384 experts it takes 25 MiB
PART = re.compile(r"(.+)\.lora_(?:([AB])\.weight|embedding_([AB])|(B\.bias)|(magnitude_vector)(?:\.weight)?)")
NAMED = re.compile(r"(.+\.lora_(?:[AB]|embedding_[AB]|magnitude_vector))\.([^.]+)(\.weight|\.bias|)")
EMBEDDING = ".lora_embedding_"
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_checkpoint_wrapped_module": "checkpoint_wrapper",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "module": "DistributedDataParallel",  # at the front alone: inside, a model may call a part of it so
}
FIELDS = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
    "modules_to_save",
)


@dataclass
class Stored:
    """One tensor of the file, which starts at a byte and has so many."""

    key: str
    dtype: str
    shape: tuple
    start: int
    bytes: int
    finite: bool = True
    zero: bool = False


@dataclass
class Adapter:
    folder: Path
    config: dict
    tensors: dict[str, Stored]
    modules: dict[str, dict[str, Stored]] = field(default_factory=dict)  # module -> A, B, B.bias, magnitude_vector
    others: list[str] = field(default_factory=list)  # keys that are of no LoRA layer
    named: dict[str, str] = field(default_factory=dict)  # keys with the name of an adapter in them, which others holds
    wrapped: dict[str, list[str]] = field(default_factory=dict)  # the name of a wrapper -> keys that have it
    targets: dict[str, str] = field(default_factory=dict)  # what names.answer says of each module
    ranks: dict[str, int] = field(default_factory=dict)  # that rank_pattern has for a module
    saved: set[str] = field(default_factory=set)  # the others that are of modules_to_save
    unmet: dict[str, list] = field(default_factory=dict)  # names of the config that match no module

    def __post_init__(self):
        for key, stored in self.tensors.items():
            self.sort(key, stored)
        try:
            said = names.match(self.question())
        except ValueError as error:
            raise ValueError(f"{self.folder / CONFIG}: {error}") from None
        self.targets = dict(zip(self.modules, said["targets"], strict=True))
        ranks = list(self.config["rank_pattern"].values()) if self.is_lora else []
        matches = zip(self.modules, said["ranks"], strict=True)
        self.ranks = {module: ranks[index] for module, index in matches if index is not None}
        self.saved = {key for key, of_saved in zip(self.others, said["saved"], strict=True) if of_saved}
        self.unmet = said["unmet"]

    def sort(self, key, stored):
        """Puts a tensor where it belongs."""
        for name in wrappers(key):
            self.wrapped.setdefault(name, []).append(key)
        found = PART.fullmatch(key)
        if not found and (with_name := NAMED.fullmatch(key)):
            before, name, after = with_name.groups()
            if found := PART.fullmatch(before + after):
                self.named[key] = name
        if found:
            module, *parts = found.groups()
            held = self.modules.setdefault(plain(module), {})
            if held.setdefault(next(filter(None, parts)), stored) is not stored:
                found = None
        if not found or key in self.named:
            self.others.append(key)

    def question(self):
        """For names.match. Only LoRA's modules are matched; PEFT has other rules for other methods."""
        fields = FIELDS if self.is_lora else ("modules_to_save",)
        asked = {name: None for name in FIELDS} | {"target_parameters": []}
        asked |= {name: self.config.get(name) for name in fields}
        for name in ("rank_pattern", "alpha_pattern"):
            asked[name] = list(self.config[name]) if self.is_lora else []
        return asked | {"modules": list(map(owner, self.modules)), "keys": list(map(plain, self.others))}

    @property
    def is_lora(self):
        return self.config["peft_type"] == "LORA"

    @property
    def rank(self):
        """The largest of the config."""
        return max(self.config["r"], *self.config["rank_pattern"].values(), 0)

    def rank_of(self, module):
        """What the config wants, by PEFT's rule for patterns; None where A and B of several experts are stacked."""
        if self.targets[module] == "parameter":
            return None
        return self.ranks.get(module, self.config["r"])

    def __str__(self):
        dtypes = " and ".join({stored.dtype: None for stored in self.tensors.values()}) or "no tensors"
        kind = f"LoRA, rank {self.rank}, {len(self.modules)} modules" if self.is_lora else self.config["peft_type"]
        saved = self.config.get("peft_version")
        return f"{self.folder}: {kind}, {dtypes}" + (f", saved by PEFT {saved}" if saved else "")


def plain(key):
    return key.removeprefix(PREFIX)


def owner(module):
    """The module that PEFT was asked to adapt: it adapts parts of some, and wraps some twice."""
    return f"{module}.".partition(".base_layer.")[0].removesuffix(".")


def wrappers(key):
    """The names of wrappers of modules in a key."""
    if "_orig_mod" not in key and "module" not in key:  # as in most
        return []
    parts = key.split(".")
    held = [name for name in WRAPPERS if name in parts and name != "module"]
    if key.startswith("module.") or plain(key).startswith("module."):
        held.append("module")
    return held


def load(folder):
    """The Adapter in a folder, or ValueError where a file is missing or broken."""
    try:
        there = folder.is_dir()
    except OSError as error:
        raise ValueError(f"cannot read {folder}: {error.strerror}") from None
    if not there:
        raise ValueError(f"there is no folder {folder}")
    config = config_file.read(folder / CONFIG)
    path = folder / WEIGHTS
    if not path.exists():
        held = next((f", only {file.name}: save it as safetensors" for file in folder.glob("adapter_model.*")), "")
        raise ValueError(f"{folder} has no {WEIGHTS}{held}")
    size = config_file.regular(path)
    found = Adapter(folder, config, read_header(path, size))
    try:
        values.look(path, found.tensors.values())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    return found


def read_header(path, size):
    """{key: Stored} in the order of the file, of which safetensors says whether it is valid."""
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        with path.open("rb") as raw:
            end = 8 + int.from_bytes(raw.read(8), "little")
        if LARGEST_HEADER < end <= size:
            raise ValueError(f"{path} has a header of more than {LARGEST_HEADER >> 20} MiB: it is no adapter's")
        with safe_open(path, "numpy") as file:
            for key in file.offset_keys():
                entry = file.get_slice(key)
                dtype, shape = entry.get_dtype(), tuple(entry.get_shape())
                count = math.prod(shape) * bits(dtype) // 8
                tensors[key] = Stored(key, dtype, shape, end, count)
                end += count
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {sentence(error)}") from None
    if end != size:
        raise ValueError(f"{path} holds numbers of a kind whose size is unknown: {', '.join(dtypes(tensors))}")
    if long := next((key for key in tensors if len(key) > LONGEST), None):
        raise ValueError(f"{path}: a key has {len(long)} characters, more than {LONGEST}: {long[:80]}...")
    return tensors


def dtypes(tensors):
    return sorted({stored.dtype for stored in tensors.values()})


@cache
def bits(dtype):
    """Of one entry: safetensors writes them in the names of types, BOOL apart."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8


def faults(adapter):
    """(verdict, text) of what is wrong with the files, whoever loads them."""
    said = {"magnitude_vector": "use_dora", "B.bias": "lora_bias"}
    if not adapter.tensors:
        yield "broken", "no tensors are there"
    for name, keys in adapter.wrapped.items():
        yield "broken", f"{listed(keys)}: {WRAPPERS[name]} put {name} there; strip {name}. from the keys"
    for key, stored in adapter.tensors.items():
        if stored.dtype not in values.BYTES:
            yield "broken", f"{key} is {stored.dtype}, which is no floating point type of 16 bits or more"
        elif not stored.finite:
            yield "broken", f"{key} holds NaN or infinity"
    if not adapter.is_lora:
        return
    for module, parts in adapter.modules.items():
        if wrong := misshapen(adapter, module, parts):
            yield "broken", f"{module}: {wrong}"
        for part, name in said.items():
            if bool(adapter.config.get(name)) != (part in parts):
                yield "broken", f"{module} has {'a' if part in parts else 'no'} lora_{part}, unlike {name} in {CONFIG}"
    for part in "AB":
        if zero := [module for module, parts in adapter.modules.items() if part in parts and parts[part].zero]:
            share = f"{len(zero)} of {len(adapter.modules)} modules"
            yield "note", f"lora_{part} is all zero in {share}, {listed(zero)}: untrained, or lost in saving"


def listed(keys):
    """The first, and how many more."""
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return plain(keys[0]) + more


def misshapen(adapter, module, parts):
    """What is wrong with the tensors of a layer, or None: A is (r, in, …), B (out, r, …), others hold out entries."""
    for part, other in ("A", "B"), ("B", "A"):
        if part not in parts:
            return f"lora_{other} has no lora_{part}" if other in parts else "there is no lora_A and no lora_B"
    a, b, rank = parts["A"], parts["B"], adapter.rank_of(module)
    if (EMBEDDING in a.key) != (EMBEDDING in b.key):
        return "one of lora_A and lora_B is an embedding's, and the other is not"
    if a.dtype != b.dtype:
        return f"lora_A is {a.dtype} and lora_B {b.dtype}"
    if not a.bytes or not b.bytes:
        return f"lora_A is {a.shape} and lora_B {b.shape}: one is empty"
    if adapter.config.get("use_bdlora"):  # blocks, of other shapes
        return None
    if min(len(a.shape), len(b.shape)) < 2 or a.shape[0] != b.shape[1]:
        return f"lora_A is {a.shape} and lora_B {b.shape}, which have no rank in common"
    if rank not in (None, a.shape[0]):
        return f"the rank is {a.shape[0]}, and {rank} in {CONFIG}"
    wrong = [name for name in parts if name not in "AB" and math.prod(parts[name].shape) != b.shape[0]]
    return f"lora_{wrong[0]} is {parts[wrong[0]].shape} and lora_B {b.shape}" if wrong else None
