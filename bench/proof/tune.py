"""Tiles of the Triton kernels for the GPU at hand: of each table the best entry, kept as it would stand there."""

import time
from contextlib import contextmanager
from itertools import product

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
PRODUCTS = [
    gemm(*sizes, 64, *how) for sizes, how in product(((128, 256), (128, 128), (256, 128), (64, 128)), ((8, 3), (8, 4)))
]
PASSES = [tile(w, s, BM=m, BN=n) for m, n, w, s in product((64, 128, 256), (64, 128), (4, 8), (3,))]
ROWS = [tile(w, s, BM=m, BK=k) for m, k, w, s in product((32, 64, 128), (64, 128), (4, 8), (3, 4))]


def tables(device, end):
    """(name, what stands there, words): the best of each table, and how far it is from cuBLAS."""
    kind = _gemm.machine(device)[0]
    shape = WIDE if device.type == "cuda" else SMALL
    t = tensors(*shape, torch.bfloat16, device)
    few = tensors(1, *shape[1:], torch.bfloat16, device)
    knobs = {
        "_gemm.TILES": (_gemm.TILES, kind, PRODUCTS, "lora_fwd", FWD, t, lambda chosen: (chosen,)),
        "lora_grads.GRADS": (lora_grads.GRADS, kind, PASSES, "lora_bwd", BWD, t, lambda chosen: chosen),
        "lora_grads.DA": (lora_grads.DA, kind, ROWS, "lora_bwd", BWD, t, lambda chosen: chosen),
        "lora.SHRINK": (vars(lora), "SHRINK", ROWS, "lora_fwd", FWD, t, lambda chosen: chosen),
        "lora_gemv.STAGES": (lora_gemv.STAGES, kind, (2, 3, 4, 5), "lora_gemv", GEMV, few, lambda chosen: chosen),
    }
    with taken("fused"):
        for name, knob in knobs.items():
            best = search(*knob, device, end)
            if best:
                yield name, best[1], f"{kind}: {best[1]}, {best[0] * 1e3:.3f} ms"
        yield "_gemm.SLOWER", *slower(t, device)


@contextmanager
def taken(way):
    """Inside, every 16-bit product of Triton's takes this way: "fused", "tma" or "cublas"."""
    before = _gemm.choose_product
    put(vars(_gemm), "choose_product", lambda *args, **kwargs: way)
    try:
        with backends.backend("triton"):
            yield
    finally:
        put(vars(_gemm), "choose_product", before)


def search(table, key, candidates, op, names, t, wrap, device, end):
    """(seconds, candidate) of the fastest, which stays in the table; what does not compile or fit is passed over."""
    call, before, found = getattr(torch.ops.peftops, op), table[key], []
    args = [t[name] for name in names]
    for candidate in candidates:
        if time.monotonic() > end - 3:
            break
        put(table, key, wrap(candidate))
        try:
            call(*args)
            found.append((min(timing.sample(lambda: call(*args), 3, device) for _ in range(3)), candidate))
        except Exception:  # too much shared memory, or a compiler's own trouble
            continue
    best = min(found, key=lambda pair: pair[0], default=None)
    put(table, key, wrap(best[1]) if best else before)
    return best


def put(table, key, value):
    """Into a table that launchers read, which run once more for every kind of arguments."""
    table[key] = value
    _replay.forget()


def slower(t, device):
    """How much slower than cuBLAS our product is, with LoRA inside."""
    args, (x, w) = [t[name] for name in FWD], (t["x"], t["base"][0])
    out = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=device)
    torch.mm(x, w.T, out=out)
    torch.ops.peftops.lora_fwd(*args)
    ours, theirs = (
        min(timing.sample(run, 3, device) for _ in range(5))
        for run in (lambda: torch.ops.peftops.lora_fwd(*args), lambda: torch.mm(x, w.T, out=out))
    )
    loss = round(ours / theirs - 1, 4)
    return loss, f"{loss:+.1%} of cuBLAS' time"
