"""The project's CUDA kernels on the CPU, under every schedule and under the sanitizers.

test_ops.py holds them to the law, too.
"""

import pytest
import torch

import peftops.functional  # noqa: F401  registers the ops
from peftops.cuda import lora, nf4
from peftops.testing.cases import CASES, NORM
from peftops.testing.cases import lora as tensors
from peftops.testing.law import call, check, check_case

from . import build
from .test_emulator import SCHEDULES, sanitized

pytestmark = pytest.mark.skipif(
    build.missing() is not None, reason=str(build.missing())
)
# float16 runs the same code as bfloat16; test_ops.py holds it to the law.
DTYPES = [torch.float32, torch.bfloat16]
# What runs for (m, k, n, r) on a GPU of four multiprocessors. One shape has several tiles of rows.
PLANS = {
    (1, 72, 200, 5): "one launch",
    (3, 1072, 40, 12): "two launches",
    (5, 264, 100, 2): "one launch",
    (9, 400, 520, 16): "one launch",
    (33, 136, 40, 24): "two launches",
    (80, 264, 72, 16): "two launches",
}
# The same for a 4-bit base. There are more tiles of k than stages, and the last tile is not full.
NF4_PLANS = {
    (1, 1824, 40, 5): "two launches",
    (5, 1088, 460, 3): "two launches",
    (20, 576, 140, 8): "two launches",
    (17, 544, 40, 0): "one launch",
    (64, 448, 140, 4): "two launches",
    (50, 416, 72, 0): "one launch",
    (3, 72, 40, 2): "dequantize + cuBLAS",
    (66, 64, 40, 2): "dequantize + cuBLAS",
}
# In the first shape b stays in registers. In the second b streams through shared memory. In the
# others no tensor cores are used. Some blocks have more tiles than stages.
NORM_SHAPES = [
    (1, 1040, 260, 20),
    (1, 528, 132, 140),
    (1, 133, 70, 20),
    (1, 144, 36, 0),
]
# One row, few rows, a tile of many, and rows in two and in three words of 32 bits.
MULTI_SHAPES = [
    (1, 72, 40, 5),
    (3, 1056, 40, 12),
    (9, 416, 100, 16),
    (40, 160, 40, 4),
    (70, 40, 24, 3),
]


def cases(shape, dtype, form="nf4"):
    """The cases of 4-bit bases (form "nf4"), or all other cases; of the row that the form names."""
    if form == "multi":
        return list(CASES["multi_gemv"](shape, dtype))
    if form == "norm":
        return list(CASES["dora_norm"](shape, dtype))
    wanted = form == "nf4"
    return [
        (label, args)
        for label, args in CASES["lora_gemv"](shape, dtype)
        if label.startswith("nf4") == wanted
    ]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_law_under_every_schedule(cuda_on_cpu, schedule):
    cuda_on_cpu.schedule(*schedule)
    for shape in PLANS:
        for dtype in DTYPES:
            for label, args in cases(shape, dtype, "dense"):
                error, bound = check_case("lora_gemv", "cuda", args)
                assert error <= bound, (shape, dtype, label)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_law_of_4_bit_bases_under_every_schedule(cuda_on_cpu, schedule):
    cuda_on_cpu.schedule(*schedule)
    for shape in NF4_PLANS:
        for dtype in DTYPES:
            for label, args in cases(shape, dtype):
                error, bound = check_case("lora_gemv", "cuda", args)
                assert error <= bound, (shape, dtype, label)


def test_the_plan_of_each_shape(cuda_on_cpu):
    def described(dtype, *sizes, form="dense"):
        return lora.describe("lora_gemv", torch.empty(0, dtype=dtype), *sizes, form)

    for (m, k, n, r), wanted in PLANS.items():
        assert described(torch.bfloat16, m, n, k, r) == wanted
    for (m, k, n, r), wanted in NF4_PLANS.items():
        assert described(torch.bfloat16, m, n, k, r, form="nf4") == wanted
    assert described(torch.float32, 4, 100, 64, 2, form="nf4") == "two launches"
    assert described(torch.float32, 5, 100, 64, 2, form="nf4") == "dequantize + cuBLAS"
    assert described(torch.float16, 1, 100, 264, 0) == "one launch"
    assert described(torch.float32, 5, 100, 264, 2) == "cuBLAS + epilogue"
    assert described(torch.float16, 1, 100, 261, 2) == "cuBLAS + epilogue"
    assert (
        described(torch.float16, 1, 100, 264, 2, form="transposed")
        == "cuBLAS + epilogue"
    )
    assert described(torch.float16, 1, 100, 264, 2, form="given") == "epilogue"


def test_many_of_the_few_rows_run_on_tensor_cores(cuda_on_cpu):
    for m, dtype, wanted in (
        (4, torch.bfloat16, False),
        (5, torch.bfloat16, True),
        (5, torch.float32, False),
    ):
        _, args = next(CASES["lora_gemv"]((m, 264, 100, 2), dtype))
        cuda_on_cpu.counts()
        call("lora_gemv", "cuda", args)
        counts = cuda_on_cpu.counts()
        assert (counts["mma"] > 0) == wanted and counts["conflicts"] == 0


def test_4_bit_bases_meet_16_bits_on_tensor_cores(cuda_on_cpu):
    for m, dtype, wanted in (
        (1, torch.bfloat16, True),
        (33, torch.float16, True),
        (4, torch.float32, False),
    ):
        for _, args in cases((m, 288, 72, 2), dtype):
            cuda_on_cpu.counts()
            call("lora_gemv", "cuda", args)
            counts = cuda_on_cpu.counts()
            assert (counts["mma"] > 0) == wanted and counts["launches"] == 2


def test_a_base_larger_than_the_scratch_is_decoded_in_parts(cuda_on_cpu, monkeypatch):
    for scratch, launches in ((72 * 4 * 20, 3), (72 * 4 * 3, 14), (1, 40)):
        monkeypatch.setattr(lora, "SCRATCH", scratch)
        for label, args in cases((3, 72, 40, 2), torch.float32):
            cuda_on_cpu.counts()
            error, bound = check_case("lora_gemv", "cuda", args)
            assert error <= bound, (scratch, label)
            assert cuda_on_cpu.counts()["launches"] == launches + 2


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, 7, 64, 8192, 9001])
def test_4_bits_are_the_reference_s_bit_for_bit(cuda_on_cpu, size, dtype):
    for op in ("nf4_quantize", "nf4_dequantize"):
        for label, args in CASES[op]((0, size, 1, 0), dtype):
            for ours, wanted in zip(
                call(op, "cuda", args), call(op, "reference", args), strict=True
            ):
                assert torch.equal(ours, wanted), (op, label)


def test_blocks_of_every_size_are_quantized(cuda_on_cpu):
    _, (_, bounds, order, _) = next(CASES["nf4_quantize"]((0, 8, 1, 0), torch.float32))
    w = torch.randn(9001) * torch.randn(9001).exp()
    w[5000], w[7000] = torch.inf, torch.nan
    for block in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        ours, wanted = (
            call("nf4_quantize", name, [w, bounds, order, block])
            for name in ("cuda", "reference")
        )
        assert torch.equal(ours[0], wanted[0]) and torch.equal(
            ours[1].nan_to_num(-1), wanted[1].nan_to_num(-1)
        ), block


def test_any_part_of_a_weight_is_dequantized(cuda_on_cpu):
    for k in (40, 33):
        for label, (codes, table, scales, block, size, dtype) in CASES[
            "nf4_dequantize"
        ]((0, k, 50, 0), torch.bfloat16):
            (whole,) = call(
                "nf4_dequantize",
                "reference",
                [codes, table, scales, block, size, dtype],
            )
            for row, rows, column, columns in (
                (0, 50, 0, k),
                (7, 20, 0, k),
                (8, 9, 16, 16),
                (3, 5, 11, 13),
            ):
                part = torch.empty(rows, columns, dtype=dtype)
                nf4.dequantize_rows(
                    part, [codes, table, *scales], block, k, row, column
                )
                wanted = whole.view(50, k)[row : row + rows, column : column + columns]
                assert torch.equal(part, wanted), (label, k, row, column)


def test_law_in_little_shared_memory(cuda_on_cpu):
    shapes = ((33, 136, 72, 24), (33, 264, 300, 16))
    blocks = []
    hopper, ada = 227 << 10, 99 << 10  # bytes; no tile of 64 rows fits into Ada's
    for limit in (hopper, ada):
        before = cuda_on_cpu.limit_shared(limit)
        cuda_on_cpu.counts()
        try:
            for shape in shapes:
                for label, error, bound in check(
                    "lora_gemv", "cuda", shape, torch.bfloat16
                ):
                    assert error <= bound, (shape, label)
        finally:
            cuda_on_cpu.limit_shared(before)
        blocks.append(cuda_on_cpu.counts()["blocks"])
    assert blocks[1] > blocks[0]


def test_4_bit_bases_need_no_more_shared_memory_than_there_is(cuda_on_cpu):
    before = cuda_on_cpu.limit_shared(99 << 10)
    try:
        for shape in ((1, 544, 460, 2), (20, 160, 140, 2), (64, 160, 140, 2)):
            for label, args in cases(shape, torch.bfloat16):
                error, bound = check_case("lora_gemv", "cuda", args)
                assert error <= bound, (shape, label)
    finally:
        cuda_on_cpu.limit_shared(before)


def test_launches(cuda_on_cpu):
    for shape, wanted in (
        ((1, 72, 200, 5), 1),
        ((3, 1072, 40, 12), 2),
        ((5, 264, 100, 2), 1),
        ((33, 136, 72, 24), 2),
    ):
        _, args = next(CASES["lora_gemv"](shape, torch.bfloat16))
        cuda_on_cpu.counts()
        call("lora_gemv", "cuda", args)
        assert cuda_on_cpu.counts()["launches"] == wanted


@pytest.mark.parametrize(
    "op, form, shapes",
    [
        ("lora_gemv", "dense", PLANS),
        ("lora_gemv", "nf4", NF4_PLANS),
        ("multi_gemv", "multi", MULTI_SHAPES),
        ("dora_norm", "norm", NORM_SHAPES),
    ],
    ids=["lora", "nf4", "multi", "norm"],
)
def test_is_deterministic_whatever_the_order(cuda_on_cpu, op, form, shapes):
    for shape in shapes:
        for label, args in cases(shape, torch.bfloat16, form):
            results = []
            for schedule in (SCHEDULES[0], SCHEDULES[-1]):
                cuda_on_cpu.schedule(*schedule)
                results.append(call(op, "cuda", args)[0])
            assert torch.equal(*results), (shape, label)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_law_of_norms_under_every_schedule(cuda_on_cpu, schedule):
    cuda_on_cpu.schedule(*schedule)
    for shape in NORM_SHAPES:
        for dtype in DTYPES:
            for label, error, bound in check("dora_norm", "cuda", shape, dtype):
                assert error <= bound, (shape, dtype, label)


def test_norms_meet_tensor_cores_where_16_bits_are_read_by_whole_pieces(cuda_on_cpu):
    launches = {
        (1, 1040, 260, 20): 3,
        (1, 528, 132, 140): 3,
        (1, 133, 70, 20): 2,
        (1, 144, 36, 0): 2,
    }
    for shape in NORM_SHAPES:
        for dtype in DTYPES:
            for label, args in CASES["dora_norm"](shape, dtype):
                cuda_on_cpu.counts()
                call("dora_norm", "cuda", args)
                counts = cuda_on_cpu.counts()
                tiled = dtype is torch.bfloat16 and shape[1] % 16 == 0 and shape[3] > 0
                assert (counts["mma"] > 0) == tiled, (shape, dtype, label)
                assert counts["launches"] == (
                    launches[shape] if dtype is torch.bfloat16 else 2
                ), (shape, dtype, label)


def test_norms_where_the_delta_cancels_the_weight(cuda_on_cpu):
    for r, dtype in ((16, torch.bfloat16), (96, torch.float16), (16, torch.float32)):
        a, b = torch.randn(r, 272).to(dtype), torch.randn(40, r).to(dtype)
        w = (-(b.double() @ a.double()) / (1 - 1e-3)).to(dtype)
        args = [w.new_empty(0, 272), [w], a, b, torch.ones(1), "dense", 0]
        error, bound = check_case("dora_norm", "cuda", args)
        assert error <= bound, (r, dtype)


def test_what_is_not_finite_stays_in_its_row(cuda_on_cpu):
    for shape in ((1, 72, 40, 3), (1, 72, 40, 70), (1, 71, 40, 3)):
        for bad in (torch.nan, torch.inf):
            _, args = next(CASES["dora_norm"](shape, torch.bfloat16))
            args[1][0][5, 70], args[3][9, 1] = bad, bad
            ours, wanted = (
                call("dora_norm", name, args)[0] for name in ("cuda", "reference")
            )
            assert torch.equal(ours.isnan(), wanted.isnan()) and torch.equal(
                ours.isinf(), wanted.isinf()
            )
            assert (~ours.isfinite()).nonzero().flatten().tolist() == [5, 9]


def test_norms_of_blocks_of_every_size(cuda_on_cpu):
    shape = (1, 336, 40, 3)
    for block in (32, 128, 512, 4096):
        for nested in (False, True):
            made = tensors(
                *shape, torch.bfloat16, form="nf4", block=block, nested=nested
            )
            error, bound = check_case(
                "dora_norm", "cuda", [made[name] for name in NORM]
            )
            assert error <= bound, (block, nested)


def test_norms_need_no_more_shared_memory_than_there_is(cuda_on_cpu):
    before = cuda_on_cpu.limit_shared(99 << 10)
    try:
        for shape in ((1, 144, 36, 64), (1, 272, 132, 70)):
            for label, error, bound in check(
                "dora_norm", "cuda", shape, torch.bfloat16
            ):
                assert error <= bound, (shape, label)
    finally:
        cuda_on_cpu.limit_shared(before)


def test_errors_are_raised_with_the_name_of_the_op(cuda_on_cpu, monkeypatch):
    # h of 99999 ranks fits into no shared memory.
    monkeypatch.setattr(lora, "describe", lambda *args: "one launch")
    _, args = next(CASES["lora_gemv"]((1, 8, 8, 99999), torch.float32))
    with pytest.raises(
        RuntimeError, match="lora_gemv: CUDA error 1, more shared memory than allowed"
    ):
        call("lora_gemv", "cuda", args)


LAW = """
import torch
from cuda_on_cpu import build
from cuda_on_cpu.test_kernels import MULTI_SHAPES, NF4_PLANS, NORM_SHAPES, PLANS, cases
from peftops.testing.law import check, check_case
import peftops.functional

emulator = build.opened({library!r})
build.serve(emulator)
runs = [("dense", "lora_gemv", PLANS), ("nf4", "lora_gemv", NF4_PLANS)]
runs += [("multi", "multi_gemv", MULTI_SHAPES), ("norm", "dora_norm", NORM_SHAPES)]
for dtype in {dtypes}:
    for form, op, shapes in runs:
        for shape in shapes:
            for label, args in cases(shape, dtype, form):
                if (op, label) in {skipped}:
                    continue
                error, bound = check_case(op, "cuda", args)
                assert error <= bound, (op, shape, dtype, label)
    for op in ("nf4_quantize", "nf4_dequantize"):
        for size in (7, 8192, 9001):
            for label, error, bound in check(op, "cuda", (0, size, 1, 0), dtype):
                assert error <= bound, (op, size, label)
print("lawful")
"""


# Races do not depend on the dtype, nor on what is done with the sum that becomes an element.
SAME_RACES = [("lora_gemv", "gain"), ("multi_gemv", "gain"), ("multi_gemv", "base")]


@pytest.mark.parametrize(
    "sanitizer, dtypes, skipped",
    [("address", DTYPES, []), ("thread", DTYPES[1:], SAME_RACES)],
    ids=["address", "thread"],
)
def test_sanitizers_find_nothing(sanitizer, dtypes, skipped):
    library = str(build.link(sanitizer=sanitizer))
    code = LAW.format(library=library, dtypes=dtypes, skipped=skipped)
    done = sanitized(sanitizer, code)
    assert done.returncode == 0 and done.stdout == "lawful\n", done.stderr[-3000:]
    assert "Sanitizer" not in done.stderr, done.stderr[-3000:]
