"""The product for Hopper that no table chooses before it is measured: whether it is right, and what it takes."""

import time
from contextlib import contextmanager

import torch

import peftops.functional  # noqa: F401  registers the ops
from peftops import backends
from peftops.triton import _gemm, lora_tma

from . import timing
from .cases import BWD, FWD
from .cases import lora as tensors
from .law import check_case
from .tune import put

NAMES = {"lora_fwd": FWD, "lora_bwd": BWD}
KINDS = {"plain": {}, "dropout": {"p": 0.1, "fp32": True}, "gain": {"gain": True, "bias": True}}
KINDS["transposed"] = {"form": "transposed"}
PROVED = (300, 1024, 776, 16), (1500, 512, 1032, 64), (2000, 4096, 2560, 24)
WIDE = (8192, 4096, 4096, 16)
REHEARSED = (40, 40, 48, 16)


def missing(device):
    """Why this device has no such product, or None."""
    if device.type != "cuda" and not _gemm.INTERPRET:
        return "needs a GPU"
    kind, _ = _gemm.machine(device)
    return None if kind in lora_tma.TILES else f"{kind} has no such kernel"


@contextmanager
def taken(way):
    """Inside, every 16-bit product takes this way, "tma" or "cublas"."""
    before = _gemm.path
    put(vars(_gemm), "path", lambda *args, **kwargs: way)
    try:
        with backends.backend("triton"):
            yield
    finally:
        put(vars(_gemm), "path", before)


def proofs(device):
    """(what, whether it holds, error and bound) of each kind of product."""
    for op, names in NAMES.items():
        for label, options in KINDS.items():
            for shape in PROVED if device.type == "cuda" else (REHEARSED,):
                t = tensors(*shape, torch.bfloat16, device, **options)
                with taken("tma"):
                    error, bound = check_case(op, "triton", [t[name] for name in names])
                yield f"{op}, {label}, {shape}", error <= bound, f"{error:.1e} ≤ {bound:.1e}"


def times(device, end):
    """(what, µs by name) of each kind of op, until the time is up: ours, cuBLAS with an epilogue, and cuBLAS alone."""
    shape = WIDE if device.type == "cuda" else REHEARSED
    for op, names in NAMES.items():
        for label, options in KINDS.items():
            if time.monotonic() > end - 3:
                return
            t = tensors(*shape, torch.bfloat16, device, **options)
            args = [t[name] for name in names]
            took = {way: least(way, getattr(torch.ops.peftops, op), args, device) for way in ("tma", "cublas")}
            yield f"{op}, {label}", took | {"product": product(op, t, device), "mm": multiplied(op, t, device)}


def least(way, call, args, device):
    """Microseconds of a call: on a GPU the least of five samples"""
    samples, repeats = (5, 3) if device.type == "cuda" else (1, 1)
    with taken(way):
        call(*args)
        return 1e6 * min(timing.sample(lambda: call(*args), repeats, device) for _ in range(samples))


def product(op, t, device):
    """Of our product alone, the update inside."""
    x, h, forward = t["x"], t["h"], op == "lora_fwd"
    left, turned = (x if forward else t["dy"]), (t["form"] == "transposed") is forward
    out, b = x.new_empty(t["dy"].shape if forward else x.shape), (t["b"] if forward else t["a"]).to(x.dtype)
    rest = {"scale": t["scale"], "gain": t["gain"], "bias": t["bias"]} if forward else {"bits": t["bits"]}
    if not t["p"]:
        rest.pop("bits", None)
    args = out, left, t["base"], turned, h, b, not forward
    return least("tma", lambda: lora_tma.product(*args, **rest), (), device)


def multiplied(op, t, device):
    """Of the base product alone, by cuBLAS."""
    w = t["base"][0] if (t["form"] == "transposed") is (op == "lora_fwd") else t["base"][0].T
    left = t["x"] if op == "lora_fwd" else t["dy"]
    out = left.new_empty(left.shape[0], w.shape[1])
    return least("cublas", lambda: torch.mm(left, w, out=out), (), device)
