"""transformers: 4-bit checkpoints without bitsandbytes, and a callback for its Trainer."""

from importlib import import_module
from typing import Any

from ..._errors import naming_extra

HOMES = {
    "PeftopsCallback": "callback",
    "disable": "nf4",
    "enable": "nf4",
    "enable_nf4": "nf4",
}
__all__ = ["PeftopsCallback", "disable", "enable", "enable_nf4"]


def __getattr__(name: str) -> Any:
    """Loads a public name on demand: checkpoint.py also runs with an older transformers."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with naming_extra("peft", "peft", "transformers"):
        return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
