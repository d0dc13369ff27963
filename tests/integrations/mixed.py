"""A PEFT model with several adapters, and what each of them gives alone."""

import copy

import peft
import torch
from law import error
from tiny import tiny
from torch import nn

import peftops

ADAPTERS = {  # of unequal ranks and scalings; the second misses layers
    "b": {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj", "down_proj"]},
    "c": {"r": 9, "lora_alpha": 4, "use_rslora": True, "target_modules": "all-linear"},
}
NAMES = ["b", "default", "__base__", "c", "default", "b"]
TOKENS = torch.arange(72).view(6, 12) * 7 % 64


def several(dora=(), **config):
    """A stock model in training with three adapters, all of which train."""
    model = tiny(use_dora="default" in dora, **config)
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        dropout = config.get("lora_dropout", 0.0)
        model.add_adapter(
            name,
            peft.LoraConfig(
                init_lora_weights=False,
                lora_dropout=dropout,
                use_dora=name in dora,
                **options,
            ),
        )
    model.set_requires_grad(["default", *ADAPTERS])
    return model.train()


def several_in(dtype):
    """The same without dropout or DoRA, all of whose parameters are of this dtype."""
    model = several(dtype=dtype, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def exact_of(model):
    return copy.deepcopy(model).double()


def step(model, names, tokens=TOKENS, **more):
    """Logits, and the gradient of every trained parameter, of a sum of squares."""
    model.zero_grad()
    logits = model(input_ids=tokens, adapter_names=names, **more).logits
    logits.float().square().mean((1, 2)).sum().backward()
    return logits.detach(), gradients(model)


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def alone(model, names, tokens=TOKENS):
    """The same, each adapter's samples in a run of their own by PEFT."""
    model.zero_grad()
    logits = [None] * len(names)
    for name in dict.fromkeys(names):
        rows = [at for at, other in enumerate(names) if other == name]
        if name == "__base__":
            with model.disable_adapter():
                out = model(input_ids=tokens[rows]).logits
        else:
            model.set_adapter(name)
            out = model(input_ids=tokens[rows]).logits
        if out.requires_grad:
            out.float().square().mean((1, 2)).sum().backward()
        for at, row in zip(rows, out.detach(), strict=True):
            logits[at] = row
    model.set_adapter("default")
    model.set_requires_grad(["default", *ADAPTERS])
    return torch.stack(logits), gradients(model)


def flat(outcome):
    logits, grads = outcome
    return [logits, *(grad for grad in grads.values() if grad is not None)]


def on_two_ranks(rank):
    """A part of the batch on each rank; one adapter is on one rank only, and one on none."""
    names = ["b", "default", "__base__", "b", "b", "b"]
    ours = peftops.patch(several())
    whole = step(copy.deepcopy(ours), names)[1]
    ranked = nn.parallel.DistributedDataParallel(ours, find_unused_parameters=True)
    part = slice(3 * rank, 3 * rank + 3)
    step(ranked, names[part], TOKENS[part])
    for name, grad in gradients(ours).items():
        if whole[name] is None:
            assert grad is None, name
        else:  # ranks are averaged
            assert error(2 * grad, whole[name].double()) <= 1e-5, name
