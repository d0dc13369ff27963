"""4-bit weights: every backend gives bitsandbytes' bytes and values, and products keep the law."""

import json
from pathlib import Path

import isa
import numpy as np
import pytest
import torch
from data import nf4 as golden
from hypothesis import given, settings
from hypothesis import strategies as st
from law import bound, error
from torch._subclasses import FakeTensorMode

import peftops
import peftops.functional as F
from peftops import NF4Weight, backends
from peftops.ops.nf4_tables import FOUR_BITS, bounds, eight_bits, four_bits
from peftops.testing.cases import CASES, SHAPES
from peftops.testing.law import call, check, check_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = ["nf4_quantize", "nf4_dequantize"]
CELLS = [name for name in backends.NAMES if backends.cell(name, "nf4_dequantize")]
ISAS = isa.NAMES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_backends_agree_bit_for_bit(name, dtype, request):
    if name == "cuda":
        request.getfixturevalue("cuda_on_cpu")
    for op in OPS:
        for shape in SHAPES:
            for label, args in CASES[op](shape, dtype):
                outs = call(op, name, args)
                expected = call(op, "reference", args)
                assert len(outs) == len(expected), op
                assert all(map(torch.equal, outs, expected)), (op, shape, label)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_products_are_made_of_the_values_of_dequantize(name, dtype, request):
    """Each row of the identity gives a column of the weight, which no kernel may round again."""
    if name == "cuda":
        request.getfixturevalue("cuda_on_cpu")
    k, n = 96, 40
    for block, double in ((64, False), (32, True)):
        q = NF4Weight.quantize(torch.randn(n, k), block, double)
        no_a = torch.zeros(0, k, dtype=dtype)
        no_b = torch.zeros(n, 0, dtype=dtype)
        for m in (1, 2, 3, 7, 12, 30, 64, 96):
            rows = torch.eye(k, dtype=dtype)[-m:]
            args = [
                rows,
                q.base,
                no_a,
                no_b,
                torch.ones(1),
                None,
                None,
                None,
                "nf4",
                block,
            ]
            y = call("lora_gemv", name, args)[0]
            assert torch.equal(y, q.dequantize(dtype).T[-m:]), (m, block)


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets_agree_bit_for_bit(isa, on_isa):
    on_isa(isa)
    for op in OPS:
        for dtype in DTYPES:
            for shape in (*SHAPES, (1, 513, 131, 1)):
                for label, args in CASES[op](shape, dtype):
                    outs = call(op, "cpu", args)
                    expected = call(op, "reference", args)
                    assert len(outs) == len(expected), op
                    assert all(map(torch.equal, outs, expected)), (
                        op,
                        dtype,
                        shape,
                        label,
                    )


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8, 12, 31, 70, 200])
def test_law_for_every_number_of_rows(m):
    """Rows of whole blocks and others, for each kernel of few rows and for many rows."""
    ops = ["lora_fwd", "lora_bwd"]
    dtypes = [torch.bfloat16]
    if m < 40:
        ops = ["lora_gemv"]
        dtypes = [torch.float32, torch.bfloat16]
    for shape in ((m, 192, 161, 5), (m, 256, 130, 16), (m, 130, 170, 3)):
        for dtype in dtypes:
            for op in ops:
                for label, args in CASES[op](shape, dtype):
                    if label.startswith("nf4"):
                        wrong, most = check_case(op, "cpu", args)
                        assert wrong <= most, (op, shape, dtype, label)


def test_a_weight_that_is_decoded_in_many_slices(monkeypatch):
    pytest.importorskip("peftops._C")
    monkeypatch.setattr("peftops.cpu.nf4.PART", 1000)
    for op in ("lora_fwd", "lora_bwd"):
        for label, wrong, most in check(op, "cpu", (70, 64, 48, 16), torch.float32):
            assert wrong <= most, (op, label)


def test_bitsandbytes_bytes_and_values():
    bnb = pytest.importorskip("bitsandbytes.functional")
    for dtype in DTYPES:
        for shape in ((64, 64), (33, 77), (1, 1), (7, 1031), (3, 5, 64)):
            for block in (32, 64, 256, 4096):
                for quant_type in ("nf4", "fp4"):
                    for double in (False, True):
                        w = torch.randn(shape).to(dtype)
                        same_as_bitsandbytes(bnb, w, block, quant_type, double)


def same_as_bitsandbytes(bnb, w, block, quant_type, double):
    codes, state = bnb.quantize_4bit(
        w, blocksize=block, quant_type=quant_type, compress_statistics=double
    )
    q = NF4Weight.quantize(w, block, double, quant_type)
    case = (w.dtype, w.shape, block, quant_type, double)
    # bitsandbytes computes x / absmax in a last partial block on a CPU, not x · (1 / absmax)
    whole = max(1, w.numel() // block) * block // 2
    assert torch.equal(q.codes[:whole], codes.flatten()[:whole]), case
    if not double:
        assert torch.equal(q.scales[0], state.absmax), case
    elif (
        len(state.absmax) > 1
    ):  # a single scale equals the offset, and its code means nothing
        assert torch.equal(q.scales[0], state.absmax), case
        assert torch.equal(q.scales[1], state.state2.absmax), case
        assert torch.equal(q.scales[3], state.offset), case
    # in other shapes bitsandbytes 0.50.2 reads the scales of other blocks on a CPU
    if whole >= len(q.codes) and (w.shape[-1] % block == 0 or w.numel() <= block):
        assert torch.equal(q.dequantize(), bnb.dequantize_4bit(codes, state)), case


@pytest.mark.parametrize("i", range(len(golden.CASES)), ids=str)
def test_golden_vectors(i):
    shape, block, quant_type, double, dtype = golden.CASES[i]
    vectors = json.loads(Path(golden.__file__).with_suffix(".json").read_text())
    codes, scales, values = vectors[i]
    q = NF4Weight.quantize(golden.weight(shape, dtype), block, double, quant_type)
    ours = [q.scales[i] for i in (0, 1, 3)] if double else q.scales
    assert golden.text(q.codes) == codes
    assert [golden.text(tensor.flatten()) for tensor in ours] == scales
    assert golden.digest(q.dequantize()) == values


def by_hand(w, block, table):
    """The format's rule in numpy: the code of the nearest value, and in a tie of the lower one."""
    flat = w.astype(np.float32).ravel()
    codes = []
    absmax = []
    order = np.argsort(table, kind="stable")
    middles = (table[order][:-1] + table[order][1:]) / np.float32(2)
    for start in range(0, flat.size, block):
        elements = flat[start : start + block]
        absmax.append(np.abs(elements).max())
        inverse = np.float32(1) / max(absmax[-1], np.float32(1e-38))
        codes += [int(order[(middles < x * inverse).sum()]) for x in elements]
    if len(codes) % 2:
        codes.append(int(order[(middles < 0).sum()]))
    pairs = [16 * a + b for a, b in zip(codes[::2], codes[1::2], strict=True)]
    return np.array(pairs, np.uint8), np.array(absmax)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 80),
    block=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_the_rule_of_the_format(rows, columns, block, dtype, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(rows, columns, generator=generator) * scale).to(dtype)
    codes, absmax = by_hand(
        w.float().numpy(), block, np.array(FOUR_BITS["nf4"], np.float32)
    )
    q = NF4Weight.quantize(w, block, double_quant=False)
    assert (q.codes.numpy() == codes).all() and (q.scales[0].numpy() == absmax).all()
    each = np.stack([codes >> 4, codes & 15], 1).ravel()[: w.numel()]
    values = (
        np.array(FOUR_BITS["nf4"], np.float32)[each] * absmax.repeat(block)[: w.numel()]
    )
    assert torch.equal(
        q.dequantize(), torch.from_numpy(values).to(dtype).view(rows, columns)
    )
    double = NF4Weight.quantize(w, block).dequantize(torch.float32).double()
    assert (double - w.double()).abs().max() <= 0.2 * w.double().abs().max()


def test_tables():
    assert bounds(four_bits("nf4", torch.device("cpu")))[1].tolist() == list(range(16))
    table = eight_bits(torch.device("cpu"))
    assert table.sort().values.equal(table) and table[127] == 0 and table[255] == 1


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("m, p", [(2, 0.0), (70, 0.0), (70, 0.3)])
def test_gradients_are_those_of_the_dequantized_weight(m, p, double):
    """Compares with fp64, in which only the weight is rounded."""
    n, k, r = 40, 96, 4
    q = F.quantize_nf4(torch.randn(n, k, dtype=torch.bfloat16), double_quant=double)
    tensors = [
        torch.randn(*shape).bfloat16() for shape in ((m, k), (r, k), (n, r), (n,))
    ]

    def grads(weight, dtype):
        torch.manual_seed(3)
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        x, a, b, bias = leaves
        y = F.lora_linear(x, weight, a, b, bias, scaling=0.5, dropout_p=p)
        return [y.detach(), *torch.autograd.grad(y.sum() + (y * y).sum() / 9, leaves)]

    dense = q.dequantize()
    with peftops.backend("reference"):
        exact = grads(dense.double(), torch.float64)
        same = grads(dense, torch.bfloat16)
    assert error(grads(q, torch.bfloat16), exact) <= bound(same, exact)


def test_only_codes_are_saved_for_backward():
    q = F.quantize_nf4(torch.randn(512, 256))
    x = torch.randn(8, 256, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        F.lora_linear(x, q, torch.zeros(4, 256), torch.zeros(512, 4)).sum().backward()
    assert max(tensor.nbytes for tensor in saved) == 512 * 256 // 2


def test_a_product_does_not_call_the_op_that_dequantizes(ops):
    q = F.quantize_nf4(torch.randn(64, 128))
    x = torch.randn(2, 70, 128, dtype=torch.bfloat16)
    F.lora_linear(x[:1, :3], q, torch.zeros(4, 128), torch.zeros(64, 4))
    F.lora_linear(x, q, torch.zeros(4, 128), torch.zeros(64, 4))
    assert ops[-2:] == ["lora_gemv", "lora_fwd"] and "nf4_dequantize" not in ops


@pytest.mark.parametrize(
    "change, message",
    [
        ({"w": torch.zeros(2, 2, dtype=torch.int64)}, "nf4: w must be torch.float32"),
        ({"w": torch.zeros(0, 4)}, r"nf4: w must have elements, got \(0, 4\)"),
        ({"blocksize": 48}, r"nf4: block must be one of \(32, 64.*got 48"),
        ({"quant_type": "int4"}, "nf4: quant_type must be nf4 or fp4, got 'int4'"),
    ],
)
def test_errors(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        NF4Weight.quantize(**{"w": torch.zeros(4, 4), **change})


def test_a_weight_of_another_shape_is_refused():
    q = F.quantize_nf4(torch.zeros(16, 24))
    a = torch.zeros(2, 16)
    b = torch.zeros(24, 2)
    with pytest.raises(ValueError, match=r"lora: w must be \(24, 16\), got \(16, 24\)"):
        F.lora_linear(torch.zeros(3, 16), q, a, b)


@pytest.mark.slow
def test_more_elements_than_a_32_bit_number_counts():
    """2³¹ and a few more: 4 GiB in bf16, as much dequantized. Takes minutes and 12 GiB."""
    block, extra = 64, 4096
    w = torch.zeros(2**31 + extra, dtype=torch.bfloat16)
    w[-extra:] = torch.randn(extra)
    q = F.quantize_nf4(w, block, double_quant=False)
    small = F.quantize_nf4(w[-extra:].clone(), block, double_quant=False)
    assert torch.equal(q.codes[-extra // 2 :], small.codes)
    del w
    assert torch.equal(q.dequantize()[-extra:], small.dequantize())


def test_no_two_weights_share_a_table():
    first, second = (NF4Weight.quantize(torch.randn(64, 64)) for _ in range(2))
    expected = second.dequantize()
    for tensor in first.state_dict().values():
        tensor.zero_()
    assert torch.equal(second.dequantize(), expected)
    assert torch.equal(NF4Weight.quantize(expected).table, second.table)


MODES = {
    "inference_mode": torch.inference_mode,
    "meta": lambda: torch.device("meta"),
    "fake": FakeTensorMode,
}


@pytest.mark.parametrize("mode", MODES)
def test_tensors_made_inside_a_mode_stay_there(mode):
    """A call inside the mode must leave none of its tensors in the caches of scales and tables."""
    w = torch.randn(70, 64)
    a = torch.randn(4, 64)
    b = torch.randn(70, 4)
    scaling = torch.rand(()).item()
    with MODES[mode]():
        inside = [
            tensor if mode == "inference_mode" else torch.empty(tensor.shape)
            for tensor in (w, a, b)
        ]
        packed = F.quantize_nf4(inside[0])
        F.lora_linear(inside[0], packed, *inside[1:], scaling=scaling)
        F.nf4_linear(inside[0], packed)
    packed = F.quantize_nf4(w)
    x = w.clone().requires_grad_()
    b.requires_grad_()
    magnitude = torch.ones(70)
    with torch.device("meta"):
        F.dora_linear(x, packed, a, b, magnitude, detach_norm=False).sum().backward()
    (
        F.lora_linear(x, packed, a, b, scaling=scaling) + F.nf4_linear(x, packed)
    ).sum().backward()
    assert x.grad.isfinite().all() and x.grad.any() and b.grad.any()
