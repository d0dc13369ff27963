"""The row model: a whole model's forward and backward, and its generation, frozen, with stock PEFT and with peftops.

The model, its text and its steps are those of `peftops demo`.
"""

import copy

import torch

from peftops.cli import training as t
from peftops.integrations.peft import path

from .lora import BASE, OPS, OURS

__all__ = ["OPS", "OURS", "measure"]

RANK, TOKENS = 16, 24  # of the adapters; in a generation


def measure(o, dtype, device, race):
    """A result for each dropout, under autocast as trainers do, and one for a generation of one sequence, without."""
    rounds = 3 if o.quick else 9
    base, tokenizer = t.load_model(None, dtype, device)
    batch = t.chunks(tokenizer, t.load_text(None), device)[: t.SHAPE[0]]
    width = base.config.hidden_size
    common = {"layer": "SmolLM2-135M, all linear layers", "backend": path(base.model.layers[0].mlp.up_proj.weight)}
    for p in (o.dropout,) if o.dropout is not None else (0.0, 0.1):
        models = {label: t.build(kind, copy.deepcopy(base), RANK, p, 0).model for label, kind in KINDS.items()}
        calls = {label: {"step without optimizer": step(model, batch, dtype)} for label, model in models.items()}
        calls[BASE] = {"step without optimizer": lambda: t.frozen_seconds(base, batch, dtype)}
        about = common | {"shape": (batch.numel(), width, width, RANK), "dropout": p}
        yield from race(calls, OURS, rounds, device, about)
    everyone = models | {BASE: base}
    calls = {label: {f"generate {TOKENS} tokens": generate(model, batch)} for label, model in everyone.items()}
    yield from race(calls, OURS, rounds, device, common | {"shape": (1, width, width, RANK), "dropout": 0.0})


KINDS = {"PEFT": t.STOCK, OURS: t.OURS}


def step(model, batch, dtype):
    """Forward and backward; gradients start from nothing, as after zero_grad."""

    def run():
        t.forward_backward(model, batch, dtype)
        for parameter in model.parameters():
            parameter.grad = None

    return run


def generate(model, batch):
    """TOKENS tokens, one at a time, after a short prompt."""
    model.eval()
    prompt = batch[:1, :16]
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}

    def run():
        with torch.inference_mode():
            model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **options)

    return run
