"""The product for Hopper, which no table chooses yet: is it right, and what does it take?"""

import math
import time

import torch

import peftops.functional  # noqa: F401  registers the ops
from peftops.testing.cases import BWD, FWD
from peftops.testing.cases import lora as tensors
from peftops.testing.law import check_case
from peftops.triton import _gemm, lora_tma
from peftops.triton.lora_product import weight_slices, weight_slices_bwd

from .. import timing
from .tune import taken

NAMES = {"lora_fwd": FWD, "lora_bwd": BWD}
VARIANTS = {
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
    family, _ = _gemm.machine(device)
    return None if family in lora_tma.TILES else f"{family} has no such kernel"


def examine(device, end):
    """(what, whether it is right, error and bound in words, {name: µs}) of each op and variant.

    Until the time is up; one that is wrong is not timed.
    """
    for label, options in VARIANTS.items():
        for op in NAMES:
            if time.monotonic() > end:
                return
            error, bound = proved(op, device, options)
            right = error <= bound
            took = times(op, device, options) if right else {}
            yield (
                f"TMA's product: {op}, {label}",
                right,
                f"{error:.1e} ≤ {bound:.1e}",
                took,
            )


def proved(op, device, options):
    """(error, bound) of the worst shape"""
    pairs = []
    shapes = PROVED if device.type == "cuda" else (REHEARSED,)
    with taken("tma"):
        for shape in shapes:
            t = tensors(*shape, torch.bfloat16, device, **options)
            pairs.append(check_case(op, "triton", [t[name] for name in NAMES[op]]))
    return max(
        pairs,
        key=lambda pair: float("inf") if math.isnan(pair[0]) else pair[0] / pair[1],
    )


def times(op, device, options):
    """{name: µs}: the op by TMA, and by cuBLAS with an epilogue; then what products() says."""
    t = tensors(
        *(WIDE if device.type == "cuda" else REHEARSED),
        torch.bfloat16,
        device,
        **options,
    )
    args = [t[name] for name in NAMES[op]]
    call = getattr(torch.ops.peftops, op)
    took = {
        product: least(product, call, args, device) for product in ("tma", "cublas")
    }
    return took | products(op, t, device)


def least(product, call, args, device):
    """Microseconds of a call with this product: on a GPU the least of five samples"""
    samples, repeats = (5, 3) if device.type == "cuda" else (1, 1)
    with taken(product):
        call(*args)
        return 1e6 * min(
            timing.sample(lambda: call(*args), repeats, device) for _ in range(samples)
        )


def products(op, t, device):
    """{name: µs}: our product with the update inside, and the base's alone by cuBLAS.

    4 bits are decoded before.
    """
    x, dy = t["x"], t["dy"]
    forward = op == "lora_fwd"
    update = {}
    if forward:
        left, of_base = x, weight_slices
        out = x.new_empty(dy.shape)
        b = t["b"].to(x.dtype)
        update = {"scale": t["scale"], "gain": t["gain"], "bias": t["bias"]}
    else:
        left, of_base = dy, weight_slices_bwd
        out = x.new_empty(x.shape)
        b = t["a"].to(x.dtype)
        if t["p"]:
            update["bits"] = t["bits"]
    (weight,) = of_base(t["base"], t["form"], t["block"], out.shape[1], left)
    _, w, turned = weight

    def run():
        lora_tma.product(out, left, [weight], t["h"], b, not forward, **update)

    ours = least("tma", run, (), device)
    theirs = least(
        "cublas", lambda: torch.mm(left, w if turned else w.T, out=out), (), device
    )
    return {"product": ours, "mm": theirs}
