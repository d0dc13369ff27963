"""Reads adapter_config.json with bounds, and checks the types of the fields that are used."""

import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rule = Callable[[Any], bool]  # whether a field may have this value

LARGEST = (
    8 << 20
)  # bytes; the largest that PEFT writes list the indices of a vocabulary
DEFAULTS: dict[str, Any] = {"modules_to_save": [], "target_parameters": []}
LORA_DEFAULTS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
}
FLAGS = "use_dora", "use_rslora", "lora_bias", "ensure_weight_tying"
VERSION = 100  # characters


def size_of_file(path: Path) -> int:
    """The size of a regular file in bytes.

    Raises:
        ValueError: it is no regular file, since a pipe or a device could block or never end; or
            it is empty.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {reason(error)}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file")
    if not status.st_size:  # the endless files of /proc have this size too
        raise ValueError(f"{path} is empty")
    return status.st_size


def read_config(path: Path) -> dict:
    """The JSON object in the file, with PEFT's defaults for the fields that are read here.

    Raises:
        ValueError: the file cannot be read, or a field has another type than PEFT gives it.
    """
    if size_of_file(path) > LARGEST:
        raise ValueError(
            f"{path} has more than {LARGEST >> 20} MiB: it is no adapter's"
        )
    config = parse(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return checked(config, path)


def checked(config: dict, path: Path) -> dict:
    """The config with PEFT's defaults for the fields that are read here.

    Raises:
        ValueError: a field has another type than PEFT gives it. path: what the text begins with.
    """
    defaults = DEFAULTS
    rules = GENERAL
    if config.get("peft_type") == "LORA":
        defaults = DEFAULTS | LORA_DEFAULTS
        rules = GENERAL | LORA
    missing = {
        name: default for name, default in defaults.items() if config.get(name) is None
    }
    config = config | missing
    for name, (is_allowed, wanted) in rules.items():
        if not is_allowed(config.get(name)):
            raise ValueError(
                f"{path}: {name} must be {wanted}, got {shown(config.get(name))}"
            )
    return config


def parse(path: Path) -> object:
    """The JSON in the file, of which at most LARGEST bytes are read."""
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST).decode()
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"cannot read {path}: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {reason(error)}") from None


def reason(error: Exception) -> object:
    """What the system says of an error, without the path. Other errors are told as they are."""
    return getattr(error, "strerror", None) or error


def shown(value: object) -> str:
    """A value in a few words."""
    if isinstance(value, str | int | float | None):
        return repr(value)[:80]
    return f"a {type(value).__name__}"


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_version(value: Any) -> bool:
    return value is None or (is_text(value) and len(value) <= VERSION)


def is_rank(value: object) -> bool:
    return type(value) is int and value >= 1


def is_scale(value: Any) -> bool:
    # NaN is not less; a whole number may be too large for a float
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_index(value: object) -> bool:
    return type(value) is int and value >= 0


def is_flag(value: object) -> bool:
    return value is None or isinstance(value, bool)


def list_of(is_allowed: Rule) -> Rule:
    """A rule for lists whose items this rule allows."""
    return lambda value: isinstance(value, list) and all(map(is_allowed, value))


def dict_of(is_allowed: Rule) -> Rule:
    """A rule for dicts whose values this rule allows."""
    return lambda value: (
        isinstance(value, dict)
        and all(map(is_text, value))
        and all(map(is_allowed, value.values()))
    )


def one_of(*rules: Rule) -> Rule:
    """A rule that allows null, and whatever one of these rules allows."""
    return lambda value: value is None or any(rule(value) for rule in rules)


NAMES = one_of(is_text, list_of(is_text)), "a string or a list of strings"
LAYERS = one_of(is_index, list_of(is_index)), "an index or a list of indices"
TOKENS = (
    one_of(list_of(is_index), dict_of(list_of(is_index))),
    "a list of indices, or one for each module",
)
GENERAL = {
    "peft_type": (is_text, "a string"),
    "peft_version": (is_version, f"a string of at most {VERSION} characters"),
    "task_type": (one_of(is_text), "a string"),
    "modules_to_save": (list_of(is_text), "a list of strings"),
    "target_parameters": (list_of(is_text), "a list of strings"),
}
LORA = {
    "r": (is_rank, "a whole number from 1 on"),
    "rank_pattern": (dict_of(is_rank), "an object of whole numbers from 1 on"),
    "lora_alpha": (is_scale, "a finite number"),
    "alpha_pattern": (dict_of(is_scale), "an object of finite numbers"),
    "bias": (is_text, "a string"),
    "init_lora_weights": (one_of(is_text, is_flag), "a string, true or false"),
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "layers_to_transform": LAYERS,
    "layers_pattern": NAMES,
    "trainable_token_indices": TOKENS,
} | {name: (is_flag, "true or false") for name in FLAGS}


def fields_of(config: Any, asker: str) -> dict[str, Any]:
    """The fields of a LoraConfig, or of a dict of them, as adapter_config.json has them.

    asker: who needs them, for errors.
    """
    if hasattr(config, "to_dict") and not isinstance(config, type):
        config = config.to_dict()
    if not isinstance(config, dict):
        got = type(config).__name__
        raise TypeError(f"{asker}: config must be a LoraConfig or a dict, got {got}")
    return {
        key: list(value) if isinstance(value, set) else value
        for key, value in config.items()
    }
