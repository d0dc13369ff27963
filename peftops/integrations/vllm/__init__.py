"""vLLM's plugin: the LoRA products of vLLM's layers by multi-LoRA's kernels.

vLLM finds it by its entry point, and it does nothing until an engine asks for it:

    vllm serve MODEL --enable-lora --additional-config '{"peftops": true}'

vLLM keeps its scheduler, its base products and the way in which it loads adapters. Experts, fully
sharded adapters and whole classification heads stay vLLM's.
"""

from .load import load_lora, load_lora_async
from .plugin import register

__all__ = ["load_lora", "load_lora_async", "register"]
