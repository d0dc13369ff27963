"""A model of the shape of Llama-3.1-8B, its weights in 4 bits, trained on a card of 24 GB.

Every linear layer is a LoRALinear over a LinearNF4, under activation checkpoints. Weights are
random, since memory and time do not depend on them.
"""

import math
import time
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from peftops.nn import LinearNF4, LoRALinear

CAP = 24 * 10**9  # bytes of the card
RANK = 16


class Sizes(NamedTuple):
    layers: int
    width: int
    inner: int
    heads: int
    shared: int  # heads of keys and values
    vocabulary: int
    tokens: int


LARGE = Sizes(32, 4096, 14336, 32, 8, 128256, 1024)
TINY = Sizes(2, 64, 128, 4, 2, 96, 32)


def adapted(k, n, device):
    """A frozen layer in 4 bits, as bitsandbytes has it, and a LoRA over it."""
    base = LinearNF4(k, n, bias=False, device=device, dtype=torch.bfloat16)
    return LoRALinear(base, RANK, lora_alpha=2 * RANK).to(device)


class Block(nn.Module):
    def __init__(self, s, device):
        super().__init__()
        self.head = s.width // s.heads
        narrow = s.shared * self.head
        self.q = adapted(s.width, s.width, device)
        self.o = adapted(s.width, s.width, device)
        self.k = adapted(s.width, narrow, device)
        self.v = adapted(s.width, narrow, device)
        self.gate = adapted(s.width, s.inner, device)
        self.up = adapted(s.width, s.inner, device)
        self.down = adapted(s.inner, s.width, device)

    def forward(self, x):
        batch, tokens, width = x.shape
        normed = functional.rms_norm(x, (width,))
        projected = [layer(normed) for layer in (self.q, self.k, self.v)]
        heads = [
            y.view(batch, tokens, -1, self.head).transpose(1, 2) for y in projected
        ]
        y = functional.scaled_dot_product_attention(
            *heads, is_causal=True, enable_gqa=True
        )
        x = x + self.o(y.transpose(1, 2).reshape(batch, tokens, width))
        normed = functional.rms_norm(x, (width,))
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


class Stack(nn.Module):
    def __init__(self, s, device):
        super().__init__()
        self.embedded = (
            torch.randn(s.vocabulary, s.width, device=device, dtype=torch.bfloat16)
            * s.width**-0.5
        )
        self.blocks = nn.ModuleList(Block(s, device) for _ in range(s.layers))

    def forward(self, ids):
        x = functional.embedding(ids, self.embedded).requires_grad_()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        x = functional.rms_norm(x, x.shape[-1:])
        logits = functional.linear(x[:, :-1], self.embedded)
        return functional.cross_entropy(
            logits.flatten(0, 1).float(), ids[:, 1:].flatten()
        )


def train(s, device, end, steps=4):
    """What a few steps took; ok where they ran under the cap and the loss on one batch fell."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / whole), device)
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(0)
    model = Stack(s, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(s.vocabulary, (1, s.tokens), device=device)
    losses = []
    seconds = []
    while len(losses) < steps and (len(losses) < 2 or time.monotonic() < end - 5):
        start = time.perf_counter()
        loss = model(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    weights = sum(
        math.prod(module.shape)
        for module in model.modules()
        if isinstance(module, LinearNF4)
    )
    ok = losses[-1] < losses[0] and peak <= CAP
    return {
        "ok": ok,
        "losses": losses,
        "step_s": min(seconds[1:]),
        "peak_gb": peak / 1e9,
        "parameters": weights / 1e9,
        "layers": s.layers,
        "tokens": s.tokens,
    }
