"""Calls of multi-LoRA whose Triton kernels are compiled ahead of time; see static_cases.py."""

import torch

from . import static_cases
from .static_cases import HALF, WIDE, Case

BOTH = "multi_fwd", "multi_bwd"
GEMV = "multi_gemv"
ADD = "multi_add_"
PARTS = 3
CASES = [
    *(Case("16 slots", op, 8192, 4096, 4096, 16, slots=16) for op in BOTH),
    *(
        Case("dropout", op, 8192, 4096, 4096, 16, fp32=True, p=0.1, bias=True, slots=16)
        for op in BOTH
    ),
    *(
        Case(
            "gain",
            op,
            8192,
            4096,
            4096,
            64,
            HALF,
            form="transposed",
            p=0.1,
            bias=True,
            gain=True,
            slots=4,
        )
        for op in BOTH
    ),
    *(Case("few tiles", op, 1024, 4096, 1024, 16, slots=16) for op in BOTH),
    *(
        Case("fewest tiles", op, 32, 1024, 1024, 64, p=0.1, gain=True, slots=32)
        for op in BOTH
    ),
    *(
        Case("multiples of 8", op, 1001, 4104, 4120, 8, p=0.1, bias=True, slots=3)
        for op in BOTH
    ),
    *(
        Case("cublas", op, 8192, 4096, 4096, 16, p=0.1, slots=16, product="cublas")
        for op in BOTH
    ),
    *(
        Case(
            "cublas, gain",
            op,
            8192,
            4096,
            4096,
            64,
            gain=True,
            bias=True,
            slots=16,
            product="cublas",
        )
        for op in BOTH
    ),
    *(
        Case("nf4", op, 512, 4096, 14336, 16, form="nf4", nested=True, slots=16)
        for op in BOTH
    ),
    *(
        Case(
            "nf4",
            op,
            256,
            4096,
            2048,
            16,
            HALF,
            form="nf4",
            fp32=True,
            p=0.1,
            bias=True,
            gain=True,
            slots=16,
        )
        for op in BOTH
    ),
    *(
        Case(
            "odd",
            op,
            1001,
            4099,
            4101,
            5,
            p=0.1,
            gain=True,
            slots=3,
            product="cublas",
            fast=False,
        )
        for op in BOTH
    ),
    *(
        Case(
            "fp32",
            op,
            8192,
            4096,
            4096,
            16,
            WIDE,
            p=0.1,
            gain=True,
            bias=True,
            slots=16,
            product=None,
            fast=False,
        )
        for op in BOTH
    ),
    Case("few rows", GEMV, 16, 4096, 4096, 16, slots=16),
    Case("few rows, nf4", GEMV, 64, 4096, 14336, 16, form="nf4", gain=True, slots=64),
    Case("16 slots", ADD, 8192, 4096, 6144, 16, slots=16),
    Case("few rows", ADD, 256, 4096, 6144, 16, HALF, fp32=True, slots=64),
    Case("one row", ADD, 1, 4096, 6144, 64, slots=16),
    Case("multiples of 8", ADD, 1001, 4104, 4120, 8, slots=3),
    Case("odd", ADD, 1001, 4099, 4101, 5, slots=3, fast=False),
    Case("fp32", ADD, 8192, 4096, 4096, 16, WIDE, slots=16, fast=False),
    Case("few rows, fp32", ADD, 16, 4096, 1024, 16, WIDE, slots=16, fast=False),
]


def tensors(c):
    """Every argument of the row by its name; every slot has its own pages of 8 rank-rows."""

    def make(*shape, dtype=WIDE):
        return torch.empty(shape, dtype=dtype, device="meta")

    narrow = WIDE if c.fp32 else c.dtype
    pages = -(-c.r // 8)
    rows = 8 * pages * c.slots
    values = static_cases.tensors(c) | {
        "a": make(rows, c.k, dtype=narrow),
        "b": make(rows, c.n, dtype=narrow),
        "slots": make(c.m, dtype=torch.int32),
        "table": make(c.slots, pages, dtype=torch.int32),
        "rank": make(c.slots, dtype=torch.int32),
        "scale": make(c.slots),
        "p": make(c.slots) if c.p else None,
        "gain": make(c.slots, c.n) if c.gain else None,
        "h": make(c.m, 8 * pages, dtype=c.dtype),
        "need": [True, True, True, c.bias, c.gain],
    }
    if c.op == ADD:
        values |= {
            "y": make(c.m, c.n, dtype=c.dtype),
            "a": make(PARTS, rows, c.k, dtype=narrow),
            "rank": make(PARTS, c.slots, dtype=torch.int32),
            "scale": make(PARTS, c.slots),
            "widths": make(PARTS, dtype=torch.int32),
        }
    return values
