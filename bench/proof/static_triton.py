"""Triton kernels compiled ahead of time for every kind of GPU, as launchers would launch them.

Launchers run on meta tensors, and what they would launch is compiled, with their tiles and flags.
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
from peftops.testing.cases import names
from peftops.testing.law import every
from peftops.triton import _gemm, lora_tma

from . import sass, static_cases, static_merge, static_multi
from .static_cases import Case

TARGETS = {  # the tables' key, multiprocessors, target
    "sm_80": ("sm_80", 108, GPUTarget("cuda", 80, 32)),
    "sm_86": ("sm_86", 82, GPUTarget("cuda", 86, 32)),
    "sm_89": ("sm_86", 128, GPUTarget("cuda", 89, 32)),
    "sm_90": ("sm_90", 132, GPUTarget("cuda", 90, 32)),
    "sm_100": ("sm_100", 148, GPUTarget("cuda", 100, 32)),
    "sm_120": ("sm_86", 170, GPUTarget("cuda", 120, 32)),
    "gfx942": ("gfx942", 304, GPUTarget("hip", "gfx942", 64)),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
CASES = [*static_cases.CASES, *static_multi.CASES, *static_merge.CASES]
ALIGNED = [["tt.divisibility", 16]]
SIZES = ("BM", "BN", "BK", "BR", "num_warps", "num_stages")  # of a tile


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: dict[str, Any]
    target: str
    case: Case

    @property
    def tile(self):
        return " ".join(
            f"{name}{self.arguments[name]}" for name in SIZES if name in self.arguments
        )

    def features(self):
        """What a covering list has to meet: kernel and target, tile, each flag's values."""
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
def launches_on(table, processors, product):
    """Collects (kernel, arguments) of what launchers would launch on such a machine.

    table: the key of the tables that they read. product: the one that they take, or None.
    """
    collected = []

    def record(kernel, *args, grid, warmup, **kwargs):
        collected.append(
            (kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs)
        )

    before = JITFunction.run, _gemm.machine, _gemm.choose_product
    JITFunction.run = record
    _gemm.machine = lambda device: (table, processors)
    if product:
        _gemm.choose_product = lambda *args, **kwargs: product
    try:
        yield collected
    finally:
        JITFunction.run, _gemm.machine, _gemm.choose_product = before


def arguments(case):
    """Every argument of the case's row by its name."""
    if case.op.startswith("merge"):
        return static_merge.tensors(case)
    return (static_multi if case.slots else static_cases).tensors(case)


def launches_of(case, target):
    table, processors, _ = TARGETS[target]
    if case.product == "tma" and table not in lora_tma.TILES:
        return []
    contract = CONTRACTS[case.op]
    values = arguments(case)
    args = [values[name] for name in names(contract)]
    outputs = every(contract(*args))
    with launches_on(table, processors, case.product) as collected:
        backends.cell("triton", case.op)(*outputs, *args)
    return [Launch(*launch, target, case) for launch in collected]


def launches(everything):
    """Every launch there is, or few that meet every feature of them."""
    every = [
        launch
        for case in CASES
        for target in TARGETS
        for launch in launches_of(case, target)
    ]
    return every if everything else covering(every, Launch.features)


def covering(items, features):
    """Few of the items, with all features of all; the one with the most new ones first."""
    left = {id(item): set(features(item)) for item in items}
    while best := max(items, key=lambda item: len(left[id(item)]), default=None):
        new = set(left[id(best)])
        if not new:
            return
        yield best
        for missing in left.values():
            missing -= new


def source_of(launch):
    """(source, options) of what to compile.

    Specialized as at a launch: aligned pointers, and integers that are 1 or divide by 16.
    """
    signature = {}
    constants = {}
    aligned = {}
    for at, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        signature[param.name] = type_of(value, param)
        if signature[param.name] == "constexpr":
            constants[at,] = value
        elif isinstance(value, tuple):
            aligned |= {(at, i): ALIGNED for i in range(len(value))}
        elif isinstance(value, torch.Tensor) or divides_by_16(value, param):
            aligned[at,] = ALIGNED
    options = {
        name: value
        for name, value in launch.arguments.items()
        if name not in launch.kernel.arg_names
    }
    return ASTSource(launch.kernel, signature, constants, aligned), options


def type_of(value, param):
    """What a signature of Triton says of an argument."""
    if isinstance(value, tuple):
        return tuple(POINTERS[tensor.dtype] for tensor in value)
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if (
        param.is_constexpr
        or value is None
        or (type(value) is int and value == 1 and not param.do_not_specialize)
    ):
        return "constexpr"
    if type(value) is float:
        return "fp32"
    return "i64" if abs(value) >= 2**31 else "i32"


def divides_by_16(value, param):
    return type(value) is int and value % 16 == 0 and not param.do_not_specialize


def numbers(compiled, target):
    """sass.measure of one compiled kernel."""
    shared = compiled.metadata.shared
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.vgpr_{what}: *(\d+)", text)[1])
            for what in ("count", "spill_count")
        )
        return sass.measure(
            registers,
            shared,
            spilled,
            [],
            re.findall(r"^\t([a-z]\w+.*)", text, re.M),
        )
    ((registers, stack, places, lines),) = sass.disassemble(
        compiled.asm["cubin"]
    ).values()
    return sass.measure(registers, shared, stack, places, lines)


def row(launch, measured):
    """A line of the table: what the launch is, its numbers, and what is wrong with them."""
    kernel = launch.kernel
    target = launch.target
    case = launch.case
    text = Path(inspect.getsourcefile(kernel.fn)).read_text()
    absent = [
        name
        for name, value in launch.arguments.items()
        if value is None or value is False
    ]
    limits = sass.limits(text, kernel.__name__, target, absent)
    faults = list(
        sass.faults(measured, limits, _gemm.SHARED[TARGETS[target][0]], case.fast)
    )
    names = {
        "kernel": kernel.__name__,
        "target": target,
        "case": f"{case.op}, {case.label}",
        "tile": launch.tile,
    }
    return names | measured | {"faults": faults}


def worker(everything, share, shares, kept):
    """Prints a row of JSON for each kernel of its share of the list.

    kept: a folder of what was measured before, or None.
    """
    seen = set()
    for launch in list(launches(everything)):
        source, options = source_of(launch)
        words = (
            source.hash(),
            json.dumps(options, sort_keys=True),
            launch.target,
            triton.__version__,
        )
        digest = hashlib.sha256("\0".join(words).encode()).hexdigest()[:24]
        if digest in seen or int(digest, 16) % shares != share:
            continue
        seen.add(digest)
        file = Path(kept, f"{digest}.json") if kept else None
        print(json.dumps(compiled_row(launch, source, options, file)), flush=True)


def compiled_row(launch, source, options, file):
    """The row of a launch, whose numbers are read from the file where it is there already."""
    if file and file.exists():
        return row(launch, json.loads(file.read_text()))
    try:
        measured = numbers(
            triton.compile(source, TARGETS[launch.target][2], options),
            launch.target,
        )
    except Exception as error:  # what a compiler throws has many names
        nothing = dict.fromkeys([*sass.NUMBERS, "instructions"], 0)
        return row(launch, nothing) | {"faults": [f"does not compile: {error!r}"[:300]]}
    if file:
        file.write_text(json.dumps(measured))
    return row(launch, measured)
