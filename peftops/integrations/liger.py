"""Liger-Kernel's fused cross entropy multiplies by the weight of a model's head itself, past an adapter on it."""

from peft.tuners.lora.layer import LoraLayer


def untrained(model):
    """Names of the LoRA layers that this keeps from training (huggingface/trl#4612)."""
    heads = {
        id(module.get_output_embeddings())
        for module in model.modules()
        if getattr(module.forward, "__module__", "").startswith("liger_kernel.")
        and hasattr(module, "lm_head")
    }
    return [
        name
        for name, layer in model.named_modules()
        if id(layer) in heads and isinstance(layer, LoraLayer)
    ]
