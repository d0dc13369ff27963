"""The row merge: an adapter merged into a 16-bit weight and taken out again, beside PEFT's layer.

PEFT's unmerge subtracts and rounds again; ours restores every bit, for which it keeps a record.
"""

from functools import partial

import torch

import peftops.functional as F
from peftops import backends

from . import lora, peers
from .peers import COPY, OURS, SCALING
from .timing import copies

OPS = ("merge_add", "merge_undo")
RANK = 16
TARGETS = []  # its layers are no layers(x)
SHAPES = {  # (n, k)
    "cpu": [(n, k) for _, k, n, _ in lora.SMOL.values()],
    "cuda": [(4096, 4096), (14336, 4096)],
}


def layers(device: torch.device, quick: bool = False) -> dict:
    """None: what is measured is a weight."""
    return {}


def jobs(o, dtype, device):
    """None, as above."""
    return iter(())


def others(device, quick):
    """Merging into a new weight, and into a layer's weight and out of it."""
    cell = backends.find("merge_add", torch.empty(0, device=device))
    backend = cell.__module__.split(".")[1]
    shapes = SHAPES[device.type]
    if quick:
        shapes = shapes[:1]
    for n, k in shapes:
        line = {
            "layer": f"{n} × {k}, r = {RANK}",
            "shape": (n, k, RANK),
            "dtype": "bf16",
            "op": "merge_add",
            "backend": backend,
        }
        yield line, merges(n, k, device), None


def merges(n, k, device):
    """{label: {pass: calls}} of ours, plain torch, PEFT's layer, and a copy of the weight."""
    problem = peers.Problem((1, k, n, RANK), torch.bfloat16, device)
    _, a, b, _, _ = problem.tensors
    a = a.float()
    b = b.float() / 100
    count = copies(n * k * 2, device)
    weights = [torch.randn(n, k, device=device).bfloat16() for _ in range(count)]
    own = [w.clone() for w in weights]
    out = torch.empty_like(weights[0])
    adapter = [(a, b, SCALING)]
    theirs = [peers.peft(problem, w.clone(), a, b)[0] for w in weights]
    there_and_back = "merge, unmerge"
    return {
        OURS: {
            "merge": [partial(F.merge_lora, w, adapter) for w in weights],
            there_and_back: [partial(ours, w, adapter) for w in own],
        },
        "torch": {"merge": [partial(by_torch, w, a, b) for w in weights]},
        "PEFT": {there_and_back: [partial(by_peft, layer) for layer in theirs]},
        COPY: {
            "merge": [partial(out.copy_, w) for w in weights],
            there_and_back: [partial(out.copy_, w) for w in weights],
        },
    }


def ours(weight, adapter):
    F.unmerge_lora_(weight, F.merge_lora_(weight, adapter))


@torch.no_grad()
def by_torch(weight, a, b):
    """One rounding too, but of a product in fp32."""
    return (weight + SCALING * (b @ a)).to(weight.dtype)


def by_peft(layer):
    layer.merge()
    layer.unmerge()
