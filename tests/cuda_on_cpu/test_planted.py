"""A test of the tests: each of these bugs, planted alone in the kernels, is noticed. Run by `pytest -m slow`."""

import shutil

import pytest

from . import build
from .test_emulator import sanitized

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.missing() is not None, reason=str(build.missing())),
]

BUGS = {  # file, what stands there, what is planted, and which run has to notice
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
    "barrier missing after h": ("lora_mma.cu", "S::WIDTH_H));\n    __syncthreads();", "S::WIDTH_H));", "thread"),
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
    "copies that nobody waits for": ("lora_mma.cu", "    wait_copies<S::STAGES - 2>();\n", "", "plain"),
    "copies waited for one too late": (
        "lora_mma.cu",
        "wait_copies<S::STAGES - 2>()",
        "wait_copies<S::STAGES - 1>()",
        "plain",
    ),
    "h read before the launch that makes it": (
        "lora.cu",
        "    wait_for_launch_before();\n  }\n#pragma",
        "  }\n#pragma",
        "plain",
    ),
    "rows of w past the last": ("lora_mma.cu", "n0 + row < g.n, k", "true, k", "address"),
    "rows of x past the last": ("lora.cu", "min(i, rows - 1) * k)", "i * k)", "address"),
    "columns past the last": ("lora_mma.cu", "    if (c < columns) store", "    store", "address"),
    "too little shared memory": (
        "lora_mma.cu",
        "size_t(STAGES) * (ROWS + ranks) * BK * 2",
        "size_t(STAGES) * (ROWS + ranks) * BK * 2 - 16",
        "address",
    ),
    "columns of k past the last": ("lora_mma.cu", "    inside &= k + chunk * 8 < g.k;\n", "", "plain"),
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
        "lane % 4 * 2 + e % 2, column",
        "lane % 4 * 2 + e / 2, column",
        "plain",
    ),
    "half of a warp": ("tile.cuh", "__shfl_xor_sync(~0u", "__shfl_xor_sync(0xffffu", "plain"),
    "operands swapped in PTX": ("ptx.cuh", "{%4, %5, %6, %7}", "{%5, %4, %6, %7}", "plain"),
    "registers swapped in PTX": ("ptx.cuh", "b16 {%0, %1, %2, %3}, [%4];", "b16 {%1, %0, %2, %3}, [%4];", "plain"),
    "a misaligned copy": (
        "lora_mma.cu",
        "copy_async(tile + chunk_at(row, chunk), inside",
        "copy_async(tile + chunk_at(row, chunk) + 4, inside",
        "plain",
    ),
    "rows in the same banks": ("lora_mma.cu", "(chunk ^ (row & 7))", "chunk", "conflicts"),
}

LAW = """
import sys
import torch
from cuda_on_cpu import build
from cuda_on_cpu.test_emulator import SCHEDULES
from cuda_on_cpu.test_kernels import DTYPES, WAYS
from peftops import cuda
from peftops.bench.law import check
from peftops.cuda import _device, lora
import peftops.functional

torch.use_deterministic_algorithms(True, warn_only=True)
emulator, kind = build.opened({library!r}), {kind!r}
class Emulated:
    def lora_gemv(self, *args):
        emulator.lora_gemv(*args)
        emulator.finish()
lora._C, cuda.runs = Emulated(), lambda device: True
_device.processors, _device.stream = lambda device: 4, lambda device: 0
for schedule in SCHEDULES if kind == "plain" else SCHEDULES[:1]:
    emulator.schedule(*schedule)
    for shape in WAYS:
        for dtype in DTYPES if kind != "thread" else DTYPES[1:]:
            for label, error, bound in check("lora_gemv", "cuda", shape, dtype):
                if not error <= bound:
                    sys.exit(f"unlawful: {{schedule}}, {{shape}}, {{dtype}}, {{label}}")
if emulator.counts()["conflicts"]:
    sys.exit("conflicts")
"""
NOTICED = {"plain": "", "conflicts": "conflicts", "address": "AddressSanitizer", "thread": "ThreadSanitizer: data race"}


def run(folder, kind):
    sanitizer = kind if kind in ("address", "thread") else ""
    library = build.link(sanitizer=sanitizer, include=folder)
    return sanitized(sanitizer, LAW.format(library=str(library), kind=kind))


@pytest.mark.parametrize("kind", NOTICED)
def test_the_kernels_as_they_are(kind):
    done = run(build.KERNELS, kind)
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug, tmp_path):
    file, right, wrong, kind = BUGS[bug]
    folder = shutil.copytree(build.KERNELS.parent, tmp_path / "csrc") / "cuda"
    text = (folder / file).read_text()
    assert text.count(right) == 1
    (folder / file).write_text(text.replace(right, wrong))
    done = run(folder, kind)
    said = done.stderr.strip().splitlines() or [""]
    print(f"{bug}: {next((line for line in said if 'Sanitizer' in line), said[-1])[:160]}")
    assert done.returncode and NOTICED[kind] in done.stderr, done.stderr[-3000:]
