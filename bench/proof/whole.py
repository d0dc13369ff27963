"""Steps of whole models with random weights: frozen, with stock PEFT and with peftops.

Shapes are those of Llama. Weights are bf16, or 4 bits for qlora. Adapters are fp32, on all linear
layers, under autocast.
"""

import time
from typing import NamedTuple

import torch

from peftops.cli import demo_contenders as training

from ..measure import finish, times
from ..model import STEP, contenders
from ..peers import BASE, LORA, OURS
from ..timing import Contender, said

STOCK, RANK = "PEFT", 16
CLOSE = 1e-3  # losses of one batch may differ by that much of themselves


class Plan(NamedTuple):
    """One model; `compiled` is torch.compile's mode for each decoder layer."""

    size: str
    method: str = "lora"
    dropout: float = 0.0
    compiled: str | None = None

    @property
    def name(self):
        mode = f", compiled ({self.compiled})" if self.compiled else ""
        return f"Llama, {self.size}, random weights, {self.method}{mode}"


PLANS = [
    Plan("1.2B"),
    Plan("1.2B", dropout=0.1),
    Plan("8B"),
    Plan("8B", "qlora"),
    Plan("1.2B", "dora"),
    Plan("1.2B", compiled="reduce-overhead"),
    Plan("8B", "dora"),
    Plan("8B", "qdora"),
]
TARGETS = {Plan("1.2B").name: 0.8}  # of PEFT's time
REHEARSED = [
    Plan("tiny", method, dropout)
    for method, dropout in (("lora", 0.1), ("qlora", 0.0), ("dora", 0.0))
]
SIZES = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "1.2B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
TOKENS = {"tiny": (2, 16), "1.2B": (4, 1024), "8B": (2, 1024)}


def measure(plans, device, end, rounds=5):
    """(line, losses) of each plan, until the time is up; a line is one of bench's results."""
    for plan in plans:
        if time.monotonic() > end:
            return
        torch._dynamo.reset()
        ids = torch.randint(
            96,
            TOKENS[plan.size],
            generator=torch.Generator().manual_seed(3),
        ).to(device)
        labels = {BASE: None} | contenders(plan.method)
        labels.pop(LORA, None)
        missing = training.absent(labels.values())
        absent = {
            who: missing[label] for who, label in labels.items() if label in missing
        }
        calls, losses = {}, {}
        for who in [who for who in labels if who not in absent]:
            try:
                calls[who] = step(
                    built(plan, labels[who], device),
                    ids,
                    who == BASE,
                    plan.compiled,
                )
                losses[who] = calls[who]().item()
            except (
                Exception
            ) as error:  # of somebody else's code, which may raise anything
                if who == OURS:
                    raise
                calls.pop(who, None)
                absent[who] = said(error)
        timed = {who: Contender({STEP: [call]}, device) for who, call in calls.items()}
        width = SIZES[plan.size]["hidden_size"]
        line = {
            "layer": plan.name,
            "op": "model",
            "dropout": plan.dropout,
            "absent": absent,
        }
        line["shape"] = ids.numel(), width, width, RANK
        yield (
            finish(line, *times(timed, STEP, rounds, device, modes=("eager",))),
            losses,
        )


def built(plan, label, device):
    """The frozen model where label is None, else the demo's contender with a B that is not zero."""
    model = llama(plan.size, device).requires_grad_(False)
    layers = model.model.layers
    if label:
        model = training.build(label, model, RANK, plan.dropout, 1).model
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.01)
    if plan.compiled:
        for layer in layers:
            layer.compile(mode=plan.compiled, dynamic=False)
    return model.train()


def llama(size, device):
    from transformers import AutoModelForCausalLM, LlamaConfig

    vocabulary, shared = (96, 2) if size == "tiny" else (128256, 8)
    config = LlamaConfig(
        **SIZES[size],
        num_key_value_heads=shared,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def step(model, ids, frozen, compiled):
    """Forward and backward; gradients go back to the input where nothing else takes any."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embed = model.get_input_embeddings()

    def run():
        if compiled == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        embedded = embed(ids).detach().requires_grad_(frozen)
        loss = training.forward_backward(
            model,
            ids,
            torch.bfloat16,
            inputs_embeds=embedded,
            use_cache=False,
        )
        for parameter in trained:
            parameter.grad = None
        return loss

    return run


def agree(line, losses):
    """Whether PEFT's loss and ours are equal; always so under dropout or where PEFT is absent."""
    ours = losses[OURS]
    stock = next(
        (loss for who, loss in losses.items() if who not in (BASE, OURS)), ours
    )
    return bool(line["dropout"]) or abs(ours - stock) <= CLOSE * abs(stock)
