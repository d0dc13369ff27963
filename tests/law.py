"""The one tolerance of this project (law 4), for one tensor or many: assert error(out, exact) <= bound(same, exact).

`exact` is computed in float64, `same` in the dtype of `out` by somebody we trust: the reference, or stock PEFT. Many
tensors share the bound of the worst, since what is one rounding in one of them may be another's whole value.

One operation rounds so many numbers that its worst error is nearly the same in every order of sums. The error of a
chain (a whole model, a block, forward and backward) is not: what the first layers round, later ones may multiply.
There `same` is one draw, and a second order of stock's own sums may break a bound that the first one set. So a chain
is judged by several: assert error(out, exact) <= chain_bound(orders(run), exact), where run() gives `same`.

What is assumed: the errors of all correct orders of sums, ours among them, are draws of one distribution, and the
largest of ORDERS draws shows its scale. The constants are those of the one tolerance.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peftops.testing import law

ORDERS = 8
aten = torch.ops.aten
PRODUCTS = {
    op.default for op in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
}  # of which linear and matmul are made


def error(out, exact):
    if isinstance(out, torch.Tensor):
        return law.error(out, exact)
    return worst(law.error(*pair) for pair in zip(out, exact, strict=True))


def bound(same, exact):
    if isinstance(same, torch.Tensor):
        return law.bound(same, same, exact)
    return worst(law.bound(a, a, b) for a, b in zip(same, exact, strict=True))


def chain_bound(draws, exact):
    return worst(bound(same, exact) for same in draws)


def worst(values):
    return (
        torch.tensor(list(values), dtype=torch.float64).max().item()
    )  # NaN is worst, which max() may overlook


def orders(run):
    """What run() gives in ORDERS orders of sums, its own first."""
    draws = [run()]
    for seed in range(1, ORDERS):
        with Reordered(seed):
            draws.append(run())
    return draws


class Reordered(TorchDispatchMode):
    """Inside, every product of matrices adds the same terms in another order, in backward too."""

    def __init__(self, seed):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            *bias, left, right = args
            order = torch.randperm(left.shape[-1], generator=self.generator)
            args = *bias, left[..., order], right[..., order, :]
        return func(*args, **(kwargs or {}))
