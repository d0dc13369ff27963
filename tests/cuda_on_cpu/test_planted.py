"""A test of the tests: each of these bugs is planted in the kernels, and a run must notice it.

`pytest -m slow` runs them.
"""

import shutil

import pytest

from . import build
from .test_emulator import sanitized

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.missing() is not None, reason=str(build.missing())),
]

BUGS = {  # (file, its text, the text with the bug, which run has to notice it)
    "barrier missing before sums are added": (
        "lora.cu",
        "  __syncthreads();\n  if (g.inside) {",
        "  if (g.inside) {",
        "plain",
    ),
    "barrier missing between warps of a rank": (
        "lora.cu",
        "  __syncthreads();\n  if (tid >= rows) return;",
        "  if (tid >= rows) return;",
        "plain",
    ),
    "barrier missing after h": (
        "lora_mma.cu",
        "S::WIDTH_H));\n    __syncthreads();",
        "S::WIDTH_H));",
        "thread",
    ),
    "barrier missing in the loop over tiles": (
        "lora_mma.cu",
        "wait_copies<S::STAGES - 2>();\n    __syncthreads();",
        "wait_copies<S::STAGES - 2>();",
        "plain",
    ),
    "barrier missing before sums replace tiles": (
        "lora_mma.cu",
        "  wait_copies<0>();\n  __syncthreads();",
        "  wait_copies<0>();",
        "thread",
    ),
    "barrier that half of the warps meet": (
        "lora_mma.cu",
        "    if (fetches && next < tiles) fetch(next);",
        "    if (i_k == 0) __syncthreads();",
        "plain",
    ),
    "return before a barrier": (
        "lora.cu",
        "  allow_launch_behind();",
        "  if (threadIdx.x > 200) return;\n  allow_launch_behind();",
        "plain",
    ),
    "copies that nobody waits for": (
        "lora_mma.cu",
        "    wait_copies<S::STAGES - 2>();\n",
        "",
        "plain",
    ),
    "copies waited for one too late": (
        "lora_mma.cu",
        "wait_copies<S::STAGES - 2>()",
        "wait_copies<S::STAGES - 1>()",
        "plain",
    ),
    "h read before the launch that makes it": (
        "lora.cu",
        "  } else {\n    wait_for_launch_before();\n  }",
        "  }",
        "plain",
    ),
    "rows of w past the last": (
        "lora_mma.cu",
        "n0 + row < g.n, k",
        "true, k",
        "address",
    ),
    "rows of x past the last": (
        "lora.cu",
        "min(i, rows - 1) * k)",
        "i * k)",
        "address",
    ),
    "columns past the last": (
        "lora_mma.cu",
        "    if (c < columns) store",
        "    store",
        "address",
    ),
    "too little shared memory": (
        "lora_mma.cu",
        "size_t(STAGES) * (ROWS + ranks) * BK * 2",
        "size_t(STAGES) * (ROWS + ranks) * BK * 2 - 16",
        "address",
    ),
    "columns of k past the last": (
        "lora_mma.cu",
        "    inside &= k + chunk * 8 < g.k;\n",
        "",
        "plain",
    ),
    "fragments swapped": (
        "lora_mma.cu",
        "multiply<T>(acc[2 * j], r_w, r_x[0], r_x[1]);",
        "multiply<T>(acc[2 * j], r_w, r_x[1], r_x[0]);",
        "plain",
    ),
    "lanes that name the wrong rows": (
        "lora_mma.cu",
        "i_n * 16 + lane % 16, chunk + lane / 16));\n      if",
        "i_n * 16 + lane % 8, chunk + lane / 16));\n      if",
        "plain",
    ),
    "sums stored in the wrong rows": (
        "lora_mma.cu",
        "lane % 4 * 2 + e % 2;",
        "lane % 4 * 2 + e / 2;",
        "plain",
    ),
    "half of a warp": (
        "tile.cuh",
        "__shfl_xor_sync(~0u",
        "__shfl_xor_sync(0xffffu",
        "plain",
    ),
    "operands swapped in PTX": (
        "ptx.cuh",
        "{%4, %5, %6, %7}",
        "{%5, %4, %6, %7}",
        "plain",
    ),
    "registers swapped in PTX": (
        "ptx.cuh",
        "b16 {%0, %1, %2, %3}, [%4];",
        "b16 {%1, %0, %2, %3}, [%4];",
        "plain",
    ),
    "a misaligned copy": (
        "lora_mma.cu",
        "copy_async(tile + chunk_at(row, chunk), inside",
        "copy_async(tile + chunk_at(row, chunk) + 4, inside",
        "plain",
    ),
    "rows in the same banks": (
        "lora_mma.cu",
        "(chunk ^ (row & 7))",
        "chunk",
        "conflicts",
    ),
    "barrier missing after the table": (
        "lora_nf4.cu",
        "__ldg(base.table + i / COPIES % 16)};\n  __syncthreads();",
        "__ldg(base.table + i / COPIES % 16)};",
        "thread",
    ),
    "barrier missing in the loop over codes": (
        "lora_nf4.cu",
        "wait_copies<S::STAGES - 2>();\n    __syncthreads();",
        "wait_copies<S::STAGES - 2>();",
        "plain",
    ),
    "codes that nobody waits for": (
        "lora_nf4.cu",
        "    wait_copies<S::STAGES - 2>();\n",
        "",
        "plain",
    ),
    "h read before it is made": (
        "lora_nf4.cu",
        "  __syncthreads();\n  if (!g.inside) wait_for_launch_before();",
        "  __syncthreads();",
        "plain",
    ),
    "the low half of a byte first": (
        "lora_nf4.cu",
        "{__ldg(base.table + i / COPIES / 16), __ldg(base.table + i / COPIES % 16)}",
        "{__ldg(base.table + i / COPIES % 16), __ldg(base.table + i / COPIES / 16)}",
        "plain",
    ),
    "the scale of another row": (
        "lora_nf4.cu",
        "scale = absmax[below]",
        "scale = absmax[0]",
        "plain",
    ),
    "the scale of another pair": (
        "lora_nf4.cu",
        "base.shift > 5 && g.k % 64 == 0",
        "base.shift > 4",
        "plain",
    ),
    "rows of codes past the last": (
        "lora_nf4.cu",
        "min(n0 + row + q * STEP, g.n - 1)",
        "(n0 + row + q * STEP)",
        "address",
    ),
    "columns of codes past the last": (
        "lora_nf4.cu",
        "chunk * GROUP < left ? 16 : 0",
        "16",
        "address",
    ),
    "columns of y past the last": (
        "lora_nf4.cu",
        "    if (n0 + c >= g.n) continue;\n",
        "",
        "address",
    ),
    "one rounding of a scale": (
        "nf4.cuh",
        "__fadd_rn(__fmul_rn(nested_table[scale.code], scale.value), offset)",
        "fmaf(nested_table[scale.code], scale.value, offset)",
        "plain",
    ),
    "fragments and pieces that nobody waits for": (
        "dora.cu",
        "    wait_copies<S::STAGES - 2>();\n",
        "",
        "plain",
    ),
    "barrier missing in the loop over fragments": (
        "dora_mma.cu",
        "wait_copies<STAGES - 2>();\n      __syncthreads();",
        "wait_copies<STAGES - 2>();",
        "plain",
    ),
    "barrier missing before squares replace fragments": (
        "dora_mma.cu",
        "  wait_copies<0>();\n  __syncthreads();",
        "  wait_copies<0>();",
        "thread",
    ),
    "barrier missing between ranks": (
        "dora_plain.cu",
        "rank += RANKS) {\n      __syncthreads();",
        "rank += RANKS) {",
        "plain",
    ),
    "squares added before they are made": (
        "dora.cu",
        "  wait_for_launch_before();\n  if (row >= g.n) return;",
        "  if (row >= g.n) return;",
        "plain",
    ),
    "fragments copied before they are made": (
        "dora_mma.cu",
        "  wait_for_launch_before();\n  allow_launch_behind();",
        "  allow_launch_behind();",
        "plain",
    ),
    "ranks and rows of a fragment swapped": (
        "dora.cu",
        "(left ? i / 2 : i % 2) * 8",
        "i % 2 * 8",
        "plain",
    ),
    "the scales of the tile before": (
        "dora.cu",
        "fetch_scales(tile + 1)",
        "fetch_scales(tile)",
        "plain",
    ),
    "rows of pieces past the last": (
        "dora.cuh",
        "column >= g.k || row + (F == Form::transposed ? 0 : i) >= g.n",
        "column >= g.k",
        "address",
    ),
    "the approximate reciprocal": (
        "nf4.cu",
        "__frcp_rn(",
        "__fdividef(1.001f, ",
        "plain",
    ),
    "elements past the last quantized": (
        "nf4.cu",
        "if (at + 8 <= size) return",
        "return",
        "address",
    ),
    "barrier missing between warps of a rank, mixed rows": (
        "multi.cu",
        "  __syncthreads();\n  const int i = tid / PAGE",
        "  const int i = tid / PAGE",
        "plain",
    ),
    "h read before the launch that makes it, mixed rows": (
        "multi.cu",
        "  if (!g.inside) wait_for_launch_before();\n",
        "",
        "plain",
    ),
    "rows of a higher slot taken along, mixed rows": (
        "multi.cu",
        "] == slot);",
        "] >= slot);",
        "plain",
    ),
    "rows past the last taken along, mixed rows": (
        "multi.cu",
        "row < g.m && ",
        "",
        "address",
    ),
    "a group that begins at an earlier row, mixed rows": (
        "multi.cu",
        "  left &= ~earlier;\n",
        "",
        "plain",
    ),
    "rank-rows beyond the rank, mixed rows": (
        "lora.cuh",
        "i <= last ? r_h[i] * rounded<T>(r_b[i]) : 0.0f",
        "r_h[i] * rounded<T>(r_b[i])",
        "plain",
    ),
    "the first page for all, mixed rows": (
        "lora.cuh",
        "int64_t(table[j / PAGE])",
        "int64_t(table[0])",
        "plain",
    ),
    "another slot's scale, mixed rows": (
        "lora.cuh",
        "g.scale[slot]",
        "g.scale[0]",
        "plain",
    ),
}

LAW = """
import sys
import torch
from cuda_on_cpu import build
from cuda_on_cpu.test_emulator import SCHEDULES
from cuda_on_cpu.test_kernels import (
    DTYPES, MULTI_SHAPES, NF4_PLANS, NORM_SHAPES, PLANS, cases,
)
from peftops import cuda
from peftops.testing.cases import CASES
from peftops.testing.law import call, check_case
from peftops.cuda import _device, dora, lora, multi, nf4
import peftops.functional

torch.use_deterministic_algorithms(True, warn_only=True)
emulator = build.opened({library!r})
noticer = {noticer!r}
class Emulated:
    def __getattr__(self, op):
        return lambda *args: (getattr(emulator, op)(*args), emulator.finish())
for row in (dora, lora, multi, nf4):
    row._C = Emulated()
cuda.runs = lambda device: True
_device.processors, _device.stream = lambda device: 4, lambda device: 0
shapes = {{
    "dense": PLANS, "nf4": NF4_PLANS, "norm": NORM_SHAPES, "multi": MULTI_SHAPES,
}}
ops = {{"norm": "dora_norm", "multi": "multi_gemv"}}

for schedule in SCHEDULES if noticer == "plain" else SCHEDULES[:1]:
    emulator.schedule(*schedule)
    for dtype in DTYPES if noticer != "thread" else DTYPES[1:]:
        for form in {forms!r}:
            for shape in shapes[form]:
                for label, args in cases(shape, dtype, form):
                    error, bound = check_case(ops.get(form, "lora_gemv"), "cuda", args)
                    if not error <= bound:
                        sys.exit(f"unlawful: {{schedule}}, {{shape}}, {{dtype}}, {{label}}")
        if "nf4" not in {forms!r}:
            continue
        for op in ("nf4_quantize", "nf4_dequantize"):
            for label, args in CASES[op]((0, 9001, 1, 0), dtype):
                ours = call(op, "cuda", args)
                if not all(map(torch.equal, ours, call(op, "reference", args))):
                    sys.exit(f"unlike the reference: {{schedule}}, {{dtype}}, {{label}}")
if emulator.counts()["conflicts"]:
    sys.exit("conflicts")
"""
NOTICED = {  # what each run says when it notices a bug
    "plain": "",
    "conflicts": "conflicts",
    "address": "AddressSanitizer",
    "thread": "ThreadSanitizer: data race",
}


def run(folder, noticer, *forms):
    """Holds the kernels in a folder to the law in a process of its own."""
    sanitizer = noticer if noticer in ("address", "thread") else ""
    library = build.link(sanitizer=sanitizer, include=folder)
    code = LAW.format(library=str(library), noticer=noticer, forms=forms)
    return sanitized(sanitizer, code)


@pytest.mark.parametrize("noticer", NOTICED)
def test_the_kernels_as_they_are(noticer):
    done = run(build.KERNELS, noticer, "dense", "nf4", "norm", "multi")
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug, tmp_path):
    file, right, wrong, noticer = BUGS[bug]
    folder = shutil.copytree(build.KERNELS.parent, tmp_path / "csrc") / "cuda"
    text = (folder / file).read_text()
    assert text.count(right) == 1
    (folder / file).write_text(text.replace(right, wrong))
    form = "dense"
    if "dora" in file:
        form = "norm"
    elif "nf4" in file:
        form = "nf4"
    elif "mixed rows" in bug:
        form = "multi"
    done = run(folder, noticer, form)
    errors = done.stderr.strip().splitlines() or [""]
    report = next((line for line in errors if "Sanitizer" in line), errors[-1])
    print(f"{bug}: {report[:160]}")
    assert done.returncode and NOTICED[noticer] in done.stderr, done.stderr[-3000:]
