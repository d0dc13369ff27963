"""Tiles of the Triton kernels for the GPU at hand: the best entry of each table."""

import time
from contextlib import contextmanager
from itertools import product as combinations

import torch

import peftops.functional  # noqa: F401  registers the ops
from peftops import _replay, backends
from peftops.testing.cases import BWD, FWD, GEMV
from peftops.testing.cases import lora as tensors
from peftops.triton import _gemm, lora, lora_gemv, lora_grads
from peftops.triton._gemm import gemm, tile

from .. import timing

WIDE = (8192, 4096, 4096, 16)
SMALL = (70, 64, 48, 16)
BLOCKS = (128, 256), (128, 128), (256, 128), (64, 128)  # BM, BN
PRODUCTS = [
    gemm(*block, 64, warps, stages)
    for block in BLOCKS
    for warps, stages in ((8, 3), (8, 4))
]
PASSES = [
    tile(w, s, BM=m, BN=n)
    for m, n, w, s in combinations((64, 128, 256), (64, 128), (4, 8), (3,))
]
ROWS = [
    tile(w, s, BM=m, BK=k)
    for m, k, w, s in combinations((32, 64, 128), (64, 128), (4, 8), (3, 4))
]


def tables(device, end):
    """(table, entry, words) of the best of each table, and how far our product is from cuBLAS."""
    gpu = _gemm.machine(device)[0]
    shape = WIDE if device.type == "cuda" else SMALL
    t = tensors(*shape, torch.bfloat16, device)
    few = tensors(1, *shape[1:], torch.bfloat16, device)
    knobs = {
        "_gemm.TILES": (
            _gemm.TILES,
            gpu,
            PRODUCTS,
            "lora_fwd",
            FWD,
            t,
            lambda chosen: (chosen,),
        ),
        "lora_grads.GRADS": (
            lora_grads.GRADS,
            gpu,
            PASSES,
            "lora_bwd",
            BWD,
            t,
            lambda chosen: chosen,
        ),
        "lora_grads.DA": (
            lora_grads.DA,
            gpu,
            ROWS,
            "lora_bwd",
            BWD,
            t,
            lambda chosen: chosen,
        ),
        "lora.SHRINK": (
            vars(lora),
            "SHRINK",
            ROWS,
            "lora_fwd",
            FWD,
            t,
            lambda chosen: chosen,
        ),
        "lora_gemv.STAGES": (
            lora_gemv.STAGES,
            gpu,
            (2, 3, 4, 5),
            "lora_gemv",
            GEMV,
            few,
            lambda chosen: chosen,
        ),
    }
    with taken("fused"):
        for name, knob in knobs.items():
            best = search(*knob, device, end)
            if best:
                seconds, entry = best
                yield name, entry, f"{gpu}: {entry}, {seconds * 1e3:.3f} ms"
        yield "_gemm.SLOWER", *slower(t, device)


@contextmanager
def taken(product):
    """Within it the Triton backend uses this 16-bit product: "fused", "tma" or "cublas"."""
    before = _gemm.choose_product
    put(vars(_gemm), "choose_product", lambda *args, **kwargs: product)
    try:
        with backends.backend("triton"):
            yield
    finally:
        put(vars(_gemm), "choose_product", before)


def search(table, key, candidates, op, names, t, wrap, device, end):
    """(seconds, candidate) of the fastest, which stays in the table, or None.

    A candidate that does not compile or fit is passed over.
    """
    call = getattr(torch.ops.peftops, op)
    before = table[key]
    timed = []
    args = [t[name] for name in names]
    for candidate in candidates:
        if time.monotonic() > end - 3:
            break
        put(table, key, wrap(candidate))
        try:
            call(*args)
            seconds = min(
                timing.sample(lambda: call(*args), 3, device) for _ in range(3)
            )
            timed.append((seconds, candidate))
        except Exception:  # too much shared memory, or a compiler's own trouble
            continue
    best = min(timed, key=lambda pair: pair[0], default=None)
    put(table, key, wrap(best[1]) if best else before)
    return best


def put(table, key, value):
    """Into a table that launchers read, which run once more for every kind of arguments."""
    table[key] = value
    _replay.forget()


def slower(t, device):
    """How much slower than cuBLAS our product is, with LoRA inside."""
    args = [t[name] for name in FWD]
    x, w = t["x"], t["base"][0]
    out = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=device)

    def least(run):
        run()
        return min(timing.sample(run, 3, device) for _ in range(5))

    ours = least(lambda: torch.ops.peftops.lora_fwd(*args))
    theirs = least(lambda: torch.mm(x, w.T, out=out))
    loss = round(ours / theirs - 1, 4)
    return loss, f"{loss:+.1%} of cuBLAS' time"
