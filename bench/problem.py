"""A layer to measure, with its tensors, and how a peer says that it takes no part."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from .timing import copies

FEW = 64  # rows of a generation: no gradient, no dropout, no autocast
SCALING = 2.0


class Absent(Exception):
    """Why a peer does not take part, in words."""


@dataclass(frozen=True)
class Problem:
    """One layer. Every peer gets the same tensors.

    Attributes:
        shape: (m, k, n, r).
        dtype: of the weight and the input.
        device: where the tensors are.
        p: the probability of dropout.
        base: "dense", "nf4" or "nf4, double": how peers and ours store the weight.
        dora: the dropout_mode of a DoRA layer; empty for LoRA.
        adapters: of multi-LoRA; sample i has the adapter i % adapters.
        samples: x is (samples, m / samples, k) for multi-LoRA. It is (m, k) where this is 0.
        uneven: whether adapters have the ranks r, r/2, r/4, r/8, r and so on, instead of r.
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device
    p: float = 0.0
    base: str = "dense"
    dora: str = ""
    adapters: int = 1
    samples: int = 0
    uneven: bool = False

    @cached_property
    def tensors(self):
        """(weights, A, B, x, dy): as many copies of the weight as no cache holds.

        For multi-LoRA, A is (adapters, r, k) and B (adapters, n, r), with zeros beyond the rank.
        """
        m, k, n, r = self.shape
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*shape, scale=1.0):
            values = torch.randn(shape, generator=generator, device=self.device)
            return (values * scale).to(self.dtype)

        size = n * k * self.dtype.itemsize // (1 if self.base == "dense" else 4)
        weights = [
            normal(n, k, scale=k**-0.5) for _ in range(copies(size, self.device))
        ]
        each = (self.adapters,) if self.samples else ()
        rows = (self.samples, m // self.samples) if self.samples else (m,)
        a = normal(*each, r, k, scale=k**-0.5)
        b = normal(*each, n, r, scale=r**-0.5)
        x = normal(*rows, k)
        dy = normal(*rows, n)
        if self.uneven:
            for adapter, rank in enumerate(self.ranks):
                a[adapter, rank:] = 0
                b[adapter, :, rank:] = 0
        return weights, a, b, x, dy

    @property
    def ranks(self) -> list[int]:
        """The rank of each adapter."""
        r = self.shape[3]
        if not self.uneven:
            return [r] * self.adapters
        return [max(1, r >> adapter % 4) for adapter in range(self.adapters)]

    @property
    def slots(self) -> list[int]:
        """The adapter of each sample."""
        return [sample % self.adapters for sample in range(self.samples)]

    def first(self, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of x or y, from every sample."""
        if self.samples:
            return rows[:, : max(1, FEW // self.samples)]
        return rows[:FEW]

    @property
    def few(self) -> bool:
        return self.shape[0] <= FEW

    @property
    def mixed(self) -> bool:
        """Whether the layer runs under autocast."""
        return self.dtype != torch.float32 and not self.few


def frozen(t: Problem, w, a, b):
    """A peer, see peers.py: the base alone."""
    layer = nn.Linear(*reversed(w.shape), bias=False, device="meta")
    layer.weight = nn.Parameter(w, requires_grad=False)
    return layer, []
