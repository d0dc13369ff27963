"""Multi-LoRA's CUDA kernels for few rows on the CPU; test_kernels.py has what all kernels share."""

import inspect

import pytest
import torch

import peftops.functional  # noqa: F401  registers the ops
from peftops._op import CONTRACTS
from peftops.testing.law import call, check_case

from . import build
from .test_emulator import SCHEDULES
from .test_kernels import DTYPES, MULTI_SHAPES, cases

pytestmark = pytest.mark.skipif(
    build.missing() is not None, reason=str(build.missing())
)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_law_of_mixed_rows_under_every_schedule(cuda_on_cpu, schedule):
    cuda_on_cpu.schedule(*schedule)
    for shape in MULTI_SHAPES:
        for dtype in DTYPES:
            for label, args in cases(shape, dtype, "multi"):
                error, bound = check_case("multi_gemv", "cuda", args)
                assert error <= bound, (shape, dtype, label)


def test_mixed_rows_take_two_launches_whatever_their_slots(cuda_on_cpu):
    """And blocks by the shapes alone, so that a CUDA graph serves every batch of a shape."""
    for shape, tiled in (((3, 1056, 40, 12), False), ((9, 416, 100, 16), True)):
        counted = set()
        for label in ("runs", "base"):
            args = dict(cases(shape, torch.bfloat16, "multi"))[label]
            cuda_on_cpu.counts()
            call("multi_gemv", "cuda", args)
            counts = cuda_on_cpu.counts()
            assert counts["launches"] == 2 and counts["conflicts"] == 0
            assert (counts["mma"] > 0) == tiled
            counted.add(counts["blocks"])
        assert len(counted) == 1


def test_slots_that_no_row_has_cost_nothing(cuda_on_cpu):
    """Beside 4 slots, 1,000 others whose pages would be read outside of the pool."""
    args = dict(cases((9, 416, 100, 16), torch.bfloat16, "multi"))["mixed"]
    names = [*inspect.signature(CONTRACTS["multi_gemv"]).parameters]
    (expected,) = call("multi_gemv", "cuda", args)
    cuda_on_cpu.counts()
    call("multi_gemv", "cuda", args)
    before = cuda_on_cpu.counts()
    for name in ("table", "rank", "scale"):
        at = names.index(name)
        more = args[at].new_full((1000, *args[at].shape[1:]), 1 << 20)
        args[at] = torch.cat([args[at], more])
    (y,) = call("multi_gemv", "cuda", args)
    assert torch.equal(y, expected)
    assert cuda_on_cpu.counts() == before
