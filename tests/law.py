"""The one tolerance of this project (law 4), for one tensor or many: assert error(out, exact) <= bound(same, exact).

`exact` is computed in float64, `same` in the dtype of `out` by somebody we trust: the reference, or stock PEFT. Many
tensors share the bound of the worst, since what is one rounding in one of them may be another's whole value.
"""

import torch
from peftops.bench import law


def error(out, exact):
    if isinstance(out, torch.Tensor):
        return law.error(out, exact)
    return worst(law.error(*pair) for pair in zip(out, exact, strict=True))


def bound(same, exact):
    if isinstance(same, torch.Tensor):
        return law.bound(same, same, exact)
    return worst(law.bound(a, a, b) for a, b in zip(same, exact, strict=True))


def worst(values):
    return torch.tensor(list(values), dtype=torch.float64).max().item()  # NaN is worst, which max() may overlook
