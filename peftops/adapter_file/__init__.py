"""A saved PEFT adapter: load(folder) reads its two files, without torch and without a model.

It reads adapter_config.json and the header of adapter_model.safetensors, and looks at each
number in the tensors. faults(adapter) says where the files contradict themselves.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import names, values
from .config import read_config, size_of_file
from .header import Stored, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
LORA_TENSOR = re.compile(
    r"(.+)\.lora_(?:([AB])\.weight|embedding_([AB])|(B\.bias)|(magnitude_vector)(?:\.weight)?)"
)
NAMED = re.compile(
    r"(.+\.lora_(?:[AB]|embedding_[AB]|magnitude_vector))\.([^.]+)(\.weight|\.bias|)"
)
EMBEDDING = ".lora_embedding_"
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_checkpoint_wrapped_module": "checkpoint_wrapper",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    # Only at the front of a key: a model may have a module of this name.
    "module": "DistributedDataParallel",
}
OPTIONAL = {  # tensor -> the flag that asks for it
    "magnitude_vector": "use_dora",
    "B.bias": "lora_bias",
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
class Adapter:
    """The two files of a folder.

    Attributes:
        folder: where the files are.
        config: the fields of adapter_config.json, with PEFT's defaults.
        tensors: by key, in the order of the file.
        modules: module -> {A, B, B.bias or magnitude_vector: its tensor}.
        others: the keys that belong to no LoRA layer.
        named: those of others that contain the name of an adapter -> that name.
        wrapped: the name of a wrapper -> the keys that contain it.
        targets: what names.answer says of each module.
        ranks: the ranks that rank_pattern has for modules.
        alphas: the numbers that alpha_pattern has for modules.
        saved: those of others that belong to modules_to_save.
        unmet: the names in the config that match no module, by field.

    Raises:
        ValueError: a pattern in the config is no regex, or takes too long.
    """

    folder: Path
    config: dict
    tensors: dict[str, Stored]
    modules: dict[str, dict[str, Stored]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    named: dict[str, str] = field(default_factory=dict)
    wrapped: dict[str, list[str]] = field(default_factory=dict)
    targets: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    saved: set[str] = field(default_factory=set)
    unmet: dict[str, list] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, stored in self.tensors.items():
            self.sort(key, stored)
        try:
            answer = names.match(self.question())
        except ValueError as error:
            raise ValueError(f"{self.folder / CONFIG}: {error}") from None
        self.targets = dict(zip(self.modules, answer["targets"], strict=True))
        self.ranks = self.matched("rank_pattern", answer["ranks"])
        self.alphas = self.matched("alpha_pattern", answer["alphas"])
        others = zip(self.others, answer["saved"], strict=True)
        self.saved = {key for key, is_saved in others if is_saved}
        self.unmet = answer["unmet"]

    def matched(self, pattern: str, indices: list[int | None]) -> dict[str, Any]:
        """{module: its value in a field of patterns}, where one matches it."""
        values = list(self.config[pattern].values()) if self.is_lora else []
        matches = zip(self.modules, indices, strict=True)
        return {module: values[index] for module, index in matches if index is not None}

    def sort(self, key: str, stored: Stored) -> None:
        """Adds a tensor to modules, or its key to others; and the key to named and wrapped."""
        for wrapper in wrappers(key):
            self.wrapped.setdefault(wrapper, []).append(key)
        match = LORA_TENSOR.fullmatch(key)
        named = None if match else NAMED.fullmatch(key)
        if named:
            match = LORA_TENSOR.fullmatch(named[1] + named[3])
        if named and match:
            self.named[key] = named[2]
        is_of_module = match is not None and self.add_to_module(match, stored)
        if not is_of_module or key in self.named:
            self.others.append(key)

    def add_to_module(self, match: re.Match[str], stored: Stored) -> bool:
        """Adds a tensor to its module. False if the module has such a tensor; that one stays."""
        module, *labels = match.groups()
        held = self.modules.setdefault(without_prefix(module), {})
        label = next(filter(None, labels))
        return held.setdefault(label, stored) is stored

    def question(self) -> dict[str, Any]:
        """The question for names.match.

        Only a LoRA adapter asks about its modules: other methods have other rules.
        """
        fields = FIELDS if self.is_lora else ("modules_to_save",)
        question: dict[str, Any] = dict.fromkeys(FIELDS)
        question["target_parameters"] = []
        question |= {name: self.config.get(name) for name in fields}
        for name in ("rank_pattern", "alpha_pattern"):
            question[name] = list(self.config[name]) if self.is_lora else []
        question["modules"] = [adapted_module(module) for module in self.modules]
        question["keys"] = [without_prefix(key) for key in self.others]
        return question

    @property
    def is_lora(self) -> bool:
        return self.config["peft_type"] == "LORA"

    @property
    def rank(self) -> int:
        """The largest rank in the config."""
        return max(self.config["r"], *self.config["rank_pattern"].values(), 0)

    def rank_of(self, module: str) -> int | None:
        """The rank in the config; None where A and B of several experts are stacked."""
        if self.targets[module] == "parameter":
            return None
        return self.ranks.get(module, self.config["r"])

    def scaling_of(self, module: str) -> float:
        """What B·A is multiplied by: lora_alpha / r, or lora_alpha / √r with use_rslora."""
        rank = self.rank_of(module) or self.config["r"]
        alpha = self.alphas.get(module, self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def __str__(self) -> str:
        dtypes = " and ".join({stored.dtype: None for stored in self.tensors.values()})
        method = self.config["peft_type"]
        if self.is_lora:
            method = f"LoRA, rank {self.rank}, {len(self.modules)} modules"
        text = f"{self.folder}: {method}, {dtypes or 'no tensors'}"
        version = self.config.get("peft_version")
        return f"{text}, saved by PEFT {version}" if version else text


def without_prefix(key: str) -> str:
    """The name in the base model of a key or a module of the file."""
    return key.removeprefix(PREFIX)


def adapted_module(module: str) -> str:
    """The module that PEFT was asked to adapt.

    The name of a layer has .base_layer in it if PEFT adapts a part of that module, or wraps it
    twice.
    """
    return f"{module}.".partition(".base_layer.")[0].removesuffix(".")


def wrappers(key: str) -> list[str]:
    """The names of wrappers of modules in a key."""
    if "_orig_mod" not in key and "module" not in key:  # true of most keys
        return []
    words = key.split(".")
    held = [name for name in WRAPPERS if name in words and name != "module"]
    if key.startswith("module.") or without_prefix(key).startswith("module."):
        held.append("module")
    return held


def load(folder: Path) -> Adapter:
    """Reads the adapter in a folder. The package safetensors must be installed.

    Raises:
        ValueError: a file is missing or broken. The text is one sentence for the user.
    """
    adapter = read(folder)
    path = folder / WEIGHTS
    try:
        values.look_at_values(path, adapter.tensors.values())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    return adapter


def read(folder: Path) -> Adapter:
    """The same without a look at the numbers in the tensors: all count as finite."""
    try:
        is_folder = folder.is_dir()
    except OSError as error:
        raise ValueError(f"cannot read {folder}: {error.strerror}") from None
    if not is_folder:
        raise ValueError(f"there is no folder {folder}")
    config = read_config(folder / CONFIG)
    path = folder / WEIGHTS
    if not path.exists():
        raise ValueError(f"{folder} has no {WEIGHTS}{another_format(folder)}")
    return Adapter(folder, config, read_header(path, size_of_file(path)))


def another_format(folder: Path) -> str:
    """What a message says of weights in another format; empty if there are none."""
    file = next(folder.glob("adapter_model.*"), None)
    return f", only {file.name}: save it as safetensors" if file else ""


def faults(adapter: Adapter) -> Iterator[tuple[str, str]]:
    """(verdict, text) of what is wrong with the files, whoever loads them.

    The verdict is "broken", or "note" where the adapter may be as it should.
    """
    if not adapter.tensors:
        yield "broken", "no tensors are there"
    for wrapper, keys in adapter.wrapped.items():
        yield (
            "broken",
            f"{listed(keys)}: {WRAPPERS[wrapper]} put {wrapper} there;"
            f" strip {wrapper}. from the keys",
        )
    for key, stored in adapter.tensors.items():
        if stored.dtype not in values.BYTES:
            yield (
                "broken",
                f"{key} is {stored.dtype}, which is no floating point type of 16 bits or more",
            )
        elif not stored.finite:
            yield "broken", f"{key} holds NaN or infinity"
    if adapter.is_lora:
        yield from faults_of_modules(adapter)


def faults_of_modules(adapter: Adapter) -> Iterator[tuple[str, str]]:
    for module, tensors in adapter.modules.items():
        if wrong := misshapen(adapter, module, tensors):
            yield "broken", f"{module}: {wrong}"
        for label, flag in OPTIONAL.items():
            is_there = label in tensors
            if bool(adapter.config.get(flag)) != is_there:
                article = "a" if is_there else "no"
                yield (
                    "broken",
                    f"{module} has {article} lora_{label}, unlike {flag} in {CONFIG}",
                )
    for label in "AB":
        held = {
            module: tensors[label]
            for module, tensors in adapter.modules.items()
            if label in tensors
        }
        zero = [module for module, stored in held.items() if stored.zero]
        if zero:
            share = f"{len(zero)} of {len(adapter.modules)} modules"
            yield (
                "note",
                f"lora_{label} is all zero in {share}, {listed(zero)}:"
                " untrained, or lost in saving",
            )


def listed(keys: list[str]) -> str:
    """The first of these names, and how many more there are."""
    first = without_prefix(keys[0])
    return f"{first} and {len(keys) - 1} more" if len(keys) > 1 else first


def misshapen(adapter: Adapter, module: str, tensors: dict[str, Stored]) -> str | None:
    """What is wrong with the shapes of a layer, or None.

    A is (r, in, …), B is (out, r, …), and the others hold out numbers.
    """
    if "A" not in tensors and "B" not in tensors:
        return "there is no lora_A and no lora_B"
    if "A" not in tensors:
        return "lora_B has no lora_A"
    if "B" not in tensors:
        return "lora_A has no lora_B"
    a = tensors["A"]
    b = tensors["B"]
    rank = adapter.rank_of(module)
    if (EMBEDDING in a.key) != (EMBEDDING in b.key):
        return "one of lora_A and lora_B is an embedding's, and the other is not"
    if a.dtype != b.dtype:
        return f"lora_A is {a.dtype} and lora_B {b.dtype}"
    if not a.bytes or not b.bytes:
        return f"lora_A is {a.shape} and lora_B {b.shape}: one is empty"
    if adapter.config.get("use_bdlora"):  # BD-LoRA has blocks, with other shapes
        return None
    if min(len(a.shape), len(b.shape)) < 2 or a.shape[0] != b.shape[1]:
        return f"lora_A is {a.shape} and lora_B {b.shape}, which have no rank in common"
    if rank not in (None, a.shape[0]):
        return f"the rank is {a.shape[0]}, and {rank} in {CONFIG}"
    for label, stored in tensors.items():
        if label not in "AB" and math.prod(stored.shape) != b.shape[0]:
            return f"lora_{label} is {stored.shape} and lora_B {b.shape}"
    return None
