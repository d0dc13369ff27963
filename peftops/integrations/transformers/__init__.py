"""transformers: enable() loads, makes and saves 4-bit checkpoints; PeftopsCallback is for its Trainer."""

from .callback import PeftopsCallback
from .nf4 import disable, enable, enable_nf4

__all__ = ["PeftopsCallback", "disable", "enable", "enable_nf4"]
