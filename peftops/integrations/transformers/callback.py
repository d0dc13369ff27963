"""PeftopsCallback: transformers' Trainer, and TRL's trainers, train on peftops."""

import time
from importlib.util import find_spec
from typing import Any

import torch
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..peft import lora_layers, patch, report


class PeftopsCallback(TrainerCallback):
    """Patches the model of a Trainer, and adds to its log what ran fused.

        Trainer(..., callbacks=[PeftopsCallback()])

    The model is patched when the trainer is made, also if the trainer makes the PEFT model itself
    (TRL's peft_config). It is patched again when training begins, for layers that came later.

    Lines of the log that have a loss gain these entries:
        lora_layers: how many there are.
        fused_layers: how many of them run on peftops.
        peak_memory_gib: the most that this process has held so far, of the GPU if there is one.
        tokens_per_second: since the line before; only under
            TrainingArguments(include_num_input_tokens_seen=...).
    state.log_history and callbacks after this one see them. Callbacks of report_to come before this
    one, unless trainer.callback_handler.callbacks is reordered.

    Args:
        strict: as in patch.

    Raises:
        ValueError: when training begins, the model has no LoRA layers; with strict, a layer cannot
            be fused.
    """

    def __init__(self, *, strict: bool = False):
        self.strict = strict
        self.last_log = time.monotonic(), 0  # seconds, and tokens seen by then

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if lora_layers(model):
            patch(model, strict=self.strict)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        patch(model, strict=self.strict)
        self.last_log = time.monotonic(), state.num_input_tokens_seen

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        layers = report(model)
        entries: dict[str, Any] = {
            "lora_layers": layers.fused + layers.fallback,
            "fused_layers": layers.fused,
            "peak_memory_gib": peak_memory_gib(),
        }
        last_time, last_seen = self.last_log
        now, seen = time.monotonic(), state.num_input_tokens_seen
        self.last_log = now, seen
        if seen > last_seen:
            entries["tokens_per_second"] = round(
                (seen - last_seen) / (now - last_time), 1
            )
        logs.update(entries)
        state.log_history[-1].update(entries)


def peak_memory_gib() -> float | None:
    """The most GiB that this process has held, of the GPU if there is one; None on Windows."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    if not find_spec("resource"):
        return None
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
