"""Calls of ops whose Triton kernels are compiled ahead of time, on tensors of no device."""

from typing import NamedTuple

import torch

from peftops.ops.lora_base import mask_bytes


class Case(NamedTuple):
    """One call of an op; fast ones are held to the limits that stand above their kernels."""

    label: str
    op: str
    m: int
    k: int
    n: int
    r: int
    dtype: torch.dtype = torch.bfloat16
    fp32: bool = False
    form: str = "dense"
    p: float = 0.0
    bias: bool = False
    gain: bool = False
    experts: int = 0
    shared: bool = False
    nested: bool = False
    block: int = 64
    slots: int = 0
    product: str | None = "fused"
    fast: bool = True


HALF, WIDE = torch.float16, torch.float32
BOTH = "lora_fwd", "lora_bwd"
CASES = [
    *(Case("plain", op, 8192, 4096, 4096, 16) for op in BOTH),
    *(
        Case(
            "dora",
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
        )
        for op in BOTH
    ),
    *(Case("dropout", op, 8192, 4096, 4096, 16, p=0.1, fp32=True) for op in BOTH),
    *(
        Case("experts", op, 8192, 4096, 4096, 16, experts=8, shared=True, p=0.1)
        for op in BOTH
    ),
    *(Case("few tiles", op, 1024, 4096, 1024, 16, gain=True) for op in BOTH),
    *(Case("fewest tiles", op, 256, 1024, 1024, 64, p=0.1) for op in BOTH),
    *(Case("multiples of 8", op, 1001, 4104, 4120, 8, p=0.1, bias=True) for op in BOTH),
    *(
        Case("cublas", op, 8192, 4096, 4096, 16, p=0.1, gain=True, product="cublas")
        for op in BOTH
    ),
    *(
        Case(
            "cublas, delta first",
            op,
            8192,
            4096,
            4096,
            16,
            p=0.1,
            bias=True,
            product="cublas",
        )
        for op in BOTH
    ),
    Case(
        "cublas, dora",
        "lora_bwd",
        8192,
        4096,
        4096,
        64,
        HALF,
        bias=True,
        gain=True,
        product="cublas",
    ),
    *(Case("tma", op, 8192, 4096, 4096, 16, product="tma") for op in BOTH),
    *(
        Case(
            "tma, dropout",
            op,
            8192,
            4096,
            4096,
            32,
            fp32=True,
            p=0.1,
            bias=True,
            product="tma",
        )
        for op in BOTH
    ),
    *(
        Case(
            "tma, dora", op, 8192, 4096, 4096, 64, HALF, p=0.1, gain=True, product="tma"
        )
        for op in BOTH
    ),
    *(
        Case(
            "tma, transposed",
            op,
            8192,
            4096,
            4096,
            8,
            form="transposed",
            bias=True,
            gain=True,
            product="tma",
        )
        for op in BOTH
    ),
    *(
        Case(
            "tma, nf4",
            op,
            8192,
            4096,
            14336,
            16,
            form="nf4",
            fp32=True,
            p=0.1,
            nested=True,
            product="tma",
        )
        for op in BOTH
    ),
    *(
        Case(
            "tma, few tiles", op, 1024, 4096, 1024, 64, p=0.1, gain=True, product="tma"
        )
        for op in BOTH
    ),
    Case("few rows", "lora_gemv", 1, 4096, 4096, 16),
    Case(
        "few rows, wide",
        "lora_gemv",
        16,
        4096,
        14336,
        8,
        fp32=True,
        bias=True,
        gain=True,
    ),
    Case(
        "few rows, most",
        "lora_gemv",
        64,
        4096,
        4096,
        64,
        HALF,
        form="transposed",
        gain=True,
    ),
    Case("few rows, widest", "lora_gemv", 64, 4096, 51200, 32),
    Case(
        "few rows, experts",
        "lora_gemv",
        4,
        4096,
        51200,
        16,
        form="transposed",
        experts=4,
        shared=True,
    ),
    Case("mask", "lora_mask", 8192, 4096, 0, 0, p=0.1, fast=False),
    *(
        Case("odd", op, 1001, 4099, 4101, 5, p=0.1, product="cublas", fast=False)
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
            product=None,
            fast=False,
        )
        for op in BOTH
    ),
    Case("few rows, fp32", "lora_gemv", 1, 4096, 4096, 16, WIDE, fast=False),
    *(Case("nf4", op, 512, 4096, 14336, 16, form="nf4", nested=True) for op in BOTH),
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
        )
        for op in BOTH
    ),
    *(
        Case("nf4, fewest tiles", op, 100, 4104, 1024, 8, form="nf4", nested=True)
        for op in BOTH
    ),
    *(
        Case(
            "nf4, cublas",
            op,
            8192,
            4096,
            4096,
            16,
            form="nf4",
            nested=True,
            product="cublas",
        )
        for op in BOTH
    ),
    *(
        Case(
            "nf4, fp32", op, 64, 133, 33, 5, WIDE, form="nf4", product=None, fast=False
        )
        for op in BOTH
    ),
    Case("few rows, nf4", "lora_gemv", 1, 4096, 4096, 16, form="nf4", nested=True),
    Case(
        "few rows, nf4, no rank",
        "lora_gemv",
        16,
        4096,
        14336,
        0,
        form="nf4",
        nested=True,
    ),
    Case("decode", "nf4_dequantize", 1, 4096, 4096, 0, nested=True),
    Case("decode", "nf4_dequantize", 1, 4096, 4096, 0, HALF),
    Case("encode", "nf4_quantize", 1, 4096, 4096, 0),
    Case("encode, long blocks", "nf4_quantize", 1, 4096, 4096, 0, WIDE, block=4096),
    *(
        Case(f"rank {r}", "dora_norm", 0, 4096, 4096, r)
        for r in (0, 16, 128, 256, 384, 768)
    ),
    Case("fp32 adapters", "dora_norm", 0, 4096, 14336, 64, fp32=True),
    Case("transposed", "dora_norm", 0, 4096, 4096, 64, HALF, form="transposed"),
    Case(
        "transposed, wide",
        "dora_norm",
        0,
        4096,
        4096,
        384,
        form="transposed",
        fp32=True,
    ),
    Case("odd rows", "dora_norm", 0, 768, 50257, 8, fp32=True),
    *(
        Case(f"nf4, rank {r}", "dora_norm", 0, 4096, 4096, r, form="nf4", nested=True)
        for r in (16, 64, 256, 384, 768)
    ),
    Case(
        "nf4, fp32 adapters",
        "dora_norm",
        0,
        4096,
        4096,
        64,
        HALF,
        form="nf4",
        fp32=True,
    ),
    Case("nf4, small blocks", "dora_norm", 0, 4104, 1024, 8, form="nf4"),
    *(
        Case("odd", "dora_norm", 0, 4099, 4101, r, form=form, fast=False)
        for r in (5, 200)
        for form in ("dense", "nf4")
    ),
    *(
        Case("fp32", "dora_norm", 0, 4096, 4096, r, WIDE, form=form, fast=False)
        for r, form in ((16, "dense"), (200, "nf4"))
    ),
    *(
        Case("dora", "dora_norm_bwd", 0, 4096, 4096, 64, form=form, fast=False)
        for form in ("dense", "transposed", "nf4")
    ),
    *(
        Case("dora", op, 8192, 4096, 0, 0, dtype, p=0.1)
        for op in ("dora_drop", "dora_mix")
        for dtype in (HALF, WIDE)
    ),
    Case("dora, two", "dora_mix", 8192, 4096, 0, 0, p=0.1, gain=True),
    *(
        Case("odd", op, 1001, 4099, 0, 0, p=0.1, gain=True, fast=False)
        for op in ("dora_drop", "dora_mix")
    ),
]


def tensors(c):
    """Every tensor of the row, on no device at all."""

    def make(*shape, dtype=c.dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    narrow = WIDE if c.fp32 else c.dtype
    rb = c.r * max(1, c.experts)
    ra = c.r if c.shared else rb
    codes = table = None
    scales = []
    if c.form == "nf4" or c.op.startswith("nf4"):
        base = four_bits(c, make)
        codes, table, *scales = base
    else:
        base = [
            make(
                *{"dense": (c.n, c.k), "transposed": (c.k, c.n), "given": (c.m, c.n)}[
                    c.form
                ]
            )
        ]
    need = [True, True]
    if c.op != "dora_norm_bwd":
        need += [True, c.bias, c.gain, c.experts > 0]
    return {
        "codes": codes,
        "table": table,
        "scales": scales,
        "size": c.n * c.k,
        "dtype": c.dtype,
        "w": make(c.n, c.k),
        "bounds": make(15, dtype=WIDE),
        "order": make(16, dtype=torch.uint8),
        "x": make(c.m, c.k),
        "base": base,
        "a": make(ra, c.k, dtype=narrow),
        "b": make(c.n, rb, dtype=narrow),
        "scale": make(1, dtype=WIDE),
        "bias": make(c.n, dtype=narrow) if c.bias else None,
        "gain": make(c.n, dtype=WIDE) if c.gain else None,
        "seed": make(1, dtype=torch.int64),
        "gate": make(c.m, c.experts, dtype=WIDE) if c.experts else None,
        "form": c.form,
        "block": c.block,
        "p": c.p,
        "keep_z": c.gain,
        "dy": make(c.m, c.n),
        "h": make(c.m, ra),
        "z": make(c.m, c.n if c.gain else 0),
        "bits": make(c.m, mask_bytes(c.k) if c.p else 0, dtype=torch.uint8),
        "need": need,
        "m": c.m,
        "k": c.k,
        "dn": make(c.n, dtype=WIDE),
        "n": make(c.n, dtype=WIDE),
        "u": make(c.m, c.k),
        "v": make(c.m, c.k) if c.gain else None,
    }


def four_bits(c, make):
    """The tensors of a weight in 4 bits."""
    blocks = -(-c.n * c.k // c.block)
    codes = make(-(-c.n * c.k // 2), dtype=torch.uint8)
    table = make(16, dtype=WIDE)
    if not c.nested:
        return [codes, table, make(blocks, dtype=WIDE)]
    groups = -(-blocks // 256)
    scales = make(blocks, dtype=torch.uint8)
    return [
        codes,
        table,
        scales,
        *(make(*size, dtype=WIDE) for size in ((groups,), (256,), ())),
    ]
