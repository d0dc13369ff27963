"""Selective activation checkpointing: products and norms run once, and gradients stay the same."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import peftops
from peftops.nn import LinearNF4, LoRALinear

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCKS = {
    "lora": {},
    "nf4": {},
    "dora": {"use_dora": True},
    "dora, dropout of lora": {"use_dora": True, "dropout_mode": "lora"},
    "dora, norm differentiated": {"use_dora": True, "detach_norm": False},
}


def block(name, p):
    torch.manual_seed(0)
    options = {"lora_alpha": 6, "lora_dropout": p, "init_lora_weights": False} | BLOCKS[
        name
    ]
    layers = []
    for sizes in ((32, 48), (48, 32)):
        base = nn.Linear(*sizes)
        if name == "nf4":
            base = LinearNF4.from_linear(base)
        layers.append(LoRALinear(base, 4, **options))
    return nn.Sequential(layers[0], nn.GELU(), layers[1])


def step(model, x, run):
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = run(model, x)
    y.square().sum().backward()
    return [
        y.detach(),
        x.grad,
        *(p.grad for p in model.parameters() if p.requires_grad),
    ]


def plain(model, x):
    return model(x)


def checkpointed(model, x, **options):
    return checkpoint(model, x, use_reentrant=False, **options)


def selective(*more):
    """The contexts of a checkpoint that keeps outputs of our ops, and of these."""
    return partial(create_selective_checkpoint_contexts, peftops.sac_policy(*more))


@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", BLOCKS)
def test_forward_runs_once(name, p, rows, ops):
    model = block(name, p)
    x = torch.randn(rows, 32)
    ops.clear()
    expected = step(model, x, plain)
    forwards = counted(ops)
    for run, times in (
        (checkpointed, 2),
        (partial(checkpointed, context_fn=selective()), 1),
    ):
        ops.clear()
        out = step(model, x, run)
        assert all(map(torch.equal, out, expected))
        assert counted(ops) == {op: times * count for op, count in forwards.items()}


def counted(ops):
    """The ops of forward passes; a lora_gemv right before a lora_bwd computes x·aᵀ again."""
    counts = {op: ops.count(op) for op in ("lora_fwd", "lora_gemv", "dora_norm")}
    counts["lora_gemv"] -= sum(
        pair == ("lora_gemv", "lora_bwd") for pair in pairwise(ops)
    )
    return counts


def test_more_ops_are_kept():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(3, 8)
    calls = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            calls.append(op)
            return op(*args, **kwargs or {})

    counts = []
    product = torch.ops.aten.addmm.default
    for policy in (selective(), selective(product)):
        calls.clear()
        with Watch():
            step(model, x, partial(checkpointed, context_fn=policy))
        counts.append(calls.count(product))
    assert counts == [
        3,
        2,
    ]  # torch recomputes no further than the last tensor that it needs


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=str)
def test_a_patched_model(config, ops):
    """Through transformers' gradient_checkpointing_enable."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, vocab_size=64)
    )
    lora = {
        "target_modules": "all-linear",
        "init_lora_weights": False,
        "lora_dropout": 0.3,
    }
    model = peftops.patch(
        peft.get_peft_model(model, peft.LoraConfig(r=4, **lora, **config))
    )
    tokens = torch.arange(80).view(2, 40) % 64
    counts = []
    grads = []
    for options in ({}, {"context_fn": selective()}):
        model.gradient_checkpointing_enable({"use_reentrant": False} | options)
        ops.clear()
        model.zero_grad()
        torch.manual_seed(1)
        model(input_ids=tokens, labels=tokens).loss.backward()
        counts.append(ops.count("lora_fwd"))
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *grads)) and counts[0] == 2 * counts[1] > 0
