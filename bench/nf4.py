"""The row nf4: a LoRA layer over a 4-bit weight, and the codec alone.

The layer stands beside PEFT + bitsandbytes and the frozen 16-bit layer.
"""

from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch

from peftops import NF4Weight
from peftops.ops.lora import served_by

from . import lora, peers
from .peers import BASE, OURS

OPS = ("nf4_quantize", "nf4_dequantize", "lora_fwd", "lora_bwd", "lora_gemv")
FEW = {"one token": 1, "8 rows": 8, "16 rows": 16, "64 rows": 64}
PEER = "PEFT + bitsandbytes"
THEIRS = "bitsandbytes, frozen"
BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of an element under double quantization
CODEC = {"cpu": (4096, 4096), "cuda": (4096, 14336)}
TARGETS = [  # layer, dropout, pass, peer, and how much of its time ours may take
    ("Llama-3.1-70B q, o, 8 rows", 0.0, "forward", PEER, 0.5),
    ("Llama-3.1-70B q, o, 16 rows", 0.0, "forward", PEER, 0.5),
    ("Llama-3.1-70B q, o, 64 rows", 0.0, "forward", PEER, 0.5),
    ("Llama-3.1-70B q, o, one token", 0.0, "forward", BASE, 1.0),
    ("Llama-3.1-70B q, o, 8 rows", 0.0, "forward", BASE, 1.0),
    ("Llama-3.1-70B q, o, 16 rows", 0.0, "forward", BASE, 1.0),
    ("Llama-3.1-70B q, o, 64 rows", 0.0, "forward", BASE, 1.0),
    ("Llama-3.1-8B q, o", 0.0, "forward + backward", BASE, 1.17),
    ("Llama-3.1-8B gate, up", 0.0, "forward + backward", BASE, 1.10),
    ("Llama-3.1-8B q, o", 0.0, "forward + backward", PEER, 1 / 1.3),
]


def layers(device: torch.device, quick: bool = False) -> dict:
    """{name: (m, k, n, r)} of the layers to measure."""
    if device.type == "cpu":
        shapes = dict(lora.SMOL)
        for rows, m in FEW.items():
            shapes[f"Llama-3.1-8B q, o, {rows}"] = m, 4096, 4096, 16
        shapes["Llama-3.1-8B q, o, 128 rows"] = 128, 4096, 4096, 16
        return {name: shapes[name] for name in ["SmolLM2 k, v"]} if quick else shapes
    shapes = {name: (4096, k, n, 16) for name, (k, n) in lora.LLAMA.items()}
    for name in ("Llama-3.1-8B q, o", "Llama-3.1-70B q, o"):
        k, n = lora.LLAMA[name]
        for rows, m in FEW.items():
            shapes[f"{name}, {rows}"] = m, k, n, 16
    return {name: shapes[name] for name in lora.QUICK["cuda"]} if quick else shapes


def jobs(o, dtype, device):
    """(name, problem) of everything to measure. One token also runs with scales in fp32."""
    chosen = getattr(o, "layers", None) or layers(device, o.quick)
    for name, problem in lora.jobs(replaced(o, chosen), dtype, device):
        yield name, replace(problem, base="nf4, double")
        if problem.shape[0] == 1:
            yield f"{name}, flat", replace(problem, base="nf4")


def replaced(o, layers):
    """The options with these layers, and without the sweep over rows."""
    return type(o)(**vars(o) | {"layers": layers, "quick": True})


def contenders(problem, wanted):
    """(labels, absent): who takes part in this problem, and why others do not.

    Args:
        wanted: backends to measure beside the one in use.
    """
    if not find_spec("bitsandbytes"):
        return [BASE, f"{OURS}, frozen", OURS], {"bitsandbytes": "is not installed"}
    labels = [BASE, THEIRS, PEER, f"{OURS}, frozen", OURS]
    return labels + [f"{OURS}, {name}" for name in wanted], {}


def describe(problem, pass_name):
    """The ops, the backend and its product for a pass of ours."""
    m, k, n, r = problem.shape
    op, backend, product = served_by(
        problem.tensors[3],
        m,
        n,
        k,
        r,
        problem.p,
        "nf4",
    )
    return {
        "op": "lora_fwd + lora_bwd" if "backward" in pass_name else op,
        "backend": backend,
        "path": product,
    }


def cost(problem, backward: bool = False) -> tuple[int, int]:
    """(flops, bytes) of a pass: those of lora, with a smaller weight."""
    _, k, n, _ = problem.shape
    flops, moved = lora.cost(problem, backward)
    passes = 2 if backward else 1
    saved = round(k * n * (problem.dtype.itemsize - BYTES))
    return flops, moved - saved * passes


def others(device, quick):
    """The codec alone, and layers on tensors so small that only Python's time is left."""
    k, n = (256, 256) if quick else CODEC[device.type]
    w = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    name = f"{n} × {k}"
    for double in (False, True):
        line = {
            "layer": f"{name}, double quantization" if double else name,
            "shape": (n, k),
            "dtype": "bf16",
            "op": "nf4_dequantize",
        }
        yield line, codec(w, double), None
    problem = peers.Problem(lora.HOST[1], torch.float32, device, base="nf4")
    line = {
        "layer": lora.HOST[0],
        "shape": problem.shape,
        "dtype": "fp32",
        "op": "host",
    }
    yield line, lora.host(problem, (BASE, f"{OURS}, frozen", OURS)), ("eager",)


def codec(w, double):
    """{label: {pass: calls}}: a tensor to codes and back.

    It stands beside a copy that writes as many bytes.
    """
    q = NF4Weight.quantize(w, double_quant=double)
    out = torch.empty_like(w)
    calls = {
        OURS: {
            "dequantize": [q.dequantize],
            "quantize": [lambda: NF4Weight.quantize(w, double_quant=double)],
        },
        "copy": {"dequantize": [lambda: out.copy_(w)]},
    }
    if find_spec("bitsandbytes"):
        import bitsandbytes.functional as bnb

        quantize = partial(
            bnb.quantize_4bit,
            w,
            quant_type="nf4",
            compress_statistics=double,
        )
        codes, state = quantize()
        calls["bitsandbytes"] = {
            "dequantize": [lambda: bnb.dequantize_4bit(codes, state)],
            "quantize": [quantize],
        }
    return calls
