"""Launches of Triton's kernels without Triton's bookkeeping, on a stand-in for what Triton compiles."""

from types import SimpleNamespace

import pytest
import torch
import triton
from triton.runtime import _allocation

from peftops.triton._launch import Launched, cdiv, power_of_2


class Kernel:
    """What triton.jit makes, as far as a launch asks it: it notes what it has to find out, and what runs at once."""

    arg_names = "OUT", "X", "W", "M", "BM", "EVEN"

    def __init__(self):
        self.found_out, self.at_once, self.workspace, self.given = [], [], 0, []

    def run(self, *args):
        if self.workspace:
            self.given.append(_allocation._allocator.get()(self.workspace, 128, None))
        self.at_once.append(args)

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.found_out.append((grid, args, options))
            made = SimpleNamespace(global_scratch_size=self.workspace)
            return SimpleNamespace(
                run=self.run, function="function", packed_metadata="metadata", metadata=made
            )

        return launch


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(
        torch._C,
        "_cuda_getCurrentRawStream",
        lambda device: f"stream of {device}",
        raising=False,
    )
    return Kernel()


def call(kernel, *args, grid=(4,), **options):
    """Whether Triton had to find out."""
    before = len(kernel.kernel.found_out)
    kernel[grid](*args, **{"EVEN": True, "BM": 16, "num_warps": 4} | options)
    return len(kernel.kernel.found_out) > before


def test_alike_arguments_run_at_once(kernel):
    launched, (out, x), w = (
        Launched(kernel),
        torch.zeros(2, 64),
        (torch.zeros(8), torch.zeros(8, dtype=torch.uint8)),
    )
    assert call(launched, out, x, w, 8) and not kernel.at_once
    other = torch.ones(64), None
    assert not call(launched, other[0], x, w, 8, grid=(5, 2))
    ((*grid, stream, function, metadata, enter, leave, hook), rest) = (
        kernel.at_once[0][:9],
        kernel.at_once[0][9:],
    )
    assert grid == [5, 2, 1] and (stream, function, metadata) == (
        "stream of -1",
        "function",
        "metadata",
    )
    assert enter is leave is hook is None
    assert (
        rest[0] is other[0] and rest[1] is x and rest[2] is w and rest[3:] == (8, 16, True)
    )  # as the kernel has them


def test_what_is_not_alike_is_found_out(kernel):
    launched, (out, x), w = (
        Launched(kernel),
        torch.zeros(2, 64),
        (torch.zeros(8), torch.zeros(8)),
    )
    call(launched, out, x, w, 8)
    for args in (
        (out, x, w, 9),
        (out, x.half(), w, 8),
        (None, x, w, 8),
        (out, x, (w[0].half(), w[1]), 8),
        (out, x, (w[0],), 8),
    ):
        assert call(launched, *args) and not call(launched, *args)
    for options in ({"BM": 32}, {"num_warps": 8}, {"EVEN": False}):
        assert call(launched, out, x, w, 8, **options) and not call(
            launched, out, x, w, 8, **options
        )
    odd = torch.zeros(65)[1:]
    assert call(launched, out, odd, w, 8) and call(
        launched, out, odd, w, 8
    )  # Triton compiles another for it


def test_a_kernel_that_asks_for_a_workspace_gets_one_and_nobody_else_notices(kernel):
    mine = lambda size, alignment, stream: None  # noqa: E731
    triton.set_allocator(mine)
    try:
        kernel.workspace = 512
        launched, x = Launched(kernel), torch.zeros(4)
        for _ in range(3):
            call(launched, x, x, (x,), 8)
        assert [(t.numel(), t.dtype, t.device) for t in kernel.given] == [
            (512, torch.uint8, x.device)
        ] * 2
        assert _allocation._allocator.get() is mine
    finally:
        triton.set_allocator(_allocation._NULL_ALLOCATOR)


def test_a_profiler_sees_every_launch(kernel, monkeypatch):
    launched, args = Launched(kernel), (torch.zeros(4), torch.zeros(4), (torch.zeros(4),), 8)
    call(launched, *args)
    for hook in (lambda metadata: None, SimpleNamespace(calls=[print])):
        monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", hook)
        assert call(launched, *args)
    for hook in (None, SimpleNamespace(calls=[])):
        monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", hook)
        assert not call(launched, *args)


def test_what_is_kept_does_not_grow_for_ever(kernel, monkeypatch):
    monkeypatch.setattr("peftops.triton._launch.MOST", 3)
    launched, x = Launched(kernel), torch.zeros(4)
    for m in range(20):
        assert call(launched, x, x, x, m) and len(launched.kept) <= 3


def test_the_arithmetic_of_grids():
    for a in range(40):
        assert all(cdiv(a, b) == triton.cdiv(a, b) for b in range(1, 9))
    assert all(power_of_2(n) == triton.next_power_of_2(n) for n in range(1, 70))
