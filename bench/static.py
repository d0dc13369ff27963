"""What the Triton kernels compile to for every kind of GPU, and whether that is what they were written for.

python -m peftops.bench.static [--quick]: exit status 1 where a kernel spills, misses the tensor cores, asks for more
shared memory than there is or loads by less than 16 bytes. Launchers run on meta tensors: what they would launch is
compiled, so that tiles and flags are theirs. Needs no GPU, and proves nothing about time.
"""

import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import peftops.functional  # noqa: F401  registers the ops
from peftops._op import CONTRACTS
from peftops.triton import _gemm, lora

TARGETS = {  # the tables' key, multiprocessors, tensor-core instruction, target
    "sm_80": ("sm_80", 108, r"\bHMMA", GPUTarget("cuda", 80, 32)),
    "sm_86": ("sm_86", 82, r"\bHMMA", GPUTarget("cuda", 86, 32)),
    "sm_89": ("sm_86", 128, r"\bHMMA", GPUTarget("cuda", 89, 32)),
    "sm_90": ("sm_90", 132, r"\bHGMMA", GPUTarget("cuda", 90, 32)),
    "sm_100": ("sm_100", 148, r"\bUTC\w*MMA", GPUTarget("cuda", 100, 32)),
    "sm_120": ("sm_86", 170, r"\bHMMA", GPUTarget("cuda", 120, 32)),
    "gfx942": ("gfx942", 304, r"v_mfma", GPUTarget("hip", "gfx942", 64)),
}
PRODUCTS = {"fwd_kernel", "dgrad_kernel"}  # tensor-core bound, unless what they add to is given
PASSES = {"shrink_kernel", "grads_kernel", "da_kernel", "gemv_kernel", "parts_kernel"}  # bound by what they read
SPILLED = 16  # bytes a thread that may wait outside of loops for the epilogue
WIDE_LOADS = r"LDGSTS\S*\.128|\bLDG\.\S*128|UTMALDG|(global|buffer)_load_(dwordx4|lds_dwordx4)"
KINDS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}


class Case(NamedTuple):
    """One call of an op; fast ones are held to what their kernels were written for."""

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
    path: str | None = "fused"
    fast: bool = True


HALF, WIDE = torch.float16, torch.float32
PLAIN = [Case("plain", op, 8192, 4096, 4096, 16) for op in ("lora_fwd", "lora_bwd")]
FULL = [
    Case("dora", op, 8192, 4096, 4096, 64, HALF, form="transposed", p=0.1, bias=True, gain=True)
    for op in ("lora_fwd", "lora_bwd")
]
GEMV = [
    Case("few rows", "lora_gemv", 1, 4096, 4096, 16),
    Case("few rows, wide", "lora_gemv", 16, 4096, 14336, 8, fp32=True, bias=True, gain=True),
]
FLAGS = [
    *(Case("dropout", op, 8192, 4096, 4096, 16, p=0.1, fp32=True) for op in ("lora_fwd", "lora_bwd")),
    *(Case("experts", op, 8192, 4096, 4096, 16, experts=8, shared=True, p=0.1) for op in ("lora_fwd", "lora_bwd")),
    *(Case("few tiles", op, 1024, 4096, 1024, 16, gain=True) for op in ("lora_fwd", "lora_bwd")),
    *(Case("fewest tiles", op, 256, 1024, 1024, 64, p=0.1) for op in ("lora_fwd", "lora_bwd")),
    *(Case("multiples of 8", op, 1001, 4104, 4120, 8, p=0.1, bias=True) for op in ("lora_fwd", "lora_bwd")),
    *(Case("cublas", op, 8192, 4096, 4096, 16, p=0.1, gain=True, path="cublas") for op in ("lora_fwd", "lora_bwd")),
    Case("few rows, most", "lora_gemv", 64, 4096, 4096, 64, HALF, form="transposed", gain=True),
    Case("few rows, widest", "lora_gemv", 64, 4096, 51200, 32),
    Case("few rows, experts", "lora_gemv", 4, 4096, 51200, 16, form="transposed", experts=4, shared=True),
    Case("mask", "lora_mask", 8192, 4096, 0, 0, p=0.1, fast=False),
]
SLOW = [
    *(Case("odd", op, 1001, 4099, 4101, 5, p=0.1, path="cublas", fast=False) for op in ("lora_fwd", "lora_bwd")),
    *(
        Case("fp32", op, 8192, 4096, 4096, 16, WIDE, p=0.1, gain=True, path=None, fast=False)
        for op in ("lora_fwd", "lora_bwd")
    ),
    Case("few rows, fp32", "lora_gemv", 1, 4096, 4096, 16, WIDE, fast=False),
]
LISTS = {
    "sm_80": PLAIN + FULL + GEMV, "sm_86": PLAIN + FULL + GEMV + FLAGS + SLOW, "sm_89": PLAIN,
    "sm_90": PLAIN + FULL + GEMV + FLAGS + SLOW, "sm_100": PLAIN + FULL + GEMV, "sm_120": PLAIN + FULL + GEMV,
    "gfx942": PLAIN + FULL + GEMV,
}  # fmt: skip
QUICK = {"sm_80": PLAIN[:1], "sm_90": PLAIN + FULL + GEMV[:1], "sm_120": FULL, "gfx942": PLAIN[:1]}


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: dict[str, Any]


@contextmanager
def launches_on(kind, processors, chosen):
    """Collects what launchers would launch on such a machine."""
    found = []

    def record(kernel, *args, grid, warmup, **kwargs):
        found.append(Launch(kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs))

    before = JITFunction.run, _gemm.machine, _gemm.path
    JITFunction.run, _gemm.machine = record, lambda device: (kind, processors)
    if chosen:
        _gemm.path = lambda *args, **kwargs: chosen
    try:
        yield found
    finally:
        JITFunction.run, _gemm.machine, _gemm.path = before


def tensors(c):
    """Every tensor of the row, on no device at all."""

    def make(*shape, dtype=c.dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    narrow = WIDE if c.fp32 else c.dtype
    ra, rb = (c.r if c.shared else c.r * max(1, c.experts)), c.r * max(1, c.experts)
    base = {"dense": (c.n, c.k), "transposed": (c.k, c.n), "given": (c.m, c.n)}[c.form]
    return {
        "x": make(c.m, c.k), "base": [make(*base)], "a": make(ra, c.k, dtype=narrow), "b": make(c.n, rb, dtype=narrow),
        "scale": make(1, dtype=WIDE), "bias": make(c.n, dtype=narrow) if c.bias else None,
        "gain": make(c.n, dtype=WIDE) if c.gain else None, "seed": make(1, dtype=torch.int64),
        "gate": make(c.m, c.experts, dtype=WIDE) if c.experts else None,
        "form": c.form, "block": 0, "p": c.p, "keep_z": c.gain,
        "dy": make(c.m, c.n), "h": make(c.m, ra), "z": make(c.m, c.n if c.gain else 0),
        "bits": make(c.m, 4 * -(-c.k // 32) if c.p else 0, dtype=torch.uint8),
        "need": [True, True, True, c.bias, c.gain, c.experts > 0], "m": c.m, "k": c.k,
    }  # fmt: skip


def launches_of(case, target):
    contract, values = CONTRACTS[case.op], tensors(case)
    args = [values[name] for name in contract.__code__.co_varnames[: contract.__code__.co_argcount]]
    outputs = contract(*args)
    with launches_on(*TARGETS[target][:2], case.path) as found:
        getattr(lora, case.op)(*(outputs if isinstance(outputs, tuple) else (outputs,)), *args)
    return found


def build(launch, target):
    """The compiled kernel, specialized as at a launch: aligned pointers, and integers that are 1 or divide by 16."""
    signature, constants, aligned = {}, {}, {}
    for at, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        if isinstance(value, torch.Tensor):
            signature[param.name] = KINDS[value.dtype]
        elif param.is_constexpr or value is None or (type(value) is int and value == 1 and not param.do_not_specialize):
            signature[param.name], constants[at,] = "constexpr", value
        else:
            signature[param.name] = "fp32" if type(value) is float else "i32"
        divides = isinstance(value, torch.Tensor) or (
            type(value) is int and value % 16 == 0 and not param.do_not_specialize
        )
        if divides and signature[param.name] != "constexpr":
            aligned[at,] = [["tt.divisibility", 16]]
    options = {name: value for name, value in launch.arguments.items() if name not in launch.kernel.arg_names}
    return triton.compile(ASTSource(launch.kernel, signature, constants, aligned), TARGETS[target][3], options)


class Numbers(NamedTuple):
    registers: int
    spilled: int  # bytes a thread
    shared: int
    loop: int  # instructions of the loop with the most for tensor cores
    tensor_core: int
    wide: int
    reloads: int  # of spilled values, in loops
    waits: int  # for wgmma, in that loop
    instructions: int


def numbers(compiled, target):
    tensor_core = TARGETS[target][2]
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.vgpr_{what}: *(\d+)", text)[1]) for what in ("count", "spill_count"))
        lines, loops = re.findall(r"^\t([a-z]\w+)", text, re.M), []
    else:
        sass, usage = cuobjdump(compiled, "-sass"), cuobjdump(compiled, "-res-usage")
        registers, spilled = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
        places, lines = zip(*re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass), strict=True)
        loops = list(loops_of([int(place, 16) for place in places], lines))

    def count(what, where=lines):
        return sum(bool(re.search(what, line)) for line in where)

    if not count(r"\b(LDL|STL)") and target != "gfx942":
        spilled = 0  # ptxas reserves a stack that nothing uses
    inner = max(loops, key=lambda loop: (count(tensor_core, loop), -len(loop)), default=())
    return Numbers(
        registers, spilled, compiled.metadata.shared, len(inner), count(tensor_core), count(WIDE_LOADS),
        sum(count(r"\b(LDL|STL)", loop) for loop in loops), count(r"WARPGROUP\.DEPBAR", inner), len(lines),
    )  # fmt: skip


def cuobjdump(compiled, flag):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.check_output([tool, flag, file.name], text=True, stderr=subprocess.DEVNULL)


def loops_of(places, lines):
    """The instructions between a branch backwards and where it goes, of loops that hold no other."""
    at, found = {place: i for i, place in enumerate(places)}, []
    for i, line in enumerate(lines):
        if (branch := re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", line)) and (start := at.get(int(branch[1], 16), i)) < i:
            found.append((start, i))
    for start, stop in found:
        if not any(start <= first and last <= stop for first, last in found if (first, last) != (start, stop)):
            yield lines[start : stop + 1]


def faults(launch, target, found, fast):
    name = launch.kernel.__name__
    limit = _gemm.SHARED[TARGETS[target][0]]
    if found.shared > limit:
        yield f"shared memory {found.shared} > {limit}"
    if found.instructions < 20:
        yield f"an empty kernel: {found.instructions} instructions"
    if not fast:
        return
    if found.spilled > SPILLED or found.reloads:
        yield f"spills {found.spilled} bytes a thread, {found.reloads} instructions in loops"
    serial = name == "dgrad_kernel" and launch.arguments["GAIN"] is not None  # dz comes from registers
    if name in PRODUCTS and found.waits > 1 and not serial:
        yield f"{found.waits} waits for wgmma in a loop"
    if name in PRODUCTS and launch.arguments["FORM"] != "given" and not found.tensor_core:
        yield f"no {TARGETS[target][2]}"
    if name in PRODUCTS | PASSES and not found.wide:
        yield "no loads of 16 bytes"


def main(lists):
    failed, seen = [], set()
    print(f"triton {triton.__version__}\n{'target':7}{'kernel':14}{'case':18}{'tile':32}", *Numbers._fields)
    for target, cases in lists.items():
        for case in cases:
            for launch in launches_of(case, target):
                name, tile = (
                    launch.kernel.__name__,
                    " ".join(f"{k}{v}" for k, v in launch.arguments.items() if k in SHOWN),
                )
                try:
                    compiled = build(launch, target)
                except Exception as error:
                    failed.append(f"{name} {target} {case.label}: {error!r}"[:300])
                    continue
                if (compiled.hash, target) in seen:
                    continue
                seen.add((compiled.hash, target))
                found = numbers(compiled, target)
                print(f"{target:7}{name:14}{case.label:18}{tile:32}", *(f"{number:6}" for number in found), flush=True)
                failed += [
                    f"{name} {target} {case.label}: {fault}" for fault in faults(launch, target, found, case.fast)
                ]
    print(f"{len(seen)} kernels", *failed, sep="\n")
    return 1 if failed else 0


SHOWN = {"BM", "BN", "BK", "BR", "num_warps", "num_stages"}

if __name__ == "__main__":
    sys.exit(main(QUICK if "--quick" in sys.argv[1:] else LISTS))
