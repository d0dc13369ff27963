"""What QLoRA is for: a model of the shape of Llama-3.1-8B, its weights in 4 bits, trained on a card of 24 GB.

The 4-bit base is decoded by plain torch and handed to peftops as a dense weight, layer by layer, under activation
checkpoints, so that one decoded weight is alive at a time. Weights are random: memory and time do not depend on them.
"""

import time
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from peftops.functional import lora_linear

CAP = 24 * 10**9  # bytes of the card
BLOCK, RANK = 64, 16
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


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


class Linear4bit(nn.Module):
    """A frozen weight in 4-bit codes and scales of blocks, and a LoRA over it."""

    def __init__(self, k, n, device):
        super().__init__()
        self.shape = n, k
        self.codes = torch.randint(256, (n * k // 2,), dtype=torch.uint8, device=device)
        self.scales = torch.rand(n * k // BLOCK, 1, device=device, dtype=torch.bfloat16) * (2 * k**-0.5)
        table = torch.tensor(NF4, device=device)
        pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)  # of a byte: the high half comes first
        self.pairs = pairs.to(torch.bfloat16)
        self.lora_A = nn.Parameter(torch.randn(RANK, k, device=device) * k**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(n, RANK, device=device))

    def weight(self):
        values = functional.embedding(self.codes.int(), self.pairs)
        return values.view(-1, BLOCK).mul_(self.scales).view(self.shape)

    def forward(self, x):
        with torch.no_grad():
            weight = self.weight()
        return lora_linear(x, weight, self.lora_A, self.lora_B, scaling=2.0)


class Block(nn.Module):
    def __init__(self, s, device):
        super().__init__()
        self.head = s.width // s.heads
        narrow = s.shared * self.head
        self.q, self.o = Linear4bit(s.width, s.width, device), Linear4bit(s.width, s.width, device)
        self.k, self.v = Linear4bit(s.width, narrow, device), Linear4bit(s.width, narrow, device)
        self.gate, self.up = Linear4bit(s.width, s.inner, device), Linear4bit(s.width, s.inner, device)
        self.down = Linear4bit(s.inner, s.width, device)

    def forward(self, x):
        batch, tokens, width = x.shape
        normed = functional.rms_norm(x, (width,))
        heads = [part(normed).view(batch, tokens, -1, self.head).transpose(1, 2) for part in (self.q, self.k, self.v)]
        y = functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(batch, tokens, width))
        normed = functional.rms_norm(x, (width,))
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


class Stack(nn.Module):
    def __init__(self, s, device):
        super().__init__()
        self.embedded = torch.randn(s.vocabulary, s.width, device=device, dtype=torch.bfloat16) * s.width**-0.5
        self.blocks = nn.ModuleList(Block(s, device) for _ in range(s.layers))

    def forward(self, ids):
        x = functional.embedding(ids, self.embedded).requires_grad_()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        x = functional.rms_norm(x, x.shape[-1:])
        logits = functional.linear(x[:, :-1], self.embedded)
        return functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def train(s, device, end, steps=4):
    """What a few steps took; ok where they ran under the cap and the loss on one batch fell."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / whole), device)
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(0)
    model = Stack(s, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids, losses, seconds = torch.randint(s.vocabulary, (1, s.tokens), device=device), [], []
    while len(losses) < steps and (len(losses) < 2 or time.monotonic() < end - 5):
        start = time.perf_counter()
        loss = model(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    weights = sum(2 * module.codes.numel() for module in model.modules() if isinstance(module, Linear4bit))
    ok = losses[-1] < losses[0] and peak <= CAP
    return {
        "ok": ok, "losses": losses, "step_s": min(seconds[1:]), "peak_gb": peak / 1e9,
        "parameters": weights / 1e9, "layers": s.layers, "tokens": s.tokens,
    }  # fmt: skip
