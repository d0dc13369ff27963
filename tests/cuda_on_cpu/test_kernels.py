"""The project's CUDA kernels under every schedule, and under the sanitizers; test_ops.py holds them to the law too."""

import pytest
import torch
from peftops.bench.cases import CASES
from peftops.bench.law import call, check

import peftops.functional  # noqa: F401  registers the ops
from peftops.cuda import lora

from . import build
from .test_emulator import SCHEDULES, sanitized

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
DTYPES = [torch.float32, torch.bfloat16]  # what runs in float16 is the same code; test_ops.py holds it to the law
WAYS = {  # what each shape takes on a GPU of four multiprocessors; the rows of one of them are several tiles
    (1, 72, 200, 5): "one launch",
    (3, 1072, 40, 12): "two launches",
    (5, 264, 100, 2): "one launch",
    (9, 400, 520, 16): "one launch",
    (33, 136, 72, 24): "two launches",
    (80, 264, 200, 16): "two launches",
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_law_under_every_schedule(cuda_on_cpu, schedule):
    cuda_on_cpu.schedule(*schedule)
    for shape in WAYS:
        for dtype in DTYPES:
            for label, error, bound in check("lora_gemv", "cuda", shape, dtype):
                assert error <= bound, (shape, dtype, label)


def test_ways(cuda_on_cpu):
    def way(dtype, *sizes, form="dense"):
        return lora.path("lora_gemv", torch.empty(0, dtype=dtype), *sizes, form)

    for (m, k, n, r), wanted in WAYS.items():
        assert way(torch.bfloat16, m, n, k, r) == wanted
    assert way(torch.float32, 5, 100, 264, 2) == "cuBLAS + epilogue"
    assert way(torch.float16, 1, 100, 261, 2) == "cuBLAS + epilogue"
    assert way(torch.float16, 1, 100, 264, 2, form="transposed") == "cuBLAS + epilogue"
    assert way(torch.float16, 1, 100, 264, 2, form="given") == "epilogue"


def test_many_of_the_few_rows_run_on_tensor_cores(cuda_on_cpu):
    for m, dtype, wanted in ((4, torch.bfloat16, False), (5, torch.bfloat16, True), (5, torch.float32, False)):
        _, args = next(CASES["lora_gemv"]((m, 264, 100, 2), dtype))
        cuda_on_cpu.counts()
        call("lora_gemv", "cuda", args)
        counts = cuda_on_cpu.counts()
        assert (counts["mma"] > 0) == wanted and counts["conflicts"] == 0


def test_law_in_little_shared_memory(cuda_on_cpu):
    shapes = ((33, 136, 72, 24), (33, 264, 300, 16))
    blocks = []
    for limit in (227 << 10, 99 << 10):  # of Hopper and of Ada, in whose 99 KiB no tile of 64 rows fits
        before = cuda_on_cpu.limit_shared(limit)
        cuda_on_cpu.counts()
        try:
            for shape in shapes:
                for label, error, bound in check("lora_gemv", "cuda", shape, torch.bfloat16):
                    assert error <= bound, (shape, label)
        finally:
            cuda_on_cpu.limit_shared(before)
        blocks.append(cuda_on_cpu.counts()["blocks"])
    assert blocks[1] > blocks[0]


def test_launches(cuda_on_cpu):
    for shape, wanted in (((1, 72, 200, 5), 1), ((3, 1072, 40, 12), 2), ((5, 264, 100, 2), 1), ((33, 136, 72, 24), 2)):
        _, args = next(CASES["lora_gemv"](shape, torch.bfloat16))
        cuda_on_cpu.counts()
        call("lora_gemv", "cuda", args)
        assert cuda_on_cpu.counts()["launches"] == wanted


def test_is_deterministic_whatever_the_order(cuda_on_cpu):
    for shape in WAYS:
        for label, args in CASES["lora_gemv"](shape, torch.bfloat16):
            results = []
            for schedule in (SCHEDULES[0], SCHEDULES[-1]):
                cuda_on_cpu.schedule(*schedule)
                results.append(call("lora_gemv", "cuda", args)[0])
            assert torch.equal(*results), (shape, label)


def test_errors_are_raised_with_the_name_of_the_op(cuda_on_cpu, monkeypatch):
    monkeypatch.setattr(lora, "path", lambda *args: "one launch")  # h in 99999 ranks fits no shared memory
    _, args = next(CASES["lora_gemv"]((1, 8, 8, 99999), torch.float32))
    with pytest.raises(RuntimeError, match="lora_gemv: CUDA error 1, more shared memory than allowed"):
        call("lora_gemv", "cuda", args)


LAW = """
import torch
from cuda_on_cpu import build
from cuda_on_cpu.test_kernels import WAYS
from peftops import backends, cuda
from peftops.bench.law import check
from peftops.cuda import _device, lora
import peftops.functional

emulator = build.opened({library!r})
class Emulated:
    def lora_gemv(self, *args):
        emulator.lora_gemv(*args)
        emulator.finish()
lora._C, cuda.runs = Emulated(), lambda device: True
_device.processors, _device.stream = lambda device: 4, lambda device: 0
for shape in WAYS:
    for dtype in {dtypes}:
        for label, error, bound in check("lora_gemv", "cuda", shape, dtype):
            assert error <= bound, (shape, dtype, label)
print("lawful")
"""


@pytest.mark.parametrize("sanitizer, dtypes", [("address", DTYPES), ("thread", DTYPES[1:])])  # races know no dtype
def test_sanitizers_find_nothing(sanitizer, dtypes):
    done = sanitized(sanitizer, LAW.format(library=str(build.link(sanitizer=sanitizer)), dtypes=dtypes))
    assert done.returncode == 0 and done.stdout == "lawful\n" and "Sanitizer" not in done.stderr, done.stderr[-3000:]
