"""The CPU's kernels of lora: each instruction set, and what torch is not asked for."""

from itertools import islice

import isa
import pytest
import torch
from peftops.bench.cases import lora
from peftops.bench.law import check

import peftops.functional as F
from peftops import backends
from peftops._op import CONTRACTS


def run(t, p, form):
    """Forward and backward of a case's tensors"""
    base = t["base"][0]
    weight = {"dense": base, "transposed": base.T, "given": F.Base("given", [base])}[form]
    for name in ("x", "a", "b"):
        t[name].requires_grad_()
    y = F.lora_linear(t["x"], weight, t["a"], t["b"], gain=t["gain"], dropout_p=p)
    y.backward(t["dy"])


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
            for label, err, most in islice(check(op, "cpu", (1541, 24, 70, 3), dtype), 2):
                assert err <= most, f"{op}, {dtype}, {label}"


@pytest.fixture
def multiplied(monkeypatch):
    """The names of what torch is asked to multiply by."""
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
