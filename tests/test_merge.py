"""Merging: one rounding, the same bits everywhere, and the way back; test_ops.py has the law."""

from fractions import Fraction

import isa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from law import bound, error

import peftops.functional as F
from peftops import NF4Weight, backends
from peftops.ops.merge_contract import merge_add, merge_undo
from peftops.testing.cases import CASES, SHAPES
from peftops.testing.law import call

OPS = ["merge_add", "merge_undo"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIGITS = {
    torch.float32: (-126, 23),
    torch.bfloat16: (-126, 7),
    torch.float16: (-14, 10),
}
COMPUTING = [name for name in backends.NAMES if backends.cell(name, "merge_add")]
ISAS = isa.NAMES


def same_bits(outs, expected):
    """Whether tensors have the same bits; torch.equal takes 0 for −0."""
    return all(
        torch.equal(bits(x), bits(y)) for x, y in zip(outs, expected, strict=True)
    )


def bits(t):
    return t.contiguous().view(torch.uint8)


def one(
    a,
    b,
    w,
    dtype,
    scale=1.0,
    undo=True,
):
    """The arguments of merge_add for one adapter."""
    scale = torch.tensor([scale], dtype=torch.float64)
    ranks = torch.tensor([len(a)], dtype=torch.int32)
    return [a, b, [w], scale, ranks, dtype, None, "dense", 0, undo]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_triton_gives_the_bits_of_the_reference(op, dtype):
    for shape in ((1, 1, 1, 1), (5, 133, 33, 20), (9, 64, 40, 0)):
        for label, args in CASES[op](shape, dtype):
            outs = call(op, "triton", args)
            assert same_bits(outs, call(op, "reference", args)), (shape, label)


@pytest.mark.parametrize("op", OPS)
def test_gpus_fuse_no_operations(op, monkeypatch):
    """The interpreter fuses nothing; a compiler must be told not to."""
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append(options)

    monkeypatch.setattr("peftops.triton.merge.merge_kernel", Kernel())
    for _, args in CASES[op]((5, 64, 48, 4), torch.bfloat16):
        call(op, "triton", args)
    assert len(launches) > 4
    assert {options["enable_fp_fusion"] for options in launches} == {False}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", OPS)
def test_instruction_sets_give_the_bits_of_the_reference(op, isa, on_isa):
    on_isa(isa)
    for dtype in DTYPES:
        for shape in (*SHAPES, (1, 513, 131, 20), (1, 700, 650, 70), (1, 70, 40, 1100)):
            for label, args in CASES[op](shape, dtype):
                outs = call(op, "cpu", args)
                assert same_bits(outs, call(op, "reference", args)), (shape, label)


@pytest.mark.parametrize("op", OPS)
def test_any_number_of_threads_gives_the_same_bits(op):
    cases = list(CASES[op]((1, 700, 650, 17), torch.bfloat16))
    before = torch.get_num_threads()
    try:
        for label, args in cases:
            outs = []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                outs.append(call(op, "cpu", args))
            assert all(same_bits(out, outs[0]) for out in outs), label
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", COMPUTING)
@pytest.mark.parametrize("dtype, digits", [(torch.bfloat16, 8), (torch.float16, 11)])
def test_there_is_one_rounding(dtype, digits, name):
    """1 + 2⁻ᵈ lies between two values, and what is added to it is too little for fp32."""
    middle = 2.0**-digits
    tiny = 2.0**-40
    b = torch.tensor(
        [[middle, tiny], [middle, -tiny], [-middle, tiny], [3 * middle, -tiny]]
    )
    a = torch.ones(2, 1)
    w = torch.ones(4, 1, dtype=dtype)
    exact = [1 + 2 * middle, 1, 1 - middle, 1 + 2 * middle]
    merged, _ = call("merge_add", name, one(a, b, w, dtype))
    assert merged.flatten().tolist() == exact
    if (name, dtype) == ("triton", torch.bfloat16):
        return  # the interpreter takes subnormal numbers of bf16 for zero
    # The same among subnormal numbers, whose products are exact in fp64 too.
    unit = 2.0 ** (DIGITS[dtype][0] - digits + 1)
    merged, _ = call("merge_add", name, one(a * unit, b / middle / 2, w * 0, dtype))
    assert merged.flatten().tolist() == [unit, 0, 0, unit]


@pytest.mark.parametrize("name", COMPUTING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_keeps_its_sign(dtype, name):
    tiny = torch.tensor([[-(2.0**-100), 2.0**-100]])
    w = torch.zeros(1, 2, dtype=dtype)
    merged, _ = call(
        "merge_add", name, one(tiny, torch.full((1, 1), 2.0**-100), w, dtype)
    )
    assert merged.tolist() == [[0.0, 0.0]]
    assert merged.signbit().tolist() == [[True, False]]


@pytest.mark.parametrize("name", COMPUTING)
def test_sums_go_over_ranks_and_adapters_in_order(name):
    """2⁶⁰ swallows a one that comes before it is taken away again."""
    large = 2.0**60
    w = torch.zeros(2, 1)
    b = torch.tensor([[large, 1.0, -large], [large, -large, 1.0]])
    args = one(torch.ones(3, 1), b, w, torch.float32)
    for ranks in ([3], [1, 1, 1], [0, 2, 1]):
        args[3] = torch.ones(len(ranks), dtype=torch.float64)
        args[4] = torch.tensor(ranks, dtype=torch.int32)
        merged, _ = call("merge_add", name, args)
        assert merged.flatten().tolist() == [0.0, 1.0], ranks


@pytest.mark.parametrize("name", COMPUTING)
def test_a_gain_is_divided_by(name):
    """To multiply by its inverse would round once more: here the quotient is in the middle."""
    middle = 2 - 2.0**-24
    gain = torch.arange(3.0, 103.0, 2, dtype=torch.float64)[None]
    n = gain.shape[1]
    scale = torch.tensor([-middle], dtype=torch.float64)
    ranks = torch.tensor([1], dtype=torch.int32)
    args = [torch.zeros(n, 1), torch.ones(1, 1), torch.ones(n, 1), scale, ranks, gain]
    (back,) = call("merge_undo", name, [*args, False])
    assert back.flatten().tolist() == [2.0] * n


moderate = st.floats(-4, 4, width=32) | st.sampled_from([0.0, -0.0, 2.0**-30])


@st.composite
def merges(draw):
    """A dtype, adapters and a weight: of any size, or such that the delta nearly cancels it."""
    dtype = draw(st.sampled_from(DTYPES))
    ranks = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    n, k = draw(st.tuples(st.integers(1, 3), st.integers(1, 9)))
    r = sum(ranks)
    number = (
        moderate if draw(st.booleans()) else st.floats(-(2.0**-66), 2.0**-66, width=32)
    )

    def matrix(*shape):
        count = shape[0] * shape[1]
        drawn = draw(st.lists(number, min_size=count, max_size=count))
        return torch.tensor(drawn, dtype=torch.float32).view(shape)

    a = matrix(r, k)
    b = matrix(n, r)
    scale = torch.tensor(
        draw(st.lists(moderate, min_size=len(ranks), max_size=len(ranks)))
    )
    w = matrix(n, k) * draw(st.sampled_from([1.0, 2.0**-120, 2.0**-20, 100.0]))
    if draw(st.booleans()):
        scales = scale.repeat_interleave(torch.tensor(ranks))
        w = -((b * scales) @ a)
    return a, b, w.to(dtype), scale.double(), torch.tensor(ranks, dtype=torch.int32)


def exactly(
    a,
    b,
    w,
    scale,
    ranks,
):
    """(W + Σ s·b·a, |W| + Σ |s·b·a|) of each element, as fractions."""
    scales = scale.repeat_interleave(ranks.long()).tolist()
    for row, weights in zip(b.tolist(), w.tolist(), strict=True):
        for column, weight in zip(a.T.tolist(), weights, strict=True):
            terms = [Fraction(weight)]
            for s, x, y in zip(scales, row, column, strict=True):
                terms.append(Fraction(s) * Fraction(x) * Fraction(y))
            yield sum(terms), sum(map(abs, terms))


def half_a_unit(exact, dtype):
    """Half of the distance between the neighbours of a number in a dtype."""
    smallest, digits = DIGITS[dtype]
    exponent = smallest
    while abs(exact) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    return Fraction(2) ** (exponent - digits - 1)


@given(merges())
@settings(max_examples=300, deadline=None)
def test_each_weight_is_within_half_a_unit(drawn):
    a, b, w, scale, ranks = drawn
    merged, lost = merge_add(a, b, [w], scale, ranks, w.dtype, undo=True)
    pairs = zip(merged.flatten().tolist(), exactly(a, b, w, scale, ranks), strict=True)
    for out, (exact, size) in pairs:
        assert abs(Fraction(out) - exact) <= half_a_unit(exact, w.dtype) + size / 2**40
    reference = call(
        "merge_add",
        "reference",
        [a, b, [w], scale, ranks, w.dtype, None, "dense", 0, True],
    )
    assert same_bits((merged, lost), reference)
    restored(merged, lost, w, merge_undo(merged, a, b, scale, ranks))


def restored(
    merged,
    lost,
    w,
    back,
):
    """Checks that `back` has the bits of w but where `lost` says."""
    word = torch.int16 if w.element_size() == 2 else torch.int32
    differs = back.view(word) != w.view(word)
    shifts = torch.arange(8, dtype=torch.uint8)
    flags = (lost[:, :, None] >> shifts & 1).flatten(1).bool()
    assert torch.equal(flags[:, : w.shape[1]], differs)
    assert not flags[:, w.shape[1] :].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_weights_are_lost(dtype):
    """A delta of half a percent: undoing it gives nearly all weights back, and knows the others."""
    w = torch.randn(300, 200).to(dtype)
    a = torch.randn(16, 200)
    b = torch.randn(300, 16) * 0.005 / 4
    args = one(a, b, w, dtype)
    merged, lost = call("merge_add", "cpu", args)
    assert (merged != w).float().mean() > 0.5
    back = call("merge_undo", "cpu", [merged, a, b, *args[3:5], None, False])[0]
    restored(merged, lost, w, back)
    assert 0.001 < (back != w).float().mean() < 0.02


@pytest.mark.parametrize("name", COMPUTING)
def test_a_weight_that_is_no_number_is_lost(name):
    w = torch.tensor([[float("nan"), float("inf"), 1.0]], dtype=torch.bfloat16)
    a = torch.full((1, 3), 0.5)
    merged, lost = call("merge_add", name, one(a, torch.ones(1, 1), w, w.dtype))
    assert merged.isnan().tolist() == [[True, False, False]]
    assert merged[0, 1] == float("inf")
    assert lost[0, 0] & 1


def factors(*ranks, n=40, k=24):
    return [
        (torch.randn(r, k), torch.randn(n, r), s)
        for r, s in zip(ranks, (0.7, 16 / 3**0.5, -2.0), strict=False)
    ]


def formula(w, adapters, magnitudes):
    """The formula in the docstring of merge_lora, in fp64."""
    out = w.double()
    for (a, b, s), magnitude in zip(adapters, magnitudes, strict=True):
        delta = s * b.double() @ a.double()
        out = out + delta
        if magnitude is not None:
            norm = (w.double() + delta).norm(dim=1)
            out = magnitude.double()[:, None] / norm[:, None] * out
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dora", ["none", "one", "all"])
def test_merge_lora_is_its_formula(dora, dtype):
    adapters = factors(3, 8, 1)
    w = torch.randn(40, 24).to(dtype)
    magnitudes = [
        torch.rand(40) if dora == "all" or (dora == "one" and i == 1) else None
        for i in range(3)
    ]
    exact = formula(w, adapters, magnitudes)
    out = F.merge_lora(w, adapters, magnitudes=magnitudes)
    assert out.dtype is dtype
    assert error(out, exact) <= bound(exact.to(dtype), exact)
    turned = F.merge_lora(w.T.contiguous().T, adapters, magnitudes=magnitudes)
    assert turned.T.is_contiguous()
    assert torch.equal(turned, out)
    wide = F.merge_lora(w, adapters, magnitudes=magnitudes, dtype=torch.float32)
    assert error(wide, exact) <= bound(exact.float(), exact)


@pytest.mark.parametrize("double", [False, True])
def test_merge_lora_over_4_bits(double):
    adapters = factors(3, 8)
    q = NF4Weight.quantize(torch.randn(40, 24).bfloat16(), double_quant=double)
    w = q.dequantize(torch.float32)
    magnitudes = [None, torch.rand(40)]
    out = F.merge_lora(q, adapters, magnitudes=magnitudes)
    assert out.dtype is torch.bfloat16
    expected = F.merge_lora(w, adapters, magnitudes=magnitudes, dtype=torch.bfloat16)
    assert torch.equal(out, expected)


def test_a_row_of_zeros_has_gain_0():
    a, b, s = factors(3)[0]
    w = torch.randn(40, 24)
    w[5] = 0
    b[5] = 0
    out = F.merge_lora(w, [(a, b, s)], magnitudes=[torch.ones(40)])
    assert torch.equal(out[5], torch.zeros(24))
    assert out.isfinite().all()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"a": torch.ones(3, 23)}, r"merge: lora_A must be \(r, 24\), got \(3, 23\)"),
        ({"b": torch.ones(40, 2)}, r"merge: lora_B must be \(40, 3\), got \(40, 2\)"),
        ({"w": torch.ones(41, 24)}, r"merge: w must be \(40, 24\), got \(41, 24\)"),
        ({"w": torch.ones(40, 24).long()}, r"merge: w must be torch.float32 or"),
        ({"a": torch.ones(3)}, r"merge: lora_A must be \(r, 24\), got \(3,\)"),
        ({"dtype": torch.int8}, "merge: dtype must be torch.float32 or"),
        ({"dtype": "bf16"}, "merge: dtype must be torch.float32 or .*, got bf16"),
        ({"magnitudes": []}, "merge: magnitudes must be 2, got 0"),
        (
            {"magnitudes": [torch.ones(4), None]},
            r"merge: magnitude must be \(40,\), got \(4,\)",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_explained(change, words):
    first, (a, b, s) = factors(2, 3)
    w = change.pop("w", torch.ones(40, 24))
    adapters = [first, (change.pop("a", a), change.pop("b", b), s)]
    with pytest.raises((ValueError, TypeError), match=words):
        F.merge_lora(w, adapters, **change)


def test_no_adapter_is_refused():
    w = torch.ones(40, 24)
    with pytest.raises(
        ValueError, match="merge: factors must hold an adapter, got none"
    ):
        F.merge_lora(w, [])
    with pytest.raises(
        TypeError, match=r"merge: factors must be a sequence of \(lora_A"
    ):
        F.merge_lora(w, [(w, w)])
