"""PEFT: patch runs its LoRA layers on peftops; mlp.fuse, experimental, a SwiGLU of three at once.

plan.py decides whether a call runs fused, layer.py holds the classes, patch.py puts them in place.
"""

from ..._errors import naming_extra

with naming_extra("peft", "peft", "transformers"):
    from .layer import FUSED, OWN, Fused, FusedLinear
    from .merge import merge, unmerge
    from .patch import patch, unpatch
    from .report import Report, lora_layers, report

__all__ = [
    "FUSED",
    "OWN",
    "Fused",
    "FusedLinear",
    "Report",
    "lora_layers",
    "merge",
    "patch",
    "report",
    "unmerge",
    "unpatch",
]
