"""LoRA's kernels for the CPU: every instruction set, no product by torch, and too little memory."""

import os
import subprocess
import sys
from itertools import islice

import isa
import pytest
import ranks
import torch

import peftops.functional as F
from peftops import backends
from peftops._op import CONTRACTS
from peftops.testing.cases import lora
from peftops.testing.law import check


def run(inputs, p, form):
    """Forward and backward of a case's tensors."""
    base = inputs["base"][0]
    weight = {"dense": base, "transposed": base.T, "given": F.Base("given", [base])}[
        form
    ]
    for name in ("x", "a", "b"):
        inputs[name].requires_grad_()
    y = F.lora_linear(
        inputs["x"], weight, inputs["a"], inputs["b"], gain=inputs["gain"], dropout_p=p
    )
    y.backward(inputs["dy"])


@pytest.mark.parametrize("isa", isa.NAMES)
def test_every_instruction_set(isa, on_isa):
    on_isa(isa)
    for op in filter(lambda op: backends.cell("cpu", op), CONTRACTS):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for shape in ((5, 133, 33, 20), (70, 64, 48, 16)):
                for label, err, most in check(op, "cpu", shape, dtype):
                    assert err <= most, f"{op}, {dtype}, {label}"


@pytest.mark.parametrize("isa", isa.NAMES)
def test_more_rows_than_are_walked_at_once(isa, on_isa):
    on_isa(isa)
    for op in ("lora_fwd", "lora_bwd"):
        for dtype in (torch.float32, torch.bfloat16):
            for label, err, most in islice(
                check(op, "cpu", (1541, 24, 70, 3), dtype), 2
            ):
                assert err <= most, f"{op}, {dtype}, {label}"


@pytest.mark.parametrize("isa", isa.NAMES)
def test_every_number_of_few_rows(isa, on_isa):
    """Each size of the blocks that few rows are multiplied in, and what is left over."""
    on_isa(isa)
    for m in (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 24, 25, 31, 33, 48, 49, 64):
        for op in ("lora_gemv", "multi_fwd"):
            for dtype in (torch.float32, torch.bfloat16):
                for label, err, most in check(op, "cpu", (m, 75, 141, 10), dtype):
                    assert err <= most, f"{op}, {m} rows, {dtype}, {label}"


@pytest.fixture
def multiplied(monkeypatch):
    """The names of torch's products, in the order of their calls."""
    names = []

    def watched(name):
        function = getattr(torch, name)
        return lambda *args, **kwargs: names.append(name) or function(*args, **kwargs)

    for name in ("mm", "addmm", "bmm", "matmul"):
        monkeypatch.setattr(torch, name, watched(name))
    return names


@pytest.mark.parametrize("isa", isa.NAMES)
@pytest.mark.parametrize("m", [1, 5, 40, 70])
def test_torch_multiplies_nothing_on_a_cpu(m, isa, on_isa, multiplied):
    on_isa(isa)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for form, p in (("dense", 0.0), ("transposed", 0.3), ("given", 0.0)):
            run(lora(m, 40, 24, 4, dtype, form=form, gain=True), p, form)
    assert multiplied == []
    torch.mm(torch.eye(2), torch.eye(2))
    assert multiplied == ["mm"]


HUNGRY = """
import resource

import torch

import peftops.functional as F

torch.set_num_threads(2)
k = 2**20
shapes = (70, k), (1, k), (1, k), (1, 1)
x, w, a, b = (torch.ones(shape, dtype=torch.bfloat16) for shape in shapes)
wide = w.repeat(70, 1)
ranks = a.repeat(16, 1)
many = b.repeat(70, 16)
F.lora_linear(x[:, :64], w[:, :64], a[:, :64], b)  # starts the threads
calls = {  # bytes left -> a call that needs more; the first fails while a team of threads works
    96 << 20: lambda: F.lora_linear(x, w, a, b),
    8 << 20: lambda: F.dora_weight_norm(wide, ranks, many),
}
for left, call in calls.items():
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + left, -1))
    try:
        call()
        refused = False
    except MemoryError:
        refused = True
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    assert refused and call().isfinite().all()
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="limits a process's memory as Linux does",
)
def test_too_little_memory_is_an_error_and_no_crash():
    script = isa.again() + HUNGRY
    environment = os.environ | {"PYTHONPATH": ranks.python_path()}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
