"""PeftopsCallback: transformers' Trainer, and the trainers that TRL derives from it, train on peftops."""

import time
from importlib.util import find_spec

import torch
from transformers import TrainerCallback

from ..peft import lora_layers, patch, report


class PeftopsCallback(TrainerCallback):
    """Trainer(..., callbacks=[PeftopsCallback()]): the model is patched, and logs say what ran fused.

    The model is patched when the trainer is made, also where that made the PEFT model itself (TRL's peft_config), and
    again when training begins, for layers that came later. Lines of the log that have a loss gain lora_layers,
    fused_layers, peak_memory_gib and, under TrainingArguments(include_num_input_tokens_seen=...), tokens_per_second
    since the line before. state.log_history has them, and callbacks that come after this one; those of report_to come
    before, unless trainer.callback_handler.callbacks is reordered.

    strict: as in patch. Raises ValueError where training begins and there are no LoRA layers.
    """

    def __init__(self, *, strict=False):
        self.strict = strict
        self.before = time.monotonic(), 0

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if lora_layers(model):
            patch(model, strict=self.strict)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        patch(model, strict=self.strict)
        self.before = time.monotonic(), state.num_input_tokens_seen

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if "loss" not in logs:
            return
        found = report(model)
        more = {
            "lora_layers": found.fused + found.fallback,
            "fused_layers": found.fused,
            "peak_memory_gib": peak(),
        }
        (then, seen), self.before = self.before, (time.monotonic(), state.num_input_tokens_seen)
        if tokens := self.before[1] - seen:
            more["tokens_per_second"] = round(tokens / (self.before[0] - then), 1)
        logs.update(more)
        state.log_history[-1].update(more)


def peak():
    """GiB that this process ever held, of the GPU where there is one; None where nobody tells."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    if not find_spec("resource"):  # Windows
        return None
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
