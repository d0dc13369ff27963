"""Triton's kernels where the shapes of the law are too small: choices, large tensors, slices."""

from itertools import islice

import numpy
import pytest
import torch
import triton
import triton.language as tl

import peftops.functional  # noqa: F401  registers the ops
from peftops.ops.nf4_tables import bounds, four_bits
from peftops.testing.cases import BWD, FWD, GEMV, NORM, NORM_BWD, lora, nf4
from peftops.testing.law import call, check, check_case
from peftops.triton import _gemm, _tile, dora, lora_gemv, lora_product
from peftops.triton.lora import describe
from peftops.triton.nf4 import decode

# more rows of tiles than are walked together, and an incomplete group of them
MANY = 290, 40, 40, 3


def h200(device):
    return "sm_90", 132


def assert_law(op, shape, dtype, cases=None):
    for label, error, bound in islice(check(op, "triton", shape, dtype), cases):
        assert error <= bound, label


@pytest.mark.parametrize("op", ["lora_fwd", "lora_bwd", "lora_gemv"])
def test_product_by_cublas(op, monkeypatch):
    by_cublas(monkeypatch)
    assert_law(op, (5, 40, 48, 20), torch.bfloat16)
    assert_law(op, (5, 40, 48, 0), torch.bfloat16)


@pytest.mark.parametrize("op", ["multi_fwd", "multi_bwd"])
def test_product_by_cublas_of_many_adapters(op, monkeypatch):
    by_cublas(monkeypatch)
    assert_law(op, (5, 40, 48, 20), torch.bfloat16)


@pytest.mark.parametrize("op", ["lora_fwd", "lora_bwd"])
def test_groups_of_tiles(op):
    assert_law(op, MANY, torch.float16, cases=2)


HALF = torch.empty(0, dtype=torch.bfloat16)
SINGLE = torch.empty(0)


def test_the_choice_of_a_product(monkeypatch):
    monkeypatch.setattr(_gemm, "machine", h200)
    products = [_gemm.choose_product(9, 4096, k, HALF) for k in (128, 456, 454, 512)]
    assert products == ["fused", "fused", "cublas", "cublas"]
    assert _gemm.choose_product(9, 64, 454, HALF) == "fused"
    assert _gemm.choose_product(9, 4096, 896, HALF, passes=2) == "fused"
    assert _gemm.choose_product(9, 4096, 4096, SINGLE) == "cublas"
    launches = [
        lora_gemv.choose_launches(1, n, 4096, 16, form, HALF)
        for n, form in ((14336, "dense"), (4096, "dense"), (8, "given"))
    ]
    assert launches == ["one launch", "two launches", "given"]
    assert lora_gemv.choose_launches(1, 14336, 4096, 16, "dense", SINGLE) == "cublas"


def test_the_choice_of_a_product_over_4_bits(monkeypatch):
    monkeypatch.setattr(_gemm, "machine", h200)

    def described(op, x, m, k=4096, r=16):
        return describe(op, x, m, 4096, k, r, "nf4")

    assert described("lora_fwd", HALF, 65) == "dequantize + cuBLAS"
    assert described("lora_fwd", HALF, 8192) == "dequantize + cuBLAS"
    assert described("lora_fwd", SINGLE, 65) == "dequantize + cuBLAS"
    assert described("lora_fwd", HALF, 65, k=4099) == "dequantize + cuBLAS"
    assert described("lora_gemv", HALF, 1) == "two launches"
    assert described("lora_gemv", HALF, 64) == "two launches"
    assert described("lora_gemv", HALF, 1, r=0) == "one launch"
    assert described("lora_gemv", SINGLE, 1) == "dequantize + cuBLAS"
    assert described("lora_gemv", HALF, 1, k=4099) == "dequantize + cuBLAS"
    monkeypatch.setattr(_gemm, "machine", lambda device: ("sm_80", 108))
    assert described("lora_fwd", HALF, 65) == "fused"
    assert described("lora_fwd", HALF, 512) == "fused"
    assert described("lora_fwd", HALF, 8192) == "dequantize + cuBLAS"


def test_stripes_cover_and_fill(monkeypatch):
    monkeypatch.setattr(_gemm, "machine", h200)
    for length, programs in ((4096, 1), (4096, 100), (100, 7), (4096, 1000), (0, 1)):
        count, span = _gemm.stripes(length, 64, programs, torch.empty(0))
        assert (count - 1) * span < max(length, 1) <= max(
            count * span, 1
        ) and span % 64 == 0
        assert count * programs <= 2 * 132 + programs


@triton.jit
def copy_kernel(OUT, P, ROW, ROWS, COLS, BM: tl.constexpr, BN: tl.constexpr):
    o_n = tl.arange(0, BN)
    tile = _tile.load_tile(P, ROW + tl.arange(0, BM), o_n, ROWS, COLS)
    _tile.store_tile(OUT, tile, tl.arange(0, BM), o_n, BM, COLS)
    _tile.store_tile(P, tile + 1, ROW + tl.arange(0, BM), o_n, ROWS, COLS)


def test_more_than_two_to_the_31_elements():
    rows = 2**20 + 16
    columns = 2**12
    # numpy's zeros take memory only where they are written
    big = torch.from_numpy(numpy.zeros((rows, columns), dtype=numpy.uint8))
    big[2**20 :] = 7
    out = torch.zeros(16, columns, dtype=torch.uint8)
    copy_kernel[(1,)](out, big, 2**20, rows, columns, BM=16, BN=32)
    assert (big[2**20 :, :32] == 8).all()
    assert (big[2**20 :, 32:] == 7).all()
    assert not big[:16].any()


@triton.jit
def bytes_kernel(OUT, SEED, COUNTER, threshold):
    offsets = tl.arange(0, 8)
    tl.store(
        OUT + offsets,
        _tile.keep_bytes(tl.load(SEED), tl.load(COUNTER + offsets), threshold),
    )


@pytest.mark.parametrize("seed", [0, 0x123456789ABCDEF, 2**62 - 1, -1])
def test_philox_of_large_counters(seed):
    counters = [0, 1, 77, 2**31, 2**32 - 1, 2**32, 2**40 + 5, 2**62 + 3]
    out = torch.empty(8, dtype=torch.uint8)
    bytes_kernel[(1,)](out, torch.tensor([seed]), torch.tensor(counters), 6554)
    assert out.tolist() == [byte_of(counter, seed, 6554) for counter in counters]


def byte_of(counter, seed, threshold):
    """Philox4x32-7 on Python's integers, as in its paper (Salmon et al. 2011)."""
    word = 2**32 - 1
    words = [counter & word, counter >> 32, 0, 0]
    k = [seed & word, seed >> 32 & word]
    for _ in range(7):
        a = 0xD2511F53 * words[0]
        b = 0xCD9E8D57 * words[2]
        words = [
            b >> 32 ^ words[1] ^ k[0],
            b & word,
            a >> 32 ^ words[3] ^ k[1],
            a & word,
        ]
        k = [k[0] + 0x9E3779B9 & word, k[1] + 0xBB67AE85 & word]
    draws = [half for draw in words for half in (draw & 0xFFFF, draw >> 16)]
    return sum((draw >= threshold) << i for i, draw in enumerate(draws))


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size, block",
    [(1, 32), (63, 64), (4096, 4096), (8225, 32), (4242, 256), (5000, 1024)],
)
def test_bits_of_quantize(size, block, dtype):
    w = torch.randn(size)
    w[size // 2 :] *= 1e-3
    for quant_type in ("nf4", "fp4"):
        for special in (1.0, 0.0, 1e-39, float("inf"), float("nan")):
            w[0] = special
            w[:block] *= special == 1 or special != special
            args = [w.to(dtype), *bounds(four_bits(quant_type, w.device)), block]
            codes, absmax = call("nf4_quantize", "triton", args)
            expected, scales = call("nf4_quantize", "reference", args)
            assert torch.equal(codes, expected), special
            assert torch.equal(absmax.nan_to_num(7), scales.nan_to_num(7)), special


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size, block",
    [(1, 32), (63, 64), (8225, 32), (16416, 32), (4242, 4096), (12288, 64)],
)
def test_bits_of_dequantize(size, block, dtype, nested):
    codes, table, *scales = nf4(
        size, block, nested, torch.Generator().manual_seed(size)
    )
    args = [codes, table, scales, block, size, dtype]
    (out,) = call("nf4_dequantize", "triton", args)
    (expected,) = call("nf4_dequantize", "reference", args)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "n, k, block", [(40, 72, 32), (33, 133, 64), (9, 1040, 64), (5, 4100, 4096)]
)
def test_parts_of_a_weight(n, k, block):
    """Decodes some columns or some rows, which may start inside a block."""
    base = nf4(n * k, block, True, torch.Generator().manual_seed(k))
    args = [*base[:2], base[2:], block, n * k, torch.bfloat16]
    w = call("nf4_dequantize", "reference", args)[0].view(n, k)
    for first, columns in ((0, k), (0, 16), (3, 7), (32, 33), (k - 8, 8), (8, 1024)):
        if first + columns <= k:
            out = torch.empty(n, columns, dtype=torch.bfloat16)
            decode(out, base, block, first, k)
            assert torch.equal(out, w[:, first : first + columns])
    rows = torch.empty(2, k, dtype=torch.bfloat16)
    decode(rows.view(1, -1), base, block, 3 * k, 0)
    assert torch.equal(rows, w[3:5])


@pytest.fixture
def decoded(monkeypatch):
    """The shapes of the slices that are decoded outside a product."""
    shapes = []

    def note(out, *args):
        shapes.append(tuple(out.shape))
        return decode(out, *args)

    monkeypatch.setattr(lora_product, "decode", note)
    return shapes


def by_cublas(monkeypatch):
    monkeypatch.setattr(_gemm, "choose_product", lambda *args, **kwargs: "cublas")
    monkeypatch.setattr(lora_gemv, "choose_launches", lambda *args: "cublas")


@pytest.mark.parametrize("product", ["fused", "cublas"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("n, k, block", [(40, 72, 32), (33, 45, 64), (48, 64, 128)])
def test_products_read_the_same_bits(
    n, k, block, dtype, nested, product, decoded, monkeypatch
):
    """Rows of the identity give the weight itself: forward, for few rows, and backward."""
    if product == "cublas":
        by_cublas(monkeypatch)
    inputs = lora(1, k, n, 0, dtype, form="nf4", block=block, nested=nested)
    codes, table, *scales = inputs["base"]
    args = [codes, table, scales, block, n * k, dtype]
    w = call("nf4_dequantize", "reference", args)[0].view(n, k)
    inputs |= {"x": torch.eye(k, dtype=dtype), "dy": torch.eye(n, dtype=dtype)}
    for op, names in (("lora_fwd", FWD), ("lora_gemv", GEMV)):
        assert torch.equal(call(op, "triton", [inputs[name] for name in names])[0], w.T)
    inputs |= {"x": torch.zeros(n, k, dtype=dtype), "h": torch.zeros(n, 0, dtype=dtype)}
    inputs |= {
        "bits": torch.empty(n, 0, dtype=torch.uint8),
        "z": torch.empty(n, 0, dtype=dtype),
    }
    assert torch.equal(call("lora_bwd", "triton", [inputs[name] for name in BWD])[0], w)
    assert len(decoded) == (3 if product == "cublas" else 0)


@pytest.mark.parametrize(
    "op, names", [("lora_fwd", FWD), ("lora_bwd", BWD), ("lora_gemv", GEMV)]
)
@pytest.mark.parametrize("shape", [(5, 45, 33, 20), (3, 24, 10, 0)], ids=str)
def test_scratch_of_a_few_rows(op, names, shape, decoded, monkeypatch):
    """A weight that is decoded in slices keeps the law, and no slice exceeds the scratch."""
    by_cublas(monkeypatch)
    for scratch, count in ((200, 3), (1, 10)):
        monkeypatch.setattr(lora_product, "SCRATCH", scratch)
        decoded.clear()
        inputs = lora(*shape, torch.float16, form="nf4", nested=True, gain=True)
        error, bound = check_case(op, "triton", [inputs[name] for name in names])
        assert error <= bound and len(decoded) >= count
        length = shape[2] if op == "lora_bwd" else shape[1]  # of a column, or of a row
        largest = max(2 * rows * columns for rows, columns in decoded)
        assert largest <= max(scratch, 2 * length)


def test_how_much_the_scratch_holds():
    assert lora_product.slice_columns(4096, 4096, HALF) == 4096
    assert lora_product.slice_columns(14336, 4096, HALF) == 4096
    assert lora_product.slice_columns(28672, 8192, HALF) == 2048
    assert lora_product.slice_columns(4096, 14336, HALF) == 1024
    assert lora_product.slice_columns(8, 2**25, HALF) == 1


def norm(inputs):
    return call("dora_norm", "triton", [inputs[name] for name in NORM])[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"form": "transposed", "fp32": True}, {"form": "nf4", "nested": True}],
    ids=str,
)
@pytest.mark.parametrize(
    "shape", [(0, 264, 40, 20), (0, 520, 72, 40), (0, 250, 72, 33)], ids=str
)
def test_norm_in_parts(shape, options):
    """The law holds in stripes of columns, with ranks in registers or not, and bits repeat."""
    inputs = lora(*shape, torch.bfloat16, **options)
    error, bound = check_case("dora_norm", "triton", [inputs[name] for name in NORM])
    assert error <= bound
    assert torch.equal(norm(inputs), norm(inputs))


def test_norm_where_the_adapter_undoes_the_weight():
    """A thousandth of the weight is left, which a sum of the expanded squares would lose."""
    inputs = lora(0, 512, 64, 8, torch.float32)
    inputs["scale"].fill_(1)
    inputs["base"] = [
        -(inputs["b"].double() @ inputs["a"].double() * (1 + 1e-3)).float()
    ]
    error, bound = check_case("dora_norm", "triton", [inputs[name] for name in NORM])
    assert error <= bound


def test_norm_of_a_row_with_a_nan():
    inputs = lora(0, 264, 40, 4, torch.bfloat16)
    expected = norm(inputs)
    inputs["base"][0][7, 200] = float("nan")
    out = norm(inputs)
    assert out[7].isnan()
    assert torch.equal(out[:7], expected[:7]) and torch.equal(out[8:], expected[8:])


def test_ranks_that_are_held(monkeypatch):
    monkeypatch.setattr(_gemm, "INTERPRET", False)

    def held(x, whole, *ranks):
        return [dora.norm_tile(r, x, whole)["HELD"] for r in ranks]

    monkeypatch.setattr(_gemm, "machine", h200)
    assert held(HALF, True, 0, 16, 64, 128, 384, 385) == [1, 1, 1, 2, 6, 0]
    monkeypatch.setattr(_gemm, "machine", lambda device: ("sm_86", 132))
    assert held(HALF, True, 0, 16, 64, 128, 384, 385) == [1, 1, 1, 2, 0, 0]
    assert held(HALF, False, 8, 32, 33) == [1, 1, 0]
    assert held(SINGLE, True, 8, 17) == [1, 0]


def test_scratch_of_the_gradient_of_a_norm(decoded, monkeypatch):
    """The law holds where 4-bit weights are decoded in slices."""
    monkeypatch.setattr(lora_product, "SCRATCH", 2 * 45 * 7)
    inputs = lora(0, 45, 33, 20, torch.float16, form="nf4", nested=True)
    inputs |= {
        "dn": torch.linspace(-1, 1, 33),
        "n": torch.linspace(1, 2, 33),
        "need": [True, True],
    }
    args = [inputs[name] for name in NORM_BWD]
    error, bound = check_case("dora_norm_bwd", "triton", args)
    assert error <= bound
    assert decoded == [(1, 7 * 45)] * 4 + [(1, 5 * 45)]


def test_dropout_of_nothing():
    """p = 0 keeps all elements, whatever bits dora_mix is given."""
    inputs = lora(5, 40, 1, 1, torch.bfloat16, p=0.5)
    x = inputs["x"]
    dropped, remainder, bits = call("dora_drop", "triton", [x, inputs["seed"], 0.0])
    assert torch.equal(dropped, x) and not remainder.any() and (bits == 255).all()
    (mixed,) = call("dora_mix", "triton", [x, x.flip(0), inputs["bits"], 0.0])
    assert torch.equal(mixed, x)
