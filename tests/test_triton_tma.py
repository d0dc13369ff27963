"""The product for Hopper with tiles loaded by TMA, in Triton's interpreter: law and choice."""

import pytest
import torch

import peftops.functional  # noqa: F401  registers the ops
from peftops.testing.cases import BWD, FWD, lora
from peftops.testing.law import check_case
from peftops.triton import _gemm, lora_product, lora_tma
from peftops.triton.lora import describe

NAMES = {"lora_fwd": FWD, "lora_bwd": BWD}
SHAPES = [(37, 72, 48, 16), (1, 8, 104, 24), (33, 64, 40, 0), (290, 40, 40, 8)]
OPTIONS = [
    {"form": form} | options
    for form in ("dense", "transposed", "nf4")
    for options in (
        {},
        {"fp32": True, "p": 0.3, "bias": True},
        {"fp32": True, "gain": True, "bias": True},
        {"p": 0.3, "gain": True},
    )
]


@pytest.fixture
def taken(monkeypatch):
    """Takes TMA's kernel wherever it can read the operands, and notes its outputs' shapes."""
    shapes = []
    product = lora_tma.product

    def note(out, *args, **named):
        shapes.append(tuple(out.shape))
        product(out, *args, **named)

    monkeypatch.setattr(_gemm, "choose_product", lambda *args, **kwargs: "tma")
    monkeypatch.setattr(lora_tma, "product", note)
    return shapes


def assert_law(op, inputs):
    error, bound = check_case(op, "triton", [inputs[name] for name in NAMES[op]])
    assert error <= bound


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("op", NAMES)
def test_law(op, options, taken):
    for i, (m, k, n, r) in enumerate(SHAPES):
        dtype = torch.float16 if i == 1 else torch.bfloat16
        assert_law(op, lora(m, k, n, r, dtype, **options))
        assert taken.pop() == (m, n if op == "lora_fwd" else k) and not taken


@pytest.mark.parametrize("op", NAMES)
def test_another_kernel_takes_what_tma_cannot_read(op, taken):
    for k, n, r in ((40, 48, 4), (40, 44, 8), (44, 48, 8)):
        assert_law(op, lora(5, k, n, r, torch.bfloat16))
    assert not taken


def test_gates_are_left_to_another_kernel(taken):
    assert_law("lora_fwd", lora(5, 40, 48, 8, torch.bfloat16, experts=2))
    assert not taken


@pytest.mark.parametrize("op", NAMES)
def test_parts_of_a_weight_in_4_bits(op, taken, monkeypatch):
    """Each launch writes its own columns, and reads those of gain, bias, mask and adapter."""
    first_columns = []
    kernel = lora_tma.tma_kernel

    class Noted:
        def __getitem__(self, grid):
            def launch(*args, **named):
                first_columns.append(args[15])
                return kernel[grid](*args, **named)

            return launch

    monkeypatch.setattr(lora_tma, "tma_kernel", Noted())
    monkeypatch.setattr(lora_product, "SCRATCH", 2 * 264 * 20)
    options = {"form": "nf4", "p": 0.3, "gain": op == "lora_fwd", "bias": True}
    assert_law(op, lora(37, 264, 136, 16, torch.bfloat16, **options))
    columns = range(0, 136, 32) if op == "lora_fwd" else range(0, 264, 64)
    assert first_columns == list(columns)


def test_everything_dropped(taken):
    for op in NAMES:
        assert_law(op, lora(37, 72, 48, 16, torch.bfloat16, p=1.0))
    assert len(taken) == 2


def test_it_is_taken_where_it_was_measured_to_pay(monkeypatch):
    half = torch.empty(0, dtype=torch.bfloat16)
    single = torch.empty(0)
    monkeypatch.setattr(_gemm, "machine", lambda device: ("sm_90", 132))

    def described(x, n=4096, k=4096, form="dense"):
        return describe("lora_fwd", x, 8192, n, k, 16, form)

    assert described(half) == "cuBLAS + epilogue"
    monkeypatch.setitem(_gemm.TMA, "sm_90", 0.05)  # an epilogue costs 367 / 4096, 9 %
    assert described(half) == described(half, form="transposed") == "TMA"
    assert described(half, k=8192) == "cuBLAS + epilogue"
    assert described(half, n=4100) == "cuBLAS + epilogue"
    assert described(single) == "cuBLAS + epilogue"
    assert described(half, form="nf4") == "dequantize + TMA"
    assert described(half, k=8192, form="nf4") == "dequantize + cuBLAS"


def test_tiles(monkeypatch):
    monkeypatch.setattr(_gemm, "machine", lambda device: ("sm_90", 132))
    out = torch.empty(0)
    for m, n, width, programs in (
        (8192, 4096, 256, 132),
        (2048, 2048, 128, 132),
        (256, 1024, 128, 16),
    ):
        tile, count = lora_tma.pick(m, n, out, True)
        assert (tile["BN"], count) == (width, programs)
