"""The CPU's kernels of lora: each instruction set, and what torch is not asked for."""

from itertools import islice

import pytest
import torch
from peftops.bench.cases import lora
from peftops.bench.law import check
from torch.overrides import TorchFunctionMode

import peftops.functional as F
from peftops import backends
from peftops._op import CONTRACTS

ISAS = ["portable", "avx2", "avx512", "avx512_bf16"]


def run(t, p, form):
    """Forward and backward of a case's tensors"""
    base = t["base"][0]
    weight = {"dense": base, "transposed": base.T, "given": F.Base("given", [base])}[form]
    for name in ("x", "a", "b"):
        t[name].requires_grad_()
    y = F.lora_linear(t["x"], weight, t["a"], t["b"], gain=t["gain"], dropout_p=p)
    torch.autograd.backward(y, t["dy"])  # autograd.grad would leave the mode


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa, on_isa):
    on_isa(isa)
    for op in filter(lambda op: backends.cell("cpu", op), CONTRACTS):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for shape in ((5, 133, 33, 20), (70, 64, 48, 16)):
                for label, err, most in check(op, "cpu", shape, dtype):
                    assert err <= most, f"{op}, {dtype}, {label}"


@pytest.mark.parametrize("isa", ISAS)
def test_more_rows_than_are_walked_at_once(isa, on_isa):
    on_isa(isa)
    for op in ("lora_fwd", "lora_bwd"):
        for dtype in (torch.float32, torch.bfloat16):
            for label, err, most in islice(check(op, "cpu", (1541, 24, 70, 3), dtype), 2):
                assert err <= most, f"{op}, {dtype}, {label}"


class Products(TorchFunctionMode):
    """The dtypes of what torch multiplies."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if "mm" in function.__name__ or "linear" in function.__name__ or "matmul" in function.__name__:
            self.dtypes.append(args[0].dtype)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("m", [1, 5, 40, 70])
def test_torch_multiplies_nothing_of_16_bits_on_a_cpu(m, isa, on_isa):
    on_isa(isa)
    for dtype in (torch.bfloat16, torch.float16):
        for form, p in (("dense", 0.0), ("transposed", 0.3), ("given", 0.0)):
            with Products() as products:
                run(lora(m, 40, 24, 4, dtype, form=form, gain=True), p, form)
            assert not {torch.bfloat16, torch.float16} & set(products.dtypes), (dtype, form)
    with Products() as products:
        torch.mm(torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16))
    assert products.dtypes == [torch.bfloat16]
