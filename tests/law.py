"""The one tolerance of this project (law 4), for one tensor or many.

    assert error(out, exact) <= bound(same, exact)

`exact` is computed in float64. `same` is computed in the dtype of `out` by code that we trust: the
reference, or stock PEFT. Many tensors share the bound of the worst one, since what is one rounding
in one tensor may be the whole value of another.

One operation rounds so many numbers that its worst error is nearly the same in every order of
sums. The error of a chain (a whole model, a block, forward and backward) is not: later layers may
multiply what the first layers round. There `same` is one draw, and stock's own sums in a second
order may break the bound that the first order set. So several draws judge a chain:

    assert error(out, exact) <= chain_bound(orders(run), exact)

where run() computes `same`. This assumes that the errors of all correct orders of sums, ours among
them, are draws of one distribution, and that the largest of ORDERS draws shows its scale. The
constants are those of the one tolerance.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peftops.testing import law

ORDERS = 8
aten = torch.ops.aten
# linear and matmul are made of these
PRODUCTS = {op.default for op in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)}


def error(out, exact):
    """The error of a tensor, or the worst error of many."""
    if isinstance(out, torch.Tensor):
        return law.error(out, exact)
    return worst(law.error(*pair) for pair in zip(out, exact, strict=True))


def bound(same, exact):
    """The largest error that the tolerance allows."""
    if isinstance(same, torch.Tensor):
        return law.bound(same, same, exact)
    return worst(law.bound(a, a, b) for a, b in zip(same, exact, strict=True))


def chain_bound(draws, exact):
    """The largest bound that one of the draws allows."""
    return worst(bound(same, exact) for same in draws)


def worst(values):
    """The largest value, or NaN if there is one: Python's max() may overlook it."""
    return torch.tensor(list(values), dtype=torch.float64).max().item()


def orders(run):
    """The results of run() in ORDERS orders of sums, the original order first."""
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
