"""Named inputs of merging."""

import torch

VARIANTS = {  # for the weight's form, the share of each adapter in the rank, and whether it is DoRA
    "one": {},
    "rslora": {"scale": (16 / 8**0.5,), "fp32": True},
    "transposed": {"form": "transposed", "fp32": True},
    "two": {"scale": (2.0, -0.3)},
    "three, dora": {"scale": (1.5, 0.7, 2.0), "dora": True, "fp32": True},
    "transposed, dora": {"form": "transposed", "scale": (0.7, 1.0), "dora": True},
    "nf4": {"form": "nf4", "fp32": True},
    "nf4, dora": {"form": "nf4", "nested": True, "block": 32, "dora": True},
}


def merge(tensors: dict, scale: tuple[float, ...] = (0.7,), dora: bool = False) -> dict:
    """Arguments of merging's ops by name.

    Args:
        tensors: arguments of LoRA's ops by name.
        scale: of each adapter; the ranks are spread over the adapters unevenly.
        dora: whether there are gains.
    """
    a = tensors["a"]
    b = tensors["b"]
    device = a.device
    n, r = b.shape
    share = r // (len(scale) + 1)
    ranks = [share] * (len(scale) - 1)
    ranks.append(r - sum(ranks))
    gain = None
    if dora:
        spread = torch.linspace(-2, 3, len(scale) * n, dtype=torch.float64)
        gain = spread.view(-1, n).exp().to(device)
    return tensors | {
        "scale": torch.tensor(scale, dtype=torch.float64, device=device),
        "ranks": torch.tensor(ranks, dtype=torch.int32, device=device),
        "gain": gain,
        "transposed": tensors["form"] == "transposed",
    }
