"""Calls of merging whose Triton kernels are compiled ahead of time."""

import torch

from . import static_cases
from .static_cases import HALF, WIDE, Case

ADD = "merge_add"
UNDO = "merge_undo"
CASES = [  # slots: adapters
    *(Case("one", op, 0, 4096, 4096, 16, slots=1) for op in (ADD, UNDO)),
    *(
        Case("fp32 adapters", op, 0, 4096, 14336, 64, HALF, fp32=True, slots=1)
        for op in (ADD, UNDO)
    ),
    *(
        Case(
            "transposed, dora",
            op,
            0,
            768,
            2304,
            8,
            form="transposed",
            gain=True,
            slots=1,
        )
        for op in (ADD, UNDO)
    ),
    *(
        Case("three, dora", op, 0, 4096, 4096, 48, gain=True, slots=3)
        for op in (ADD, UNDO)
    ),
    Case("two", ADD, 0, 4096, 4096, 32, slots=2),
    *(Case("fp32", op, 0, 4096, 4096, 16, WIDE, slots=1) for op in (ADD, UNDO)),
    Case("nf4", ADD, 0, 4096, 4096, 16, form="nf4", nested=True, fp32=True, slots=1),
    Case("nf4, flat", ADD, 0, 4096, 4096, 16, form="nf4", gain=True, slots=1),
    *(
        Case("odd", op, 0, 4099, 4101, 5, gain=True, slots=2, fast=False)
        for op in (ADD, UNDO)
    ),
]


def tensors(c):
    """Every argument of the row by its name."""

    def make(*shape, dtype=torch.float64):
        return torch.empty(shape, dtype=dtype, device="meta")

    values = static_cases.tensors(c)
    return values | {
        "w": values["base"][0],
        "scale": make(c.slots),
        "ranks": make(c.slots, dtype=torch.int32),
        "gain": make(c.slots, c.n) if c.gain else None,
        "transposed": c.form == "transposed",
        "undo": c.form != "nf4",
    }
