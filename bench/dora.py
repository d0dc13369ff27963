"""The row dora: a DoRA layer beside PEFT's and beside our LoRA, over 16 and 4 bits; and the norm alone."""

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
ANOTHER = ", dropout_mode lora"  # which PEFT has not
RANKS = 16, 64, 384
NORMS = [(4096, 4096), *((n, k) for _, k, n, _ in lora.SMOL.values())]  # rows, columns
HOST = "host time of DoRA, 2 rows of 16", lora.HOST[1]
TARGETS = [  # layer, dropout, pass, who, and how much of their time ours may take; or how many µs on an H200
    *(
        (f"Llama-3.1-8B q, o{base}", 0.0, "forward + backward", LORA, 1.08)
        for base in SUFFIX.values()
    ),
    *(
        (f"Llama-3.1-8B q, o{base}{ANOTHER}", 0.1, "forward + backward", LORA, 1.08)
        for base in SUFFIX.values()
    ),
    *(
        (f"Llama-3.1-8B q, o{SUFFIX[base]}", p, "forward + backward", peer, 1 / times)
        for base, peer in (("dense", "PEFT"), ("nf4, double", nf4.PEER))
        for p, times in ((0.0, 1.6), (0.1, 2.2))
    ),
    *(
        (f"Llama-3.1-8B q, o, one token{base}", 0.0, "forward", LORA, 1 / 0.95)
        for base in SUFFIX.values()
    ),
    *(
        (f"4096 × 4096, r = {r}", 0.0, "norm", MICROSECONDS, 15 if r <= 64 else 30)
        for r in RANKS
    ),
]


def layers(device, quick=False):
    """{name: (m, k, n, r)} of the layers to measure."""
    if device.type == "cpu":
        found = lora.SMOL | {"Llama-3.1-8B q, o, one token": (1, 4096, 4096, 16)}
    else:
        found = {name: (4096, k, n, 16) for name, (k, n) in lora.LLAMA.items()}
        found |= {
            f"{name}, one token": (1, k, n, 16) for name, (k, n) in lora.LLAMA.items() if k == n
        }
    return {name: found[name] for name in lora.QUICK[device.type]} if quick else found


def jobs(o, dtype, device):
    """(name, problem) of everything to measure: over either base, under dropout in either mode."""
    chosen = getattr(o, "layers", None) or layers(device, o.quick)
    for name, problem in lora.jobs(nf4.replaced(o, chosen), dtype, device):
        for base, suffix in SUFFIX.items():
            yield name + suffix, replace(problem, base=base, dora="peft")
            if problem.p:
                yield name + suffix + ANOTHER, replace(problem, base=base, dora="lora")


def contenders(problem, wanted):
    """(labels, absent): who takes part in this problem, and why others do not."""
    theirs = PEERS[problem.base] if problem.dora == "peft" else ()
    absent = {}
    if problem.base != "dense" and not find_spec("bitsandbytes"):
        theirs, absent = (
            [label for label in theirs if label.startswith(OURS)],
            {"bitsandbytes": "is not installed"},
        )
    return [BASE, *theirs, LORA, OURS, *(f"{OURS}, {name}" for name in wanted)], absent


def describe(problem, kind):
    """The ops, the backend and its product for a pass of ours."""
    twice, m, k, n, r = problem.p and problem.dora == "peft", *problem.shape
    form = "dense" if problem.base == "dense" else "nf4"
    op, backend, product = served_by(
        problem.tensors[3], m, n, k, r, 0.0 if twice else problem.p, form
    )
    op = f"{op} + lora_bwd" if "backward" in kind else op
    return {"op": f"dora_drop + {op}" if twice else op, "backend": backend, "path": product}


def cost(problem, backward=False):
    """(flops, bytes): as those of LoRA; with a gradient, z is written forward and read backward, and in PEFT's dropout
    another base product adds to y, and to dx, reading the weight and writing both halves of x again."""
    (m, k, n, _), size = problem.shape, problem.dtype.itemsize
    flops, moved = (lora if problem.base == "dense" else nf4).cost(problem, backward)
    passes = 2 if backward else 1
    moved += 0 if problem.few else passes * size * m * n
    if problem.p and problem.dora == "peft":
        weight = size if problem.base == "dense" else nf4.BYTES
        flops += passes * 2 * m * k * n
        moved += passes * round(size * m * (3 * k + 2 * n) + weight * k * n)
    return flops, moved


def others(device, quick):
    """The norm alone, and layers on tensors so small that only Python's time is left."""
    for n, k in [(256, 256)] if quick else NORMS:
        for r in RANKS[:1] if quick else RANKS:
            for base, suffix in SUFFIX.items():
                name, absent = f"{n} × {k}, r = {r}{suffix}", {}
                calls = norms(n, k, r, device, base != "dense", absent)
                backend = backends.find(
                    "dora_norm", torch.empty(0, dtype=torch.bfloat16, device=device)
                )
                about = {
                    "op": "dora_norm",
                    "backend": backend.__module__.split(".")[1],
                    "absent": absent,
                }
                yield about | {"layer": name, "shape": (n, k, r), "dtype": "bf16"}, calls, None
    problem = lora.Problem(HOST[1], torch.float32, device, dora="peft")
    calls = lora.host(problem, (BASE, "PEFT", LORA, OURS))
    yield {"layer": HOST[0], "shape": HOST[1], "dtype": "fp32", "op": "host"}, calls, ("eager",)


def norms(n, k, r, device, packed, absent):
    """{label: {"norm": calls}}: ours, plain torch, PEFT's, and a copy of w, which moves twice what a norm has to read.

    Over 4 bits, everybody but us decodes the weight first, with bitsandbytes where it is there; the copy is of codes.
    """
    weights = [
        torch.randn(n, k, device=device).mul_(k**-0.5).bfloat16()
        for _ in range(copies(n * k * 2, device))
    ]
    a, b = (
        torch.randn(r, k, device=device) * k**-0.5,
        torch.randn(n, r, device=device) * r**-0.5,
    )
    codes = [NF4Weight.quantize(w) for w in weights] if packed else weights
    bytes_of = [q.codes for q in codes] if packed else weights
    out, decode = torch.empty_like(bytes_of[0]), decoder(weights, codes, packed, absent)
    narrow = a.bfloat16(), b.bfloat16()
    found = {
        OURS: [
            partial(F.dora_weight_norm, q, a, b, scaling=SCALING, dtype=torch.bfloat16)
            for q in codes
        ],
        "torch": [partial(eager, get, *narrow) for get in decode],
        "PEFT": [partial(eye, get, *adapter(a, b)) for get in decode],
        COPY: [partial(out.copy_, t) for t in bytes_of],
    }
    return {label: {"norm": calls} for label, calls in found.items()}


def decoder(weights, codes, packed, absent):
    """For each weight, a call that gives it in 16 bits."""
    if not packed:
        return [lambda w=w: w for w in weights]
    if not find_spec("bitsandbytes"):
        absent["bitsandbytes"] = "is not installed"
        return [q.dequantize for q in codes]
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    made = [quantize_4bit(w, quant_type="nf4", compress_statistics=True) for w in weights]
    return [partial(dequantize_4bit, *one) for one in made]


@torch.no_grad()
def eager(weight, a, b):
    return (weight() + SCALING * (b @ a)).norm(dim=1)


def adapter(a, b):
    """PEFT's modules, with adapters in fp32, its default."""
    from peft.tuners.lora.dora import DoraLinearLayer
    from torch import nn

    parts = [nn.Linear(*reversed(t.shape), bias=False, device="meta") for t in (a, b)]
    for part, t in zip(parts, (a, b), strict=True):
        part.weight = nn.Parameter(t)
    return DoraLinearLayer(fan_in_fan_out=False), *parts


@torch.no_grad()
def eye(weight, dora, a, b):
    """As its forward calls them."""
    delta = dora.get_lora_weight(lora_A=a, lora_B=b)
    return dora.get_weight_norm(weight(), delta.bfloat16(), SCALING)
