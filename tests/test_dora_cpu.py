"""DoRA's kernels for the CPU, on shapes for which the cases of test_ops.py are too small."""

import isa
import pytest
import torch
from law import bound, error

import peftops.functional  # noqa: F401  registers the ops
from peftops import backend
from peftops.cpu import nf4
from peftops.testing.cases import FWD, NORMS, VARIANTS, lora
from peftops.testing.law import call, check, double

dora = pytest.importorskip("peftops.cpu.dora")
ISAS = isa.NAMES
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=ISAS)
def isa(request, on_isa, monkeypatch):
    on_isa(request.param)
    monkeypatch.setattr(dora, "_C", nf4._C)


def norm(w, a, b, form="dense", scale=0.7):
    base = [w.T.contiguous() if form == "transposed" else w]
    wide = torch.promote_types(w.dtype, torch.float32)
    scale = torch.tensor([scale], dtype=wide)
    return call("dora_norm", "cpu", [w[:0], base, a, b, scale, form, 0])[0]


def formula(w, a, b, dtype, scale=0.7):
    return (w.to(dtype) + scale * (b.to(dtype) @ a.to(dtype))).norm(dim=1)


@pytest.mark.parametrize("op", ["dora_norm", "dora_norm_bwd", "dora_drop", "dora_mix"])
def test_law(op, isa):
    for dtype in DTYPES:
        for shape in (
            (5, 133, 33, 20),
            (70, 64, 48, 16),
            (9, 64, 40, 0),
            (3, 1100, 39, 150),
        ):
            for label, err, most in check(op, "cpu", shape, dtype):
                assert err <= most, f"{dtype}, {label}"


def relative(norms, exact):
    """Each norm over its exact value, so that no row hides behind a larger one."""
    return (norms / exact).float()


@pytest.mark.parametrize("form", ["dense", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_is_exact(dtype, form, isa):
    """As exact as one rounding; where b·a leaves 1/1000 of a weight, as exact as torch in fp32."""
    n, k, r = 67, 14336, 16
    w, a, b = (torch.randn(shape).to(dtype) for shape in ((n, k), (r, k), (n, r)))
    exact = formula(w, a, b, torch.float64)
    ones = torch.ones_like(exact)
    out = relative(norm(w, a, b, form), exact)
    assert error(out, ones) <= bound(relative(exact.float(), exact), ones)
    w = (-0.7 / (1 - 1e-3) * (b.double() @ a.double())).to(dtype)
    exact = formula(w, a, b, torch.float64)
    same = formula(w, a, b, torch.float32)
    out = relative(norm(w, a, b, form), exact)
    assert error(out, ones) <= bound(relative(same, exact), ones)


@pytest.mark.parametrize("label", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype, label):
    inputs = lora(0, 700, 331, 9, dtype, **VARIANTS[label])
    args = [inputs[name] for name in ("x", "base", "a", "b", "scale", "form", "block")]
    before = torch.get_num_threads()
    norms = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            norms.append(call("dora_norm", "cpu", args)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(norms[0], other) for other in norms[1:])
    assert norms[0].isfinite().all()


@pytest.mark.parametrize("form", ["dense", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_rows(dtype, form, isa):
    n, k, r = 71, 133, 5
    w, a, b = (torch.randn(shape).to(dtype) for shape in ((n, k), (r, k), (n, r)))
    clean = norm(w, a, b, form)
    w[2, 0] = w[35, 70] = w[70, 132] = float("nan")
    w[3, 5] = float("inf")
    b[36, 4] = float("-inf")
    untouched = torch.ones(n, dtype=torch.bool)
    untouched[[2, 35, 70, 3, 36]] = False
    norms = norm(w, a, b, form)
    assert torch.equal(norms[untouched], clean[untouched])
    assert norms[[2, 35, 70]].isnan().all() and norms[[3, 36]].isinf().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_is_a_sum_over_parts_of_the_base(dtype, monkeypatch):
    monkeypatch.setattr(nf4, "PART", 4 * 96 * 6)
    for label, err, most in check("dora_norm_bwd", "cpu", (37, 96, 131, 5), dtype):
        assert err <= most, label


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_dropout(dtype, isa):
    inputs = lora(5, 133, 3, 1, dtype, p=0.5)
    x = inputs["x"]
    dropped, remainder, bits = call("dora_drop", "cpu", [x, inputs["seed"], 0.0])
    assert torch.equal(dropped, x) and not remainder.any() and (bits == 255).all()
    for other in (x.flip(0), None):
        args = [x, other, inputs["bits"], 0.0]
        (out,) = call("dora_mix", "cpu", args)
        (same,) = call("dora_mix", "reference", args)
        (exact,) = call("dora_mix", "reference", double(args))
        assert error(out, exact) <= bound(same, exact)


def test_the_mask_is_that_of_the_product():
    inputs = lora(70, 300, 24, 4, torch.bfloat16, p=0.3)
    inputs["keep_z"] = False
    bits = call("lora_fwd", "cpu", [inputs[name] for name in FWD])[2]
    with backend("cpu"):
        dropped, remainder, same = torch.ops.peftops.dora_drop(
            inputs["x"], inputs["seed"], 0.3
        )
    assert torch.equal(bits, same) and (dropped == 0).any()
    assert torch.equal(remainder[dropped == 0], inputs["x"][dropped == 0])
