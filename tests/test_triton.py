"""What the law, whose shapes are small, does not reach."""

from itertools import islice

import numpy
import pytest
import torch
import triton
import triton.language as tl
from peftops.bench.law import check

import peftops.functional  # noqa: F401  registers the ops
from peftops.triton import _gemm, _tile, lora_gemv

MANY = (290, 40, 40, 3)  # more rows of tiles than are walked together, and a part of such a group


def h200(device):
    return "sm_90", 132


def assert_law(op, shape, dtype, cases=None):
    for label, error, bound in islice(check(op, "triton", shape, dtype), cases):
        assert error <= bound, label


@pytest.mark.parametrize("op", ["lora_fwd", "lora_bwd", "lora_gemv"])
def test_product_by_cublas(op, monkeypatch):
    monkeypatch.setattr(_gemm, "path", lambda *args, **kwargs: "cublas")
    monkeypatch.setattr(lora_gemv, "path", lambda *args: "cublas")
    assert_law(op, (5, 40, 48, 20), torch.bfloat16)


@pytest.mark.parametrize("op", ["lora_fwd", "lora_bwd"])
def test_groups_of_tiles(op):
    assert_law(op, MANY, torch.float16, cases=2)


def test_path(monkeypatch):
    monkeypatch.setattr(_gemm, "machine", h200)
    half, single = torch.empty(0, dtype=torch.bfloat16), torch.empty(0)
    assert [_gemm.path(4096, k, half) for k in (2048, 4096, 4099, 8192)] == ["fused", "fused", "cublas", "cublas"]
    assert _gemm.path(4096, 8192, half, passes=2) == "fused" and _gemm.path(4096, 4096, single) == "cublas"
    few = [lora_gemv.path(1, n, 4096, 16, form, half) for n, form in ((14336, "dense"), (4096, "dense"), (8, "given"))]
    assert few == ["one launch", "two launches", "given"]
    assert lora_gemv.path(1, 14336, 4096, 16, "dense", single) == "cublas"


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
    rows, columns = 2**20 + 16, 2**12  # numpy leaves what is not touched to the operating system
    big = torch.from_numpy(numpy.zeros((rows, columns), dtype=numpy.uint8))
    big[2**20 :] = 7
    out = torch.zeros(16, 32, dtype=torch.uint8)
    copy_kernel[(1,)](out.new_zeros(16, columns), big, 2**20, rows, columns, BM=16, BN=32)
    assert (big[2**20 :, :32] == 8).all() and (big[2**20 :, 32:] == 7).all() and not big[:16].any()


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
