"""Launches of Triton's kernels that skip Triton's bookkeeping, on a stand-in for a kernel."""

from types import SimpleNamespace

import pytest
import torch
import triton
from triton.runtime import _allocation

from peftops.triton._launch import Launched, cdiv, power_of_2


class Kernel:
    """Stands for what triton.jit makes: notes launches by Triton, and direct runs that skip it."""

    arg_names = "OUT", "X", "W", "M", "BM", "EVEN"

    def __init__(self):
        self.launches = []
        self.runs = []
        self.workspace = 0  # bytes
        self.workspaces = []

    def run(self, *args):
        if self.workspace:
            self.workspaces.append(
                _allocation._allocator.get()(self.workspace, 128, None)
            )
        self.runs.append(args)

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launches.append((grid, args, options))
            return SimpleNamespace(
                run=self.run,
                function="function",
                packed_metadata="metadata",
                metadata=SimpleNamespace(global_scratch_size=self.workspace),
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
    """Calls the kernel, and returns whether Triton launched it."""
    before = len(kernel.kernel.launches)
    kernel[grid](*args, **{"EVEN": True, "BM": 16, "num_warps": 4} | options)
    return len(kernel.kernel.launches) > before


def test_like_arguments_skip_triton(kernel):
    launched = Launched(kernel)
    out, x = torch.zeros(2, 64)
    w = torch.zeros(8), torch.zeros(8, dtype=torch.uint8)
    assert call(launched, out, x, w, 8) and not kernel.runs
    other = torch.ones(64)
    assert not call(launched, other, x, w, 8, grid=(5, 2))
    grid = kernel.runs[0][:3]
    stream, function, metadata, enter, leave, hook = kernel.runs[0][3:9]
    args = kernel.runs[0][9:]  # in the order of the kernel's parameters
    assert grid == (5, 2, 1)
    assert (stream, function, metadata) == ("stream of -1", "function", "metadata")
    assert enter is leave is hook is None
    assert args[0] is other and args[1] is x and args[2] is w
    assert args[3:] == (8, 16, True)


def test_triton_launches_unlike_arguments(kernel):
    launched = Launched(kernel)
    out, x = torch.zeros(2, 64)
    w = torch.zeros(8), torch.zeros(8)
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
        assert call(launched, out, x, w, 8, **options)
        assert not call(launched, out, x, w, 8, **options)
    unaligned = torch.zeros(65)[1:]  # Triton compiles another kernel for it
    assert call(launched, out, unaligned, w, 8)
    assert call(launched, out, unaligned, w, 8)


def test_a_kernel_gets_its_workspace_and_the_allocator_stays(kernel):
    def allocator(size, alignment, stream):
        return None

    triton.set_allocator(allocator)
    try:
        kernel.workspace = 512
        launched = Launched(kernel)
        x = torch.zeros(4)
        for _ in range(3):
            call(launched, x, x, (x,), 8)
        workspaces = [
            (workspace.numel(), workspace.dtype, workspace.device)
            for workspace in kernel.workspaces
        ]
        assert workspaces == [(512, torch.uint8, x.device)] * 2
        assert _allocation._allocator.get() is allocator
    finally:
        triton.set_allocator(_allocation._NULL_ALLOCATOR)


def test_a_profiler_sees_every_launch(kernel, monkeypatch):
    launched = Launched(kernel)
    args = torch.zeros(4), torch.zeros(4), (torch.zeros(4),), 8
    call(launched, *args)
    for hook in (lambda metadata: None, SimpleNamespace(calls=[print])):
        monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", hook)
        assert call(launched, *args)
    for hook in (None, SimpleNamespace(calls=[])):
        monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", hook)
        assert not call(launched, *args)


def test_the_cache_of_launches_is_bounded(kernel, monkeypatch):
    monkeypatch.setattr("peftops.triton._launch.MOST", 3)
    launched = Launched(kernel)
    x = torch.zeros(4)
    for m in range(20):
        assert call(launched, x, x, x, m) and len(launched.kept) <= 3


def test_the_arithmetic_of_grids():
    for a in range(40):
        assert all(cdiv(a, b) == triton.cdiv(a, b) for b in range(1, 9))
    assert all(power_of_2(n) == triton.next_power_of_2(n) for n in range(1, 70))
