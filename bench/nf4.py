"""The row nf4: a LoRA layer over a 4-bit weight, beside PEFT + bitsandbytes and the frozen 16-bit layer; the codec."""

from dataclasses import replace
from importlib.util import find_spec

import torch

from peftops import NF4Weight
from peftops.ops.lora import served_by

from . import lora, peers
from .peers import BASE, OURS

OPS = ("nf4_quantize", "nf4_dequantize", "lora_fwd", "lora_bwd", "lora_gemv")
FEW = {"one token": 1, "8 rows": 8, "16 rows": 16, "64 rows": 64}
PEER, THEIRS = "PEFT + bitsandbytes", "bitsandbytes, frozen"
BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of an element under double quantization
CODEC = {"cpu": (4096, 4096), "cuda": (4096, 14336)}
TARGETS = [  # layer, dropout, pass, who, and how much of their time ours may take
    *(
        (f"Llama-3.1-70B q, o, {rows}", 0.0, "forward", PEER, 0.5)
        for rows in ("8 rows", "16 rows", "64 rows")
    ),
    *((f"Llama-3.1-70B q, o, {rows}", 0.0, "forward", BASE, 1.0) for rows in FEW),
    ("Llama-3.1-8B q, o", 0.0, "forward + backward", BASE, 1.17),
    ("Llama-3.1-8B gate, up", 0.0, "forward + backward", BASE, 1.10),
    ("Llama-3.1-8B q, o", 0.0, "forward + backward", PEER, 1 / 1.3),
]


def layers(device, quick=False):
    """{name: (m, k, n, r)} of the layers to measure."""
    if device.type == "cpu":
        found = dict(lora.SMOL)
        found |= {f"Llama-3.1-8B q, o, {rows}": (m, 4096, 4096, 16) for rows, m in FEW.items()}
        found |= {"Llama-3.1-8B q, o, 128 rows": (128, 4096, 4096, 16)}
        return {name: found[name] for name in ["SmolLM2 k, v"]} if quick else found
    found = {name: (4096, k, n, 16) for name, (k, n) in lora.LLAMA.items()}
    for name in ("Llama-3.1-8B q, o", "Llama-3.1-70B q, o"):
        k, n = lora.LLAMA[name]
        found |= {f"{name}, {rows}": (m, k, n, 16) for rows, m in FEW.items()}
    return {name: found[name] for name in lora.QUICK["cuda"]} if quick else found


def jobs(o, dtype, device):
    """(name, problem) of everything to measure; for one token the scales that are not quantized too."""
    chosen = getattr(o, "layers", None) or layers(device, o.quick)
    for name, problem in lora.jobs(replaced(o, chosen), dtype, device):
        yield name, replace(problem, base="nf4, double")
        if problem.shape[0] == 1:
            yield f"{name}, flat", replace(problem, base="nf4")


def replaced(o, layers):
    """The options, without the sweep over rows."""
    return type(o)(**vars(o) | {"layers": layers, "quick": True})


def contenders(problem, wanted):
    """(labels, absent): who takes part in this problem, and why others do not."""
    labels = [BASE, THEIRS, PEER, f"{OURS}, frozen", OURS]
    if not find_spec("bitsandbytes"):
        return [BASE, f"{OURS}, frozen", OURS], {"bitsandbytes": "is not installed"}
    return labels + [f"{OURS}, {name}" for name in wanted], {}


def describe(problem, kind):
    """The ops, the backend and its product for a pass of ours."""
    m, k, n, r = problem.shape
    op, backend, product = served_by(problem.tensors[3], m, n, k, r, problem.p, "nf4")
    return {
        "op": "lora_fwd + lora_bwd" if "backward" in kind else op,
        "backend": backend,
        "path": product,
    }


def cost(problem, backward=False):
    """(flops, bytes): as those of lora, but for the weight."""
    (_, k, n, _), (flops, moved) = problem.shape, lora.cost(problem, backward)
    return flops, moved - round(k * n * (problem.dtype.itemsize - BYTES)) * (
        2 if backward else 1
    )


def others(device, quick):
    """The codec alone, and layers on tensors so small that only Python's time is left."""
    k, n = (256, 256) if quick else CODEC[device.type]
    w = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    line = {"layer": f"{n} × {k}", "shape": (n, k), "dtype": "bf16"}
    for double in (False, True):
        name = f"{line['layer']}{', double quantization' if double else ''}"
        yield line | {"layer": name, "op": "nf4_dequantize"}, codec(w, double), None
    problem = peers.Problem(lora.HOST[1], torch.float32, device, base="nf4")
    found = lora.host(problem, (BASE, f"{OURS}, frozen", OURS))
    yield (
        {"layer": lora.HOST[0], "shape": problem.shape, "dtype": "fp32", "op": "host"},
        found,
        ("eager",),
    )


def codec(w, double):
    """{label: {pass: call}}: tensors to codes and back, beside a copy of as many bytes as are written."""
    q = NF4Weight.quantize(w, double_quant=double)
    out = torch.empty_like(w)
    found = {
        OURS: {
            "dequantize": [q.dequantize],
            "quantize": [lambda: NF4Weight.quantize(w, double_quant=double)],
        },
        "copy": {"dequantize": [lambda: out.copy_(w)]},
    }
    if find_spec("bitsandbytes"):
        import bitsandbytes.functional as bnb

        codes, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=double)
        found["bitsandbytes"] = {
            "dequantize": [lambda: bnb.dequantize_4bit(codes, state)],
            "quantize": [
                lambda: bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=double)
            ],
        }
    return found
