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
OLDEST = "5.23.0"  # the transformers that enable needs


def __getattr__(name: str) -> Any:
    """Loads a public name on demand: checkpoint.py also runs with an older transformers."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with naming_extra("peft", "peft", "transformers"):
        if HOMES[name] == "nf4":
            refuse_old_transformers(name)
        return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)


def refuse_old_transformers(name: str) -> None:
    """Raises ImportError if the installed transformers is older than OLDEST."""
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) < Version(OLDEST):
        raise ImportError(
            f"integrations.transformers.{name} needs transformers {OLDEST} or newer, got"
            f" {transformers.__version__}: pip install --upgrade transformers"
        )
