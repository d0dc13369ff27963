"""A layer to measure, with its tensors, and how a peer says that it takes no part."""

from dataclasses import dataclass
from functools import cached_property

import torch

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
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device
    p: float = 0.0
    base: str = "dense"
    dora: str = ""

    @cached_property
    def tensors(self):
        """(weights, A, B, x, dy): as many copies of the weight as no cache holds."""
        m, k, n, r = self.shape
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*shape, scale=1.0):
            values = torch.randn(shape, generator=generator, device=self.device)
            return (values * scale).to(self.dtype)

        size = n * k * self.dtype.itemsize // (1 if self.base == "dense" else 4)
        weights = [
            normal(n, k, scale=k**-0.5) for _ in range(copies(size, self.device))
        ]
        a = normal(r, k, scale=k**-0.5)
        b = normal(n, r, scale=r**-0.5)
        x = normal(m, k)
        dy = normal(m, n)
        return weights, a, b, x, dy

    @property
    def few(self) -> bool:
        return self.shape[0] <= FEW

    @property
    def mixed(self) -> bool:
        """Whether the layer runs under autocast."""
        return self.dtype != torch.float32 and not self.few
