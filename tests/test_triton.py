"""What the law, whose shapes are small, does not reach."""

from itertools import islice

import numpy
import pytest
import torch
import triton
import triton.language as tl

import peftops.functional  # noqa: F401  registers the ops
from peftops.ops.nf4_tables import bounds, four_bits
from peftops.testing.cases import BWD, FWD, GEMV, NORM, lora, nf4
from peftops.testing.law import call, check, check_case
from peftops.triton import _gemm, _tile, dora, lora_gemv, lora_product
from peftops.triton.lora import describe
from peftops.triton.nf4 import decode

MANY = (
    290,
    40,
    40,
    3,
)  # more rows of tiles than are walked together, and a part of such a group


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


@pytest.mark.parametrize("op", ["lora_fwd", "lora_bwd"])
def test_groups_of_tiles(op):
    assert_law(op, MANY, torch.float16, cases=2)


def test_path(monkeypatch):
    monkeypatch.setattr(_gemm, "machine", h200)
    half, single = torch.empty(0, dtype=torch.bfloat16), torch.empty(0)
    ways = [_gemm.choose_product(9, 4096, k, half) for k in (128, 456, 454, 512)]
    assert (
        ways == ["fused", "fused", "cublas", "cublas"]
        and _gemm.choose_product(9, 64, 454, half) == "fused"
    )
    assert (
        _gemm.choose_product(9, 4096, 896, half, passes=2) == "fused"
        and _gemm.choose_product(9, 4096, 4096, single) == "cublas"
    )
    few = [
        lora_gemv.choose_launches(1, n, 4096, 16, form, half)
        for n, form in ((14336, "dense"), (4096, "dense"), (8, "given"))
    ]
    assert few == ["one launch", "two launches", "given"]
    assert lora_gemv.choose_launches(1, 14336, 4096, 16, "dense", single) == "cublas"


def test_path_of_four_bits(monkeypatch):
    monkeypatch.setattr(_gemm, "machine", h200)
    half, single = torch.empty(0, dtype=torch.bfloat16), torch.empty(0)

    def ways(op, x, k, *rows):
        return [describe(op, x, m, 4096, k, 16, "nf4") for m in rows]

    assert ways("lora_fwd", half, 4096, 65, 8192) == ["dequantize + cuBLAS"] * 2
    assert (
        ways("lora_fwd", single, 4096, 65)
        == ways("lora_fwd", half, 4099, 65)
        == ["dequantize + cuBLAS"]
    )
    assert ways("lora_gemv", half, 4096, 1, 64) == ["two launches"] * 2
    assert describe("lora_gemv", half, 1, 4096, 4096, 0, "nf4") == "one launch"
    assert (
        ways("lora_gemv", single, 4096, 1)
        == ways("lora_gemv", half, 4099, 1)
        == ["dequantize + cuBLAS"]
    )
    monkeypatch.setattr(_gemm, "machine", lambda device: ("sm_80", 108))
    assert ways("lora_fwd", half, 4096, 65, 512, 8192) == [
        "fused",
        "fused",
        "dequantize + cuBLAS",
    ]


def test_stripes_cover_and_fill(monkeypatch):
    monkeypatch.setattr(_gemm, "machine", h200)
    for length, programs in ((4096, 1), (4096, 100), (100, 7), (4096, 1000), (0, 1)):
        count, span = _gemm.stripes(length, 64, programs, torch.empty(0))
        assert (count - 1) * span < max(length, 1) <= max(count * span, 1) and span % 64 == 0
        assert count * programs <= 2 * 132 + programs


@triton.jit
def copy_kernel(OUT, P, ROW, ROWS, COLS, BM: tl.constexpr, BN: tl.constexpr):
    o_n = tl.arange(0, BN)
    t = _tile.load_tile(P, ROW + tl.arange(0, BM), o_n, ROWS, COLS)
    _tile.store_tile(OUT, t, tl.arange(0, BM), o_n, BM, COLS)
    _tile.store_tile(P, t + 1, ROW + tl.arange(0, BM), o_n, ROWS, COLS)


def test_more_than_two_to_the_31_elements():
    rows, columns = (
        2**20 + 16,
        2**12,
    )  # numpy leaves what is not touched to the operating system
    big = torch.from_numpy(numpy.zeros((rows, columns), dtype=numpy.uint8))
    big[2**20 :] = 7
    out = torch.zeros(16, 32, dtype=torch.uint8)
    copy_kernel[(1,)](out.new_zeros(16, columns), big, 2**20, rows, columns, BM=16, BN=32)
    assert (
        (big[2**20 :, :32] == 8).all() and (big[2**20 :, 32:] == 7).all() and not big[:16].any()
    )


@triton.jit
def bytes_kernel(OUT, SEED, COUNTER, threshold):
    o = tl.arange(0, 8)
    tl.store(OUT + o, _tile.keep_bytes(tl.load(SEED), tl.load(COUNTER + o), threshold))


@pytest.mark.parametrize("seed", [0, 0x123456789ABCDEF, 2**62 - 1, -1])
def test_philox_of_large_counters(seed):
    counters = [0, 1, 77, 2**31, 2**32 - 1, 2**32, 2**40 + 5, 2**62 + 3]
    out = torch.empty(8, dtype=torch.uint8)
    bytes_kernel[(1,)](out, torch.tensor([seed]), torch.tensor(counters), 6554)
    assert out.tolist() == [byte_of(counter, seed, 6554) for counter in counters]


def byte_of(counter, seed, threshold):
    """Philox4x32-7 as its paper has it (Salmon et al. 2011), on Python's integers."""
    word = 2**32 - 1
    c, k = [counter & word, counter >> 32, 0, 0], [seed & word, seed >> 32 & word]
    for _ in range(7):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & word, a >> 32 ^ c[3] ^ k[1], a & word]
        k = [k[0] + 0x9E3779B9 & word, k[1] + 0xBB67AE85 & word]
    draws = [half for draw in c for half in (draw & 0xFFFF, draw >> 16)]
    return sum((draw >= threshold) << i for i, draw in enumerate(draws))


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size, block", [(1, 32), (63, 64), (4096, 4096), (8225, 32), (4242, 256), (5000, 1024)]
)
def test_bits_of_quantize(size, block, dtype):
    w = torch.randn(size)
    w[size // 2 :] *= 1e-3
    for kind in ("nf4", "fp4"):
        for special in (1.0, 0.0, 1e-39, float("inf"), float("nan")):
            w[0] = special
            w[:block] *= special == 1 or special != special
            args = [w.to(dtype), *bounds(four_bits(kind, w.device)), block]
            codes, absmax = call("nf4_quantize", "triton", args)
            expected, scales = call("nf4_quantize", "reference", args)
            assert torch.equal(codes, expected) and torch.equal(
                absmax.nan_to_num(7), scales.nan_to_num(7)
            ), special


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size, block", [(1, 32), (63, 64), (8225, 32), (16416, 32), (4242, 4096), (12288, 64)]
)
def test_bits_of_dequantize(size, block, dtype, nested):
    codes, table, *scales = nf4(size, block, nested, torch.Generator().manual_seed(size))
    args = [codes, table, scales, block, size, dtype]
    (out,), (expected,) = (
        call("nf4_dequantize", name, args) for name in ("triton", "reference")
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "n, k, block", [(40, 72, 32), (33, 133, 64), (9, 1040, 64), (5, 4100, 4096)]
)
def test_parts_of_a_weight(n, k, block):
    """Some columns of it, or some rows, whatever they begin with."""
    base = nf4(n * k, block, True, torch.Generator().manual_seed(k))
    w = call(
        "nf4_dequantize", "reference", [*base[:2], base[2:], block, n * k, torch.bfloat16]
    )[0].view(n, k)
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
    """The shapes of what is decoded outside a product."""
    shapes = []
    monkeypatch.setattr(
        lora_product,
        "decode",
        lambda out, *args: shapes.append(tuple(out.shape)) or decode(out, *args),
    )
    return shapes


def by_cublas(monkeypatch):
    monkeypatch.setattr(_gemm, "choose_product", lambda *args, **kwargs: "cublas")
    monkeypatch.setattr(lora_gemv, "choose_launches", lambda *args: "cublas")


@pytest.mark.parametrize("way", ["fused", "cublas"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("n, k, block", [(40, 72, 32), (33, 45, 64), (48, 64, 128)])
def test_products_read_the_same_bits(n, k, block, dtype, nested, way, decoded, monkeypatch):
    """Rows of the unit matrix give the weight itself: forward, for few rows, and backward."""
    if way == "cublas":
        by_cublas(monkeypatch)
    t = lora(1, k, n, 0, dtype, form="nf4", block=block, nested=nested)
    codes, table, *scales = t["base"]
    w = call("nf4_dequantize", "reference", [codes, table, scales, block, n * k, dtype])[
        0
    ].view(n, k)
    t |= {"x": torch.eye(k, dtype=dtype), "dy": torch.eye(n, dtype=dtype)}
    for op, names in (("lora_fwd", FWD), ("lora_gemv", GEMV)):
        assert torch.equal(call(op, "triton", [t[name] for name in names])[0], w.T)
    t |= {"x": torch.zeros(n, k, dtype=dtype), "h": torch.zeros(n, 0, dtype=dtype)}
    t |= {"bits": torch.empty(n, 0, dtype=torch.uint8), "z": torch.empty(n, 0, dtype=dtype)}
    assert torch.equal(call("lora_bwd", "triton", [t[name] for name in BWD])[0], w)
    assert len(decoded) == (3 if way == "cublas" else 0)


@pytest.mark.parametrize(
    "op, names", [("lora_fwd", FWD), ("lora_bwd", BWD), ("lora_gemv", GEMV)]
)
@pytest.mark.parametrize("shape", [(5, 45, 33, 20), (3, 24, 10, 0)], ids=str)
def test_scratch_of_a_few_rows(op, names, shape, decoded, monkeypatch):
    """In parts the sums stay whole: the law holds, and no more is decoded at a time than there is room for."""
    by_cublas(monkeypatch)
    for scratch, count in ((200, 3), (1, 10)):
        monkeypatch.setattr(lora_product, "SCRATCH", scratch)
        decoded.clear()
        t = lora(*shape, torch.float16, form="nf4", nested=True, gain=True)
        error, bound = check_case(op, "triton", [t[name] for name in names])
        assert error <= bound and len(decoded) >= count
        one = 2 * (shape[2] if op == "lora_bwd" else shape[1])  # bytes of a column, or of a row
        assert max(2 * rows * columns for rows, columns in decoded) <= max(scratch, one)


def test_what_the_scratch_holds():
    half = torch.empty(0, dtype=torch.bfloat16)
    parts = [
        lora_product.slice_columns(count, length, half)
        for count, length in ((4096, 4096), (14336, 4096), (28672, 8192))
    ]
    assert parts == [4096, 4096, 2048] and lora_product.slice_columns(4096, 14336, half) == 1024
    assert lora_product.slice_columns(8, 2**25, half) == 1


def norm(t):
    return call("dora_norm", "triton", [t[name] for name in NORM])[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"form": "transposed", "fp32": True}, {"form": "nf4", "nested": True}],
    ids=str,
)
@pytest.mark.parametrize(
    "shape", [(0, 264, 40, 20), (0, 520, 72, 40), (0, 250, 72, 33)], ids=str
)
def test_norm_in_parts(shape, options):
    """Stripes of columns, and ranks that are held, or are too many to be: the law, and the same bits each time."""
    t = lora(*shape, torch.bfloat16, **options)
    error, bound = check_case("dora_norm", "triton", [t[name] for name in NORM])
    assert error <= bound and torch.equal(norm(t), norm(t))


def test_norm_where_the_adapter_undoes_the_weight():
    """What is left is a thousandth of the weight: a sum of squares of the two would have lost it."""
    t = lora(0, 512, 64, 8, torch.float32)
    t["scale"].fill_(1)
    t["base"] = [-(t["b"].double() @ t["a"].double() * (1 + 1e-3)).float()]
    error, bound = check_case("dora_norm", "triton", [t[name] for name in NORM])
    assert error <= bound


def test_norm_of_a_row_that_is_not_a_number():
    t = lora(0, 264, 40, 4, torch.bfloat16)
    expected = norm(t)
    t["base"][0][7, 200] = float("nan")
    out = norm(t)
    assert (
        out[7].isnan()
        and torch.equal(out[:7], expected[:7])
        and torch.equal(out[8:], expected[8:])
    )


def test_ranks_that_are_held(monkeypatch):
    monkeypatch.setattr(_gemm, "INTERPRET", False)
    half, single = torch.empty(0, dtype=torch.bfloat16), torch.empty(0)
    for kind, held in (("sm_90", [1, 1, 1, 2, 6, 0]), ("sm_86", [1, 1, 1, 2, 0, 0])):
        monkeypatch.setattr(_gemm, "machine", lambda device, kind=kind: (kind, 132))
        assert [
            dora.norm_tile(r, half, True)["HELD"] for r in (0, 16, 64, 128, 384, 385)
        ] == held
    assert [dora.norm_tile(r, half, False)["HELD"] for r in (8, 32, 33)] == [1, 1, 0]
    assert [dora.norm_tile(r, single, True)["HELD"] for r in (8, 17)] == [1, 0]


def test_scratch_of_the_gradient_of_a_norm(decoded, monkeypatch):
    """In parts of 4-bit weights the law holds."""
    monkeypatch.setattr(lora_product, "SCRATCH", 2 * 45 * 7)
    t = lora(0, 45, 33, 20, torch.float16, form="nf4", nested=True)
    t |= {"dn": torch.linspace(-1, 1, 33), "n": torch.linspace(1, 2, 33), "need": [True, True]}
    error, bound = check_case(
        "dora_norm_bwd", "triton", [t[name] for name in ["dn", "n", *NORM, "need"]]
    )
    assert error <= bound and decoded == [(1, 7 * 45)] * 4 + [(1, 5 * 45)]


def test_dropout_of_nothing():
    """At p = 0 all is kept, whatever the bits of mix say."""
    t = lora(5, 40, 1, 1, torch.bfloat16, p=0.5)
    dropped, rest, bits = call("dora_drop", "triton", [t["x"], t["seed"], 0.0])
    assert torch.equal(dropped, t["x"]) and not rest.any() and (bits == 255).all()
    assert torch.equal(
        call("dora_mix", "triton", [t["x"], t["x"].flip(0), t["bits"], 0.0])[0], t["x"]
    )
