"""Triton kernels compiled ahead of time for every kind of GPU, as their launchers would launch them.

Launchers run on meta tensors: what they would launch is compiled, so that tiles and flags are theirs.
"""

import hashlib
import inspect
import json
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import peftops.functional  # noqa: F401  registers the ops
from peftops import backends
from peftops._op import CONTRACTS
from peftops.triton import _gemm, lora_tma

from . import sass

TARGETS = {  # the tables' key, multiprocessors, target
    "sm_80": ("sm_80", 108, GPUTarget("cuda", 80, 32)),
    "sm_86": ("sm_86", 82, GPUTarget("cuda", 86, 32)),
    "sm_89": ("sm_86", 128, GPUTarget("cuda", 89, 32)),
    "sm_90": ("sm_90", 132, GPUTarget("cuda", 90, 32)),
    "sm_100": ("sm_100", 148, GPUTarget("cuda", 100, 32)),
    "sm_120": ("sm_86", 170, GPUTarget("cuda", 120, 32)),
    "gfx942": ("gfx942", 304, GPUTarget("hip", "gfx942", 64)),
}
KINDS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}
SIZES = ("BM", "BN", "BK", "BR", "num_warps", "num_stages")  # of a tile


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
    path: str | None = "fused"
    fast: bool = True


HALF, WIDE = torch.float16, torch.float32
BOTH = "lora_fwd", "lora_bwd"
CASES = [
    *(Case("plain", op, 8192, 4096, 4096, 16) for op in BOTH),
    *(Case("dora", op, 8192, 4096, 4096, 64, HALF, form="transposed", p=0.1, bias=True, gain=True) for op in BOTH),
    *(Case("dropout", op, 8192, 4096, 4096, 16, p=0.1, fp32=True) for op in BOTH),
    *(Case("experts", op, 8192, 4096, 4096, 16, experts=8, shared=True, p=0.1) for op in BOTH),
    *(Case("few tiles", op, 1024, 4096, 1024, 16, gain=True) for op in BOTH),
    *(Case("fewest tiles", op, 256, 1024, 1024, 64, p=0.1) for op in BOTH),
    *(Case("multiples of 8", op, 1001, 4104, 4120, 8, p=0.1, bias=True) for op in BOTH),
    *(Case("cublas", op, 8192, 4096, 4096, 16, p=0.1, gain=True, path="cublas") for op in BOTH),
    *(Case("cublas, delta first", op, 8192, 4096, 4096, 16, p=0.1, bias=True, path="cublas") for op in BOTH),
    Case("cublas, dora", "lora_bwd", 8192, 4096, 4096, 64, HALF, bias=True, gain=True, path="cublas"),
    *(Case("tma", op, 8192, 4096, 4096, 16, path="tma") for op in BOTH),
    *(Case("tma, dropout", op, 8192, 4096, 4096, 32, fp32=True, p=0.1, bias=True, path="tma") for op in BOTH),
    *(Case("tma, dora", op, 8192, 4096, 4096, 64, HALF, p=0.1, gain=True, path="tma") for op in BOTH),
    *(
        Case("tma, transposed", op, 8192, 4096, 4096, 8, form="transposed", bias=True, gain=True, path="tma")
        for op in BOTH
    ),
    *(
        Case("tma, nf4", op, 8192, 4096, 14336, 16, form="nf4", fp32=True, p=0.1, nested=True, path="tma")
        for op in BOTH
    ),
    *(Case("tma, few tiles", op, 1024, 4096, 1024, 64, p=0.1, gain=True, path="tma") for op in BOTH),
    Case("few rows", "lora_gemv", 1, 4096, 4096, 16),
    Case("few rows, wide", "lora_gemv", 16, 4096, 14336, 8, fp32=True, bias=True, gain=True),
    Case("few rows, most", "lora_gemv", 64, 4096, 4096, 64, HALF, form="transposed", gain=True),
    Case("few rows, widest", "lora_gemv", 64, 4096, 51200, 32),
    Case("few rows, experts", "lora_gemv", 4, 4096, 51200, 16, form="transposed", experts=4, shared=True),
    Case("mask", "lora_mask", 8192, 4096, 0, 0, p=0.1, fast=False),
    *(Case("odd", op, 1001, 4099, 4101, 5, p=0.1, path="cublas", fast=False) for op in BOTH),
    *(Case("fp32", op, 8192, 4096, 4096, 16, WIDE, p=0.1, gain=True, path=None, fast=False) for op in BOTH),
    Case("few rows, fp32", "lora_gemv", 1, 4096, 4096, 16, WIDE, fast=False),
    *(Case("nf4", op, 512, 4096, 14336, 16, form="nf4", nested=True) for op in BOTH),
    *(Case("nf4", op, 256, 4096, 2048, 16, HALF, form="nf4", fp32=True, p=0.1, bias=True, gain=True) for op in BOTH),
    *(Case("nf4, fewest tiles", op, 100, 4104, 1024, 8, form="nf4", nested=True) for op in BOTH),
    *(Case("nf4, cublas", op, 8192, 4096, 4096, 16, form="nf4", nested=True, path="cublas") for op in BOTH),
    *(Case("nf4, fp32", op, 64, 133, 33, 5, WIDE, form="nf4", path=None, fast=False) for op in BOTH),
    Case("few rows, nf4", "lora_gemv", 1, 4096, 4096, 16, form="nf4", nested=True),
    Case("few rows, nf4, no rank", "lora_gemv", 16, 4096, 14336, 0, form="nf4", nested=True),
    Case("decode", "nf4_dequantize", 1, 4096, 4096, 0, nested=True),
    Case("decode", "nf4_dequantize", 1, 4096, 4096, 0, HALF),
    Case("encode", "nf4_quantize", 1, 4096, 4096, 0),
    Case("encode, long blocks", "nf4_quantize", 1, 4096, 4096, 0, WIDE, block=4096),
    *(Case(f"rank {r}", "dora_norm", 0, 4096, 4096, r) for r in (0, 16, 128, 256, 384, 768)),
    Case("fp32 adapters", "dora_norm", 0, 4096, 14336, 64, fp32=True),
    Case("transposed", "dora_norm", 0, 4096, 4096, 64, HALF, form="transposed"),
    Case("transposed, wide", "dora_norm", 0, 4096, 4096, 384, form="transposed", fp32=True),
    Case("odd rows", "dora_norm", 0, 768, 50257, 8, fp32=True),
    *(Case(f"nf4, rank {r}", "dora_norm", 0, 4096, 4096, r, form="nf4", nested=True) for r in (16, 64, 256, 384, 768)),
    Case("nf4, fp32 adapters", "dora_norm", 0, 4096, 4096, 64, HALF, form="nf4", fp32=True),
    Case("nf4, small blocks", "dora_norm", 0, 4104, 1024, 8, form="nf4"),
    *(Case("odd", "dora_norm", 0, 4099, 4101, r, form=form, fast=False) for r in (5, 200) for form in ("dense", "nf4")),
    *(
        Case("fp32", "dora_norm", 0, 4096, 4096, r, WIDE, form=form, fast=False)
        for r, form in ((16, "dense"), (200, "nf4"))
    ),
    *(
        Case("dora", "dora_norm_bwd", 0, 4096, 4096, 64, form=form, fast=False)
        for form in ("dense", "transposed", "nf4")
    ),
    *(Case("dora", op, 8192, 4096, 0, 0, dtype, p=0.1) for op in ("dora_drop", "dora_mix") for dtype in (HALF, WIDE)),
    Case("dora, two", "dora_mix", 8192, 4096, 0, 0, p=0.1, gain=True),
    *(Case("odd", op, 1001, 4099, 0, 0, p=0.1, gain=True, fast=False) for op in ("dora_drop", "dora_mix")),
]


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: dict[str, Any]
    target: str
    case: Case

    @property
    def tile(self):
        return " ".join(f"{name}{self.arguments[name]}" for name in SIZES if name in self.arguments)

    def features(self):
        """What a covering list has to meet: the kernel on the target, each tile, each value of each flag."""
        name = self.kernel.__name__
        yield name, self.target
        yield name, TARGETS[self.target][0], self.tile
        for param in self.kernel.params:
            value = self.arguments.get(param.name)
            if param.is_constexpr and param.name not in SIZES:
                yield name, param.name, value
            elif param.is_constexpr or value is None or isinstance(value, torch.Tensor):
                yield name, param.name, getattr(value, "dtype", None)
            elif isinstance(value, tuple):
                yield name, param.name, len(value)


@contextmanager
def launches_on(kind, processors, chosen):
    """Collects what launchers would launch on such a machine."""
    found = []

    def record(kernel, *args, grid, warmup, **kwargs):
        found.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs))

    before = JITFunction.run, _gemm.machine, _gemm.choose_product
    JITFunction.run, _gemm.machine = record, lambda device: (kind, processors)
    if chosen:
        _gemm.choose_product = lambda *args, **kwargs: chosen
    try:
        yield found
    finally:
        JITFunction.run, _gemm.machine, _gemm.choose_product = before


def tensors(c):
    """Every tensor of the row, on no device at all."""

    def make(*shape, dtype=c.dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    narrow = WIDE if c.fp32 else c.dtype
    ra, rb = (c.r if c.shared else c.r * max(1, c.experts)), c.r * max(1, c.experts)
    if c.form == "nf4" or c.op.startswith("nf4"):
        codes, table, *scales = base = four_bits(c, make)
    else:
        codes, table, scales = None, None, []
        base = [make(*{"dense": (c.n, c.k), "transposed": (c.k, c.n), "given": (c.m, c.n)}[c.form])]
    return {
        "codes": codes, "table": table, "scales": scales, "size": c.n * c.k, "dtype": c.dtype, "w": make(c.n, c.k),
        "bounds": make(15, dtype=WIDE), "order": make(16, dtype=torch.uint8),
        "x": make(c.m, c.k), "base": base, "a": make(ra, c.k, dtype=narrow), "b": make(c.n, rb, dtype=narrow),
        "scale": make(1, dtype=WIDE), "bias": make(c.n, dtype=narrow) if c.bias else None,
        "gain": make(c.n, dtype=WIDE) if c.gain else None, "seed": make(1, dtype=torch.int64),
        "gate": make(c.m, c.experts, dtype=WIDE) if c.experts else None,
        "form": c.form, "block": c.block, "p": c.p, "keep_z": c.gain,
        "dy": make(c.m, c.n), "h": make(c.m, ra), "z": make(c.m, c.n if c.gain else 0),
        "bits": make(c.m, 4 * -(-c.k // 32) if c.p else 0, dtype=torch.uint8),
        "need": [True, True] if c.op == "dora_norm_bwd" else [True, True, True, c.bias, c.gain, c.experts > 0],
        "m": c.m, "k": c.k, "dn": make(c.n, dtype=WIDE), "n": make(c.n, dtype=WIDE),
        "u": make(c.m, c.k), "v": make(c.m, c.k) if c.gain else None,
    }  # fmt: skip


def four_bits(c, make):
    """The tensors of a weight in 4 bits."""
    blocks, byte = -(-c.n * c.k // c.block), torch.uint8
    codes = make(-(-c.n * c.k // 2), dtype=byte), make(16, dtype=WIDE)
    if not c.nested:
        return [*codes, make(blocks, dtype=WIDE)]
    groups = -(-blocks // 256)
    return [*codes, make(blocks, dtype=byte), *(make(*size, dtype=WIDE) for size in ((groups,), (256,), ()))]


def launches_of(case, target):
    if case.path == "tma" and TARGETS[target][0] not in lora_tma.TILES:
        return []
    contract, values, cell = CONTRACTS[case.op], tensors(case), backends.cell("triton", case.op)
    args = [values[name] for name in contract.__code__.co_varnames[: contract.__code__.co_argcount]]
    outputs = contract(*args)
    with launches_on(*TARGETS[target][:2], case.path) as found:
        cell(*(outputs if isinstance(outputs, tuple) else (outputs,)), *args)
    return [Launch(*launch, target, case) for launch in found]


def launches(everything):
    """Every launch there is, or few that meet every feature of them."""
    found = [launch for case in CASES for target in TARGETS for launch in launches_of(case, target)]
    return found if everything else covering(found, Launch.features)


def covering(items, features):
    """Few of the items that have all features that any of them has: the one with the most new ones first."""
    left = {id(item): set(features(item)) for item in items}
    while best := max(items, key=lambda item: len(left[id(item)]), default=None):
        new = set(left[id(best)])
        if not new:
            return
        yield best
        for mine in left.values():
            mine -= new


def source_of(launch):
    """What to compile, specialized as at a launch: aligned pointers, and integers that are 1 or divide by 16."""
    signature, constants, aligned = {}, {}, {}
    for at, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        if isinstance(value, tuple):
            signature[param.name] = tuple(KINDS[part.dtype] for part in value)
            aligned |= {(at, i): [["tt.divisibility", 16]] for i in range(len(value))}
        elif isinstance(value, torch.Tensor):
            signature[param.name] = KINDS[value.dtype]
        elif param.is_constexpr or value is None or (type(value) is int and value == 1 and not param.do_not_specialize):
            signature[param.name], constants[at,] = "constexpr", value
        else:
            signature[param.name] = "fp32" if type(value) is float else "i64" if abs(value) >= 2**31 else "i32"
        divides = isinstance(value, torch.Tensor) or (
            type(value) is int and value % 16 == 0 and not param.do_not_specialize
        )
        if divides and signature[param.name] != "constexpr":
            aligned[at,] = [["tt.divisibility", 16]]
    options = {name: value for name, value in launch.arguments.items() if name not in launch.kernel.arg_names}
    return ASTSource(launch.kernel, signature, constants, aligned), options


def numbers(compiled, target):
    shared = compiled.metadata.shared
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.vgpr_{what}: *(\d+)", text)[1]) for what in ("count", "spill_count"))
        return sass.measure(registers, shared, spilled, [], re.findall(r"^\t([a-z]\w+.*)", text, re.M))
    ((registers, stack, places, lines),) = sass.disassemble(compiled.asm["cubin"]).values()
    return sass.measure(registers, shared, stack, places, lines)


def row(launch, found):
    kernel, target, case = launch.kernel, launch.target, launch.case
    text = Path(inspect.getsourcefile(kernel.fn)).read_text()
    absent = [name for name, value in launch.arguments.items() if value is None or value is False]
    limits = sass.limits(text, kernel.__name__, target, absent)
    faults = list(sass.faults(found, limits, _gemm.SHARED[TARGETS[target][0]], case.fast))
    about = {"kernel": kernel.__name__, "target": target, "case": f"{case.op}, {case.label}", "tile": launch.tile}
    return about | found | {"faults": faults}


def worker(everything, part, parts, kept):
    """Prints a row of JSON for each kernel of its part of the list; `kept` is a folder of what was measured before."""
    seen = set()
    for launch in list(launches(everything)):
        source, options = source_of(launch)
        words = source.hash(), json.dumps(options, sort_keys=True), launch.target, triton.__version__
        digest = hashlib.sha256("\0".join(words).encode()).hexdigest()[:24]
        if digest in seen or int(digest, 16) % parts != part:
            continue
        seen.add(digest)
        file = kept and Path(kept, f"{digest}.json")
        if file and file.exists():
            found = json.loads(file.read_text())
        else:
            try:
                found = numbers(triton.compile(source, TARGETS[launch.target][2], options), launch.target)
            except Exception as error:  # what a compiler throws has many names
                said = f"does not compile: {error!r}"[:300]
                print(
                    json.dumps(row(launch, dict.fromkeys(sass.NUMBERS, 0) | {"instructions": 0}) | {"faults": [said]})
                )
                continue
            if file:
                file.write_text(json.dumps(found))
        print(json.dumps(row(launch, found)), flush=True)
