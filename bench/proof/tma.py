"""The product for Hopper that no table chooses before it is measured: whether it is right, and what it takes."""

import time

import torch

import peftops.functional  # noqa: F401  registers the ops
from peftops.testing.cases import BWD, FWD
from peftops.testing.cases import lora as tensors
from peftops.testing.law import check_case
from peftops.triton import _gemm, lora_tma
from peftops.triton.lora_product import parts, parts_bwd

from .. import timing
from .tune import taken

NAMES = {"lora_fwd": FWD, "lora_bwd": BWD}
KINDS = {
    "plain": {},
    "dropout": {"p": 0.1, "fp32": True},
    "4 bits": {"form": "nf4", "nested": True},
    "gain": {"gain": True},
    "transposed": {"form": "transposed", "bias": True},
}
PROVED = (300, 1024, 776, 16), (1500, 512, 1032, 64), (2000, 4096, 2560, 24)
WIDE = (8192, 4096, 4096, 16)
REHEARSED = (40, 40, 48, 16)


def missing(device):
    """Why this device has no such product, or None."""
    if device.type != "cuda" and not _gemm.INTERPRET:
        return "needs a GPU"
    kind, _ = _gemm.machine(device)
    return None if kind in lora_tma.TILES else f"{kind} has no such kernel"


def examine(device, end):
    """(what, whether it is right, error and bound, {name: µs} where it is) of each kind of op, until the time is up."""
    for label, options in KINDS.items():
        for op in NAMES:
            if time.monotonic() > end:
                return
            error, bound = proved(op, device, options)
            right = error <= bound
            took = times(op, device, options) if right else {}
            yield f"TMA's product: {op}, {label}", right, f"{error:.1e} ≤ {bound:.1e}", took


def proved(op, device, options):
    """(error, bound) of the worst shape"""
    found = []
    with taken("tma"):
        for shape in PROVED if device.type == "cuda" else (REHEARSED,):
            t = tensors(*shape, torch.bfloat16, device, **options)
            found.append(check_case(op, "triton", [t[name] for name in NAMES[op]]))
    return max(found, key=lambda pair: float("inf") if pair[0] != pair[0] else pair[0] / pair[1])


def times(op, device, options):
    """Microseconds: of the op by TMA and by cuBLAS with an epilogue, of our product alone, and of the base's alone."""
    t = tensors(*(WIDE if device.type == "cuda" else REHEARSED), torch.bfloat16, device, **options)
    args = [t[name] for name in NAMES[op]]
    took = {way: least(way, getattr(torch.ops.peftops, op), args, device) for way in ("tma", "cublas")}
    return took | products(op, t, device)


def least(way, call, args, device):
    """Microseconds of a call: on a GPU the least of five samples"""
    samples, repeats = (5, 3) if device.type == "cuda" else (1, 1)
    with taken(way):
        call(*args)
        return 1e6 * min(timing.sample(lambda: call(*args), repeats, device) for _ in range(samples))


def products(op, t, device):
    """Of our product, the update inside, and of the base's by cuBLAS; 4 bits are decoded before."""
    x, h, forward = t["x"], t["h"], op == "lora_fwd"
    left, of_base = (x, parts) if forward else (t["dy"], parts_bwd)
    out, b = x.new_empty(t["dy"].shape if forward else x.shape), (t["b"] if forward else t["a"]).to(x.dtype)
    rest = {"scale": t["scale"], "gain": t["gain"], "bias": t["bias"]} if forward else {}
    if t["p"] and not forward:
        rest["bits"] = t["bits"]
    (part,) = of_base(t["base"], t["form"], t["block"], out.shape[1], left)
    _, w, turned = part
    ours = least("tma", lambda: lora_tma.product(out, left, [part], h, b, not forward, **rest), (), device)
    theirs = least("cublas", lambda: torch.mm(left, w if turned else w.T, out=out), (), device)
    return {"product": ours, "mm": theirs}
