"""Cases of multi-LoRA: batches that mix adapters of unequal ranks, scales, dropout and gains."""

import torch

from peftops.ops.lora_base import wide_dtype
from peftops.ops.multi_contract import PAGE

ROUTES = {  # how rows choose among 4 adapters; the third has no rank, the last no row
    "runs": lambda m: [i * 4 // max(m, 1) - 1 for i in range(m)],
    "mixed": lambda m: [(7 * i + i // 5) % 4 - 1 for i in range(m)],
    "base": lambda m: [-1] * m,
}
VARIANTS = {  # arguments of testing/cases.py: lora, and the route
    "runs": {"route": "runs"},
    "mixed": {"route": "mixed", "fp32": True, "bias": True},
    "dropout": {"route": "mixed", "p": 0.3, "bias": True},
    "transposed": {"route": "runs", "form": "transposed", "gain": True, "p": 0.5},
    "given": {"route": "mixed", "form": "given", "gain": True, "p": 0.1},
    "gain": {"route": "runs", "gain": True, "bias": True},
    "nf4": {"route": "runs", "form": "nf4", "fp32": True, "bias": True, "p": 0.1},
    "nf4-nested": {"route": "mixed", "form": "nf4", "nested": True, "gain": True},
    "base": {"route": "base", "gain": True, "bias": True},
}


def multi(tensors: dict, route: str, r: int, p: float) -> dict:
    """Every argument of multi-LoRA's ops by its name.

    Four slots have the ranks r, ⌈r/2⌉, 0 and r + 3. Their pages lie in a pool in another order,
    among pages that nobody uses; all that is not a slot's own is NaN.

    Args:
        tensors: the arguments of LoRA's ops of the same shape.
        route: one of ROUTES.
        r: the rank of the first slot.
        p: the probability of dropout of the second slot.
    """
    x, dy = tensors["x"], tensors["dy"]
    device = x.device
    m, k = x.shape
    n = dy.shape[1]
    wide = wide_dtype(x.dtype)
    adapter = tensors["a"].dtype
    generator = torch.Generator(device).manual_seed(m + k + n + r)

    def normal(*shape, dtype=wide):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    ranks = [r, -(-r // 2), 0, r + 3]
    pages = max(-(-rank // PAGE) for rank in ranks)
    pool = 4 * pages + 2
    table = torch.arange(pool, device=device).flip(0)[: 4 * pages]
    table = table.view(pages, 4).T.contiguous()
    a = normal(pool * PAGE, k, dtype=adapter)
    b = normal(pool * PAGE, n, dtype=adapter)
    own = torch.zeros(pool * PAGE, dtype=torch.bool, device=device)
    for slot, rank in enumerate(ranks):
        rows = PAGE * table[slot][:, None] + torch.arange(PAGE, device=device)
        own[rows.flatten()[:rank]] = True
    a[~own] = float("nan")
    b[~own] = float("nan")
    slots = torch.tensor(ROUTES[route](m), device=device)
    width = PAGE * pages
    h = normal(m, width, dtype=x.dtype)
    each = torch.tensor([*ranks, 0], device=device)[slots.long()]
    h[torch.arange(width, device=device) >= each[:, None]] = 0
    int32 = {"dtype": torch.int32, "device": device}
    return tensors | {
        "a": a,
        "b": b,
        "slots": slots.to(torch.int32),
        "table": table.to(torch.int32),
        "rank": torch.tensor(ranks, **int32),
        "scale": torch.tensor([0.7, 2.0, 1.0, -0.5], dtype=wide, device=device),
        "p": torch.tensor([0, p, 0.5, 1], dtype=wide, device=device) if p else None,
        "gain": None if tensors["gain"] is None else normal(4, n),
        "h": h,
        "need": [
            True,
            True,
            True,
            tensors["bias"] is not None,
            tensors["gain"] is not None,
        ],
    }


def parts(tensors: dict) -> dict:
    """Every argument of multi_add_ by its name: three layers side by side, the second empty.

    Args:
        tensors: what `multi` returns. The third part has lower ranks.
    """
    rank = tensors["rank"]
    table = tensors["table"]
    y = tensors["dy"]
    n = y.shape[1]
    middle = n // 3
    own = PAGE * table[:, :, None] + torch.arange(PAGE, device=y.device)
    each = torch.stack([rank, rank.flip(0), torch.minimum(rank, rank.roll(1))])
    a = torch.full_like(tensors["a"], float("nan")).expand(3, -1, -1).clone()
    b = torch.full_like(tensors["b"], float("nan"))
    widths = torch.tensor([middle, 0, n - middle], dtype=torch.int32, device=y.device)
    for part, columns in (0, slice(middle)), (2, slice(middle, n)):
        for slot, rows in enumerate(own.flatten(1)):
            live = rows[: each[part, slot]]
            a[part, live] = (part + 1) * tensors["a"][live]
            b[live, columns] = tensors["b"][live, columns]
    scale = torch.stack([tensors["scale"], tensors["scale"], -2 * tensors["scale"]])
    spare = y.new_ones(y.shape[0], 3)
    return tensors | {
        "y": torch.cat([y, spare], 1),
        "a": a,
        "b": b,
        "rank": each,
        "scale": scale,
        "widths": widths,
    }
