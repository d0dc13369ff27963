"""The row dora: a DoRA layer over 16 and 4 bits, and the norm alone.

The layer stands beside PEFT's and beside our LoRA.
"""

import itertools
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch

import peftops.functional as F
from peftops import NF4Weight, backends
from peftops.ops.lora import served_by

from . import lora, nf4
from .peers import BASE, COPY, LORA, MICROSECONDS, OURS, SCALING
from .timing import copies

OPS = (
    "dora_norm",
    "dora_norm_bwd",
    "dora_drop",
    "dora_mix",
    "lora_fwd",
    "lora_bwd",
    "lora_gemv",
)
PEERS = {
    "dense": ("PEFT", "PEFT, compiled"),
    "nf4, double": (nf4.THEIRS, nf4.PEER, f"{OURS}, frozen"),
}
SUFFIX = {"dense": "", "nf4, double": ", NF4"}
ANOTHER = ", dropout_mode lora"  # PEFT does not have this mode
RANKS = 16, 64, 384
NORMS = [(4096, 4096), *((n, k) for _, k, n, _ in lora.SMOL.values())]  # rows, columns
HOST = "host time of DoRA, 2 rows of 16", lora.HOST[1]


def targets():
    """(layer, dropout, pass, peer, most): ours may take `most` of the peer's time.

    Where the peer is MICROSECONDS, ours may take that many on an H200.
    """
    layer = "Llama-3.1-8B q, o"
    both = "forward + backward"
    for suffix in SUFFIX.values():
        yield layer + suffix, 0.0, both, LORA, 1.08
        yield layer + suffix + ANOTHER, 0.1, both, LORA, 1.08
        yield f"{layer}, one token{suffix}", 0.0, "forward", LORA, 1 / 0.95
    for base, peer in (("dense", "PEFT"), ("nf4, double", nf4.PEER)):
        yield layer + SUFFIX[base], 0.0, both, peer, 1 / 1.6
        yield layer + SUFFIX[base], 0.1, both, peer, 1 / 2.2
    for r in RANKS:
        yield f"4096 × 4096, r = {r}", 0.0, "norm", MICROSECONDS, 15 if r <= 64 else 30


TARGETS = list(targets())


def layers(device: torch.device, quick: bool = False) -> dict:
    """{name: (m, k, n, r)} of the layers to measure."""
    if device.type == "cpu":
        shapes = lora.SMOL | {"Llama-3.1-8B q, o, one token": (1, 4096, 4096, 16)}
    else:
        shapes = {name: (4096, k, n, 16) for name, (k, n) in lora.LLAMA.items()}
        for name, (k, n) in lora.LLAMA.items():
            if k == n:
                shapes[f"{name}, one token"] = 1, k, n, 16
    return {name: shapes[name] for name in lora.QUICK[device.type]} if quick else shapes


def jobs(o, dtype, device):
    """(name, problem) of everything to measure: over each base, and under dropout in each mode."""
    chosen = getattr(o, "layers", None) or layers(device, o.quick)
    for name, problem in lora.jobs(nf4.replaced(o, chosen), dtype, device):
        for base, suffix in SUFFIX.items():
            yield name + suffix, replace(problem, base=base, dora="peft")
            if problem.p:
                yield name + suffix + ANOTHER, replace(problem, base=base, dora="lora")


def contenders(problem, wanted):
    """(labels, absent): who takes part in this problem, and why others do not.

    Args:
        wanted: backends to measure beside the one in use.
    """
    theirs = PEERS[problem.base] if problem.dora == "peft" else ()
    absent = {}
    if problem.base != "dense" and not find_spec("bitsandbytes"):
        theirs = [label for label in theirs if label.startswith(OURS)]
        absent["bitsandbytes"] = "is not installed"
    return [BASE, *theirs, LORA, OURS, *(f"{OURS}, {name}" for name in wanted)], absent


def describe(problem, pass_name):
    """The ops, the backend and its product for a pass of ours."""
    m, k, n, r = problem.shape
    twice = (
        problem.p and problem.dora == "peft"
    )  # PEFT's dropout takes two base products
    p = 0.0 if twice else problem.p
    form = "dense" if problem.base == "dense" else "nf4"
    op, backend, product = served_by(problem.tensors[3], m, n, k, r, p, form)
    if "backward" in pass_name:
        op = f"{op} + lora_bwd"
    if twice:
        op = f"dora_drop + {op}"
    return {"op": op, "backend": backend, "path": product}


def cost(problem, backward: bool = False) -> tuple[int, int]:
    """(flops, bytes) of a pass: those of LoRA and what DoRA adds.

    With a gradient, z is written forward and read backward. Under PEFT's dropout a second base
    product adds to y, and one to dx. Each reads the weight, and writes both halves of x again.
    """
    m, k, n, _ = problem.shape
    size = problem.dtype.itemsize
    dense = problem.base == "dense"
    flops, moved = (lora if dense else nf4).cost(problem, backward)
    passes = 2 if backward else 1
    if not problem.few:
        moved += passes * size * m * n
    if problem.p and problem.dora == "peft":
        weight = size if dense else nf4.BYTES
        flops += passes * 2 * m * k * n
        moved += passes * round(size * m * (3 * k + 2 * n) + weight * k * n)
    return flops, moved


def others(device, quick):
    """The norm alone, and layers on tensors so small that only Python's time is left."""
    cell = backends.find(
        "dora_norm", torch.empty(0, dtype=torch.bfloat16, device=device)
    )
    backend = cell.__module__.split(".")[1]
    shapes = [(256, 256)] if quick else NORMS
    ranks = RANKS[:1] if quick else RANKS
    for (n, k), r, (base, suffix) in itertools.product(shapes, ranks, SUFFIX.items()):
        absent = {}
        calls = norms(n, k, r, device, base != "dense", absent)
        line = {
            "layer": f"{n} × {k}, r = {r}{suffix}",
            "shape": (n, k, r),
            "dtype": "bf16",
            "op": "dora_norm",
            "backend": backend,
            "absent": absent,
        }
        yield line, calls, None
    problem = lora.Problem(HOST[1], torch.float32, device, dora="peft")
    calls = lora.host(problem, (BASE, "PEFT", LORA, OURS))
    line = {
        "layer": HOST[0],
        "shape": HOST[1],
        "dtype": "fp32",
        "op": "host",
    }
    yield line, calls, ("eager",)


def norms(n, k, r, device, packed, absent):
    """{label: {"norm": calls}} of ours, plain torch, PEFT's, and a copy of the weight.

    The copy moves twice the bytes that a norm must read. Over 4 bits it copies the codes, and
    the others decode the weight first, with bitsandbytes if it is installed.

    Args:
        packed: whether the weight is in 4 bits.
        absent: gets the reason if bitsandbytes is absent.
    """
    weights = [
        torch.randn(n, k, device=device).mul_(k**-0.5).bfloat16()
        for _ in range(copies(n * k * 2, device))
    ]
    a = torch.randn(r, k, device=device) * k**-0.5
    b = torch.randn(n, r, device=device) * r**-0.5
    quantized = [NF4Weight.quantize(w) for w in weights] if packed else weights
    stored = [q.codes for q in quantized] if packed else weights
    out = torch.empty_like(stored[0])
    decode = decoders(weights, quantized, packed, absent)
    narrow = a.bfloat16(), b.bfloat16()
    ours = partial(F.dora_weight_norm, scaling=SCALING, dtype=torch.bfloat16)
    calls = {
        OURS: [partial(ours, q, a, b) for q in quantized],
        "torch": [partial(norm_by_torch, get, *narrow) for get in decode],
        "PEFT": [partial(norm_by_peft, get, *peft_modules(a, b)) for get in decode],
        COPY: [partial(out.copy_, t) for t in stored],
    }
    return {label: {"norm": norm} for label, norm in calls.items()}


def decoders(weights, quantized, packed, absent):
    """For each weight, a call that returns it in 16 bits."""
    if not packed:
        return [lambda w=w: w for w in weights]
    if not find_spec("bitsandbytes"):
        absent["bitsandbytes"] = "is not installed"
        return [q.dequantize for q in quantized]
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    states = [
        quantize_4bit(w, quant_type="nf4", compress_statistics=True) for w in weights
    ]
    return [partial(dequantize_4bit, codes, state) for codes, state in states]


@torch.no_grad()
def norm_by_torch(weight, a, b):
    return (weight() + SCALING * (b @ a)).norm(dim=1)


def peft_modules(a, b):
    """PEFT's modules for DoRA, A and B. The adapters are fp32, PEFT's default."""
    from peft.tuners.lora.dora import DoraLinearLayer
    from torch import nn

    linears = []
    for t in (a, b):
        linear = nn.Linear(*reversed(t.shape), bias=False, device="meta")
        linear.weight = nn.Parameter(t)
        linears.append(linear)
    return DoraLinearLayer(fan_in_fan_out=False), *linears


@torch.no_grad()
def norm_by_peft(weight, dora, a, b):
    """The calls that the forward of PEFT's layer makes."""
    delta = dora.get_lora_weight(lora_A=a, lora_B=b)
    return dora.get_weight_norm(weight(), delta.bfloat16(), SCALING)
