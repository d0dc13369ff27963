"""The row multi: one layer whose batch mixes adapters, beside its peers and our LoRA."""

from dataclasses import replace
from importlib.util import find_spec
from math import gcd

import torch

from peftops import backends

from . import lora, nf4
from .peers import BASE, LORA, MIXING, MULTI, OURS, Problem

OPS = ("multi_fwd", "multi_bwd", "multi_gemv", "multi_add_")
ADAPTERS = {  # rows of a batch, and how many adapters they choose from; the first when quick
    8192: (16, 4),
    512: (4, 16),
    64: (64,),
    32: (8,),
    16: (1, 4, 16),
}
ASKED = 4  # adapters at most, for rows that are not above
LLAMA = ("Llama-3.1-8B q, o", "Llama-3.1-8B gate, up")
UNEVEN = {"cpu": "SmolLM2 gate, up", "cuda": "Llama-3.1-8B q, o"}  # also of mixed ranks
QUICK = {"cpu": "SmolLM2 k, v", "cuda": "Llama-3.1-8B q, o"}
HOST = "host time of multi-LoRA, 2 rows of 16", lora.HOST[1]
TARGETS = [  # layer, dropout, pass, peer, and how much of its time ours may take
    (f"{name}, 16 adapters", p, "forward + backward", LORA, 1.10)
    for name in LLAMA
    for p in (0.0, 0.1)
]


def layers(device: torch.device, quick: bool = False) -> dict:
    """{name: (m, k, n, r)} of the layers to measure."""
    if device.type == "cpu":
        shapes = dict(lora.SMOL)
        for name, (_, k, n, r) in lora.SMOL.items():
            shapes[f"{name}, 16 rows"] = 16, k, n, r
    else:
        shapes = {name: (8192, *lora.LLAMA[name], 16) for name in LLAMA}
        for m in (32, 64):
            for name in LLAMA:
                shapes[f"{name}, {m} rows"] = m, *lora.LLAMA[name], 16
    name = QUICK[device.type]
    return {name: shapes[name]} if quick else shapes


def jobs(o, dtype, device):
    """(name, problem) of everything to measure: each layer with its numbers of adapters."""
    chosen = getattr(o, "layers", None) or layers(device, o.quick)
    for name, problem in lora.jobs(nf4.replaced(o, chosen), dtype, device):
        m = problem.shape[0]
        counts = ADAPTERS.get(m) or (gcd(m, ASKED),)
        if o.quick:
            counts = counts[:1]
        for adapters in counts:
            plural = "s" if adapters > 1 else ""
            yield f"{name}, {adapters} adapter{plural}", mixing(problem, adapters)
        if name == UNEVEN[device.type] and not o.quick:
            most = max(counts)
            title = f"{name}, {most} adapters of mixed ranks"
            yield title, replace(mixing(problem, most), uneven=True)


def mixing(problem, adapters):
    """The problem with adapters in equal runs, or where there are few rows, one after another."""
    samples = problem.shape[0] if problem.few else adapters
    return replace(problem, adapters=adapters, samples=samples)


def contenders(problem, wanted):
    """(labels, absent): who takes part in this problem, and why others do not.

    Args:
        wanted: backends to measure beside the one in use.
    """
    missing = [label for label in MIXING if find_spec(label) is None]
    absent = dict.fromkeys(missing, "is not installed")
    if problem.device.type != "cuda":
        absent |= {label: "runs on a GPU" for label in MIXING if label != "vllm"}
    packages = [label for label in MIXING if label not in absent]
    forced = [f"{OURS}, {name}" for name in wanted]
    return [BASE, *MULTI, *packages, LORA, *forced], absent


def describe(problem, pass_name):
    """The ops and the backend for a pass of ours. A single adapter is LoRA's."""
    if problem.adapters == 1:
        return lora.describe(problem, pass_name)
    op = "multi_gemv" if problem.few else "multi_fwd"
    cell = backends.find(op, problem.tensors[3])
    return {
        "op": "multi_fwd + multi_bwd" if "backward" in pass_name else op,
        "backend": cell.__module__.split(".")[1],
        "path": "",
    }


def cost(problem: Problem, backward: bool = False) -> tuple[int, int]:
    """(flops, bytes) of a pass: those of LoRA, with A and B of every adapter."""
    m, k, n, r = problem.shape
    flops, moved = lora.cost(problem, backward)
    ranks = problem.ranks
    rows = m // len(ranks)  # of each adapter
    flops += (6 if backward else 2) * rows * (sum(ranks) - r * len(ranks)) * (k + n)
    moved += (12 if backward else 4) * (sum(ranks) - r) * (k + n)
    return flops, moved


def others(device, quick):
    """Layers on tensors so small that only Python's time is left, in fp32."""
    name, sizes = HOST
    problem = Problem(sizes, torch.float32, device, adapters=2, samples=2)
    line = {
        "layer": name,
        "shape": sizes,
        "dtype": "fp32",
        "op": "host",
    }
    yield line, lora.host(problem, (BASE, "PEFT", LORA, OURS)), ("eager",)
