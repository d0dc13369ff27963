"""The row lora: one layer, forward and backward, beside its peers; and Python's time alone."""

import torch

from peftops import backends
from peftops.ops.lora import served_by

from . import peers
from .peers import BASE, OURS
from .problem import FEW, Problem

OPS = ("lora_fwd", "lora_bwd", "lora_gemv", "lora_mask")
SMOL = {  # SmolLM2-135M, at the 512 tokens of a batch of the demo
    "SmolLM2 q, o": (512, 576, 576, 16),
    "SmolLM2 k, v": (512, 576, 192, 16),
    "SmolLM2 gate, up": (512, 576, 1536, 16),
    "SmolLM2 down": (512, 1536, 576, 16),
}
LLAMA = {  # k and n of Llama-3.1, 8B and 70B
    "Llama-3.1-8B q, o": (4096, 4096),
    "Llama-3.1-8B k, v": (4096, 1024),
    "Llama-3.1-8B gate, up": (4096, 14336),
    "Llama-3.1-8B down": (14336, 4096),
    "Llama-3.1-70B q, o": (8192, 8192),
}
SWEEP = {  # a layer, its k and n, and the rows to measure it over
    "cpu": ("SmolLM2 gate, up", (576, 1536), (1, 4, 16, 64, 256, 1024)),
    "cuda": ("Llama-3.1-8B q, o", (4096, 4096), (1, 4, 16, 64, 256, 1024, 4096)),
}
QUICK = {
    "cpu": ["SmolLM2 k, v"],
    "cuda": ["Llama-3.1-8B q, o", "Llama-3.1-8B q, o, one token"],
}
HOST = "host time, 2 rows of 16", (2, 16, 16, 4)
TARGETS = [  # layer, dropout, pass, peer, and how much of its time ours may take
    ("Llama-3.1-70B q, o, one token", 0.0, "forward", BASE, 1.15),
    ("Llama-3.1-70B q, o, one token", 0.0, "forward", "PEFT", 1 / 3),
    ("Llama-3.1-8B q, o, one token", 0.0, "forward", "PEFT", 1 / 3),
    ("Llama-3.1-8B q, o", 0.0, "forward", BASE, 1.06),
    ("Llama-3.1-8B q, o", 0.0, "forward + backward", "torch", 1.0),
    ("Llama-3.1-8B q, o", 0.1, "forward + backward", "PEFT", 1 / 1.65),
    ("Llama-3.1-8B q, o", 0.1, "forward + backward", "PEFT, narrow adapters", 1 / 1.35),
]


def layers(device: torch.device, quick: bool = False) -> dict:
    """{name: (m, k, n, r)} of the layers to measure."""
    if device.type == "cpu":
        shapes = SMOL | {"Llama-3.1-8B q, o, one token": (1, 4096, 4096, 16)}
    else:
        shapes = {name: (8192, k, n, 16) for name, (k, n) in LLAMA.items()}
        for name, (k, n) in LLAMA.items():
            shapes[f"{name}, one token"] = 1, k, n, 16
        for name, (k, n) in LLAMA.items():
            if k == n:
                shapes[f"{name}, 16 tokens"] = 16, k, n, 16
    return {name: shapes[name] for name in QUICK[device.type]} if quick else shapes


def jobs(o, dtype, device):
    """(name, problem) of everything to measure.

    That is each layer without and with dropout, and one layer over its rows.
    """
    drops = (0.0, 0.1) if o.dropout is None else (o.dropout,)
    if o.shape:
        chosen = {"as asked": o.shape}
    else:
        chosen = getattr(o, "layers", None) or layers(device, o.quick)
    for name, shape in chosen.items():
        if shape[0] <= FEW:
            yield name, Problem(shape, dtype, device, 0.0)
            continue
        for p in drops:
            yield name, Problem(shape, dtype, device, p)
    if not o.shape and not o.quick:
        name, (k, n), rows = SWEEP[device.type]
        for m in rows:
            yield f"{name}, {m} rows", Problem((m, k, n, 16), dtype, device, 0.0)


def cost(problem: Problem, backward: bool = False) -> tuple[int, int]:
    """(flops, bytes) of a pass.

    Forward: x, W, A and B are read once and y is written once; h stays in cache.

    Backward: dy is read twice, once for the products of rank r. x, W, A and B are read once. dx,
    dA and dB are written once.
    """
    m, k, n, r = problem.shape
    size = problem.dtype.itemsize
    flops = 2 * m * (k * n + k * r + r * n)
    moved = size * (m * k + k * n + m * n) + 4 * r * (k + n)
    if backward:
        flops += 2 * m * (k * n + 2 * k * r + 2 * r * n)
        moved += size * (2 * m * n + 2 * m * k + k * n) + 8 * r * (k + n)
    return flops, moved


def contenders(problem, wanted):
    """(labels, absent): who takes part in this problem, and why others do not.

    Args:
        wanted: backends to measure beside the one in use.
    """
    gpu = problem.device.type == "cuda"
    labels = list(peers.HERE)
    if gpu:
        labels += peers.GPU
    labels += [f"{OURS}, {name}" for name in wanted]
    if not wanted and problem.few and gpu:
        labels += [
            f"{OURS}, {name}" for name in ("triton", "cuda") if served(name, problem)
        ]
    absent = dict(peers.ABSENT)
    if not gpu:
        absent |= dict.fromkeys(peers.GPU, "runs on a GPU")
    return labels, absent


def served(backend, problem):
    """Whether a backend has lora_gemv on the problem's device."""
    try:
        backends.choose("lora_gemv", backend, problem.device.type, False)
    except NotImplementedError:
        return False
    return True


def describe(problem, pass_name):
    """The ops, the backend and its product for a pass of ours."""
    m, k, n, r = problem.shape
    op, backend, product = served_by(problem.tensors[3], m, n, k, r, problem.p)
    return {
        "op": "lora_fwd + lora_bwd" if "backward" in pass_name else op,
        "backend": backend,
        "path": product,
    }


def others(device, quick):
    """Layers on tensors so small that only Python's time is left, in fp32."""
    name, sizes = HOST
    problem = Problem(sizes, torch.float32, device)
    line = {
        "layer": name,
        "shape": sizes,
        "dtype": "fp32",
        "op": "host",
    }
    yield line, host(problem, (BASE, "PEFT", OURS)), ("eager",)


def host(problem, labels):
    """{label: {pass: calls}} of small layers, forward with and without a gradient."""
    weights, a, b, x, _ = problem.tensors

    def passes(layer):
        def without():
            with torch.no_grad():
                layer(x)

        return {
            "forward, no grad": [without],
            "forward, grad": [lambda: layer(x)],
        }

    calls = {}
    for label in labels:
        layer, _ = peers.builders(problem)[label](problem, weights[0], a, b)
        calls[label] = passes(layer)
    return calls
