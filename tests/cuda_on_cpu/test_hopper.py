"""Hopper's instructions compute what the manual says, and missing synchronization is noticed."""

import re
from pathlib import Path

import numpy
import pytest
import torch
from law import bound, error

from . import build
from .test_emulator import SCHEDULES

pytestmark = pytest.mark.skipif(
    build.missing() is not None, reason=str(build.missing())
)
HERE = Path(__file__).parent
SOURCES = [HERE / "hopper_semantics.cu", HERE / "hopper_product.cu"]


@pytest.fixture(scope="module")
def module():
    return build.load(SOURCES, module=HERE / "semantics.cpp")


@pytest.fixture
def ask(module):
    """A function that runs a kernel and returns `out`, NaN where it wrote nothing."""

    def run(kernel, a=None, b=None, mistake=1, size=(32,), threads=32, blocks=1):
        out = torch.full(size, float("nan"))
        module.ask(
            kernel,
            out.data_ptr(),
            *(0 if tensor is None else tensor.data_ptr() for tensor in (a, b)),
            mistake,
            blocks,
            threads,
        )
        module.finish()
        return out

    yield run
    module.schedule("forward", True)


RIGHT, WRONG = "right", "wrong"


@pytest.fixture
def judge(module):
    """A function that runs under every schedule and compares the outcomes with what is expected.

    expected: RIGHT, WRONG, or patterns of errors. somewhere: one schedule of this outcome is
    enough.
    """

    def compare(run, is_right, *expected, somewhere=False):
        outcomes = {}
        for schedule in SCHEDULES:
            module.schedule(*schedule)
            try:
                outcomes[schedule] = RIGHT if is_right(run()) else WRONG
            except RuntimeError as raised:
                outcomes[schedule] = str(raised)
        hits = [
            any(re.search(pattern, outcome) for pattern in expected)
            for outcome in outcomes.values()
        ]
        assert any(hits) if somewhere else all(hits), outcomes

    return compare


@pytest.mark.parametrize(
    "mistake, expected",
    [
        (1, [RIGHT]),
        (0, [WRONG, "lacks 32 arrivals"]),
        (2, [WRONG]),
        (3, ["lacks 1 arrivals and 0 bytes"]),
    ],
)
def test_an_mbarrier_has_phases(judge, ask, mistake, expected):
    values = torch.randn(32)
    rounds = torch.stack([values.flip(0) + number for number in range(5)])

    def run():
        return ask("phases", values, mistake=mistake, size=(5, 32), threads=64)

    judge(run, lambda out: torch.equal(out, rounds), *expected, somewhere=mistake == 2)


def test_an_mbarrier_is_asked_and_made_anew(ask):
    assert ask("tries", size=(5,), threads=1).tolist() == [0, 1, 1, 0, 0]
    with pytest.raises(RuntimeError, match="an mbarrier that nobody made at hopper_"):
        ask("tries", mistake=0, threads=1)


@pytest.mark.parametrize(
    "mistake, expected",
    [(1, RIGHT), (0, WRONG), (2, WRONG), (3, "count those who meet differently")],
)
def test_a_part_of_a_block_meets(judge, ask, mistake, expected):
    values = torch.randn(64)
    swapped = torch.cat([values.flip(0), values[:32] + values[32:]])

    def run():
        return ask("named", values, mistake=mistake, size=(96,), threads=96)

    judge(
        run,
        lambda out: torch.equal(out, swapped),
        expected,
        somewhere=expected == WRONG,
    )


def box(matrix, column, row, width, height):
    """A box of a matrix, zero outside of it."""
    padded = numpy.zeros((height, width), matrix.dtype)
    for i in range(height):
        for j in range(width):
            if 0 <= row + i < matrix.shape[0] and 0 <= column + j < matrix.shape[1]:
                padded[i, j] = matrix[row + i, column + j]
    return padded


def swizzled(tile):
    """A tile of 128-byte rows as it lies in shared memory, in chunks of 16 bytes.

    Chunk c of row r lies at chunk c ^ (r & 7).
    """
    chunks = tile.view(numpy.uint8).reshape(len(tile), 8, 16)
    in_memory = numpy.empty_like(chunks)
    for row in range(len(tile)):
        for chunk in range(8):
            in_memory[row, chunk ^ (row & 7)] = chunks[row, chunk]
    return in_memory


@pytest.mark.parametrize(
    "mistake, expected",
    [
        (1, RIGHT),
        (0, "a tile that nobody waits for, fetched at hopper_"),
        (2, "more bytes come to an mbarrier than it expects at hopper_"),
        (3, "at hopper_ptx.cuh:.* lacks 0 arrivals and 128 bytes"),
        (4, "a tile that does not start at a multiple of 1024 at hopper_"),
        (5, "an mbarrier that nobody made at hopper_"),
        (6, "a tensor map that nobody encoded at hopper_"),
        (7, "more arrive at an mbarrier than it expects at hopper_|lacks 1 arrivals"),
    ],
)
def test_tiles_come_swizzled_and_zero_outside(judge, ask, mistake, expected):
    wide, plain = torch.randn(20, 72).bfloat16(), torch.randn(10, 20)
    bits = wide.view(torch.int16).numpy()
    tiles = [swizzled(box(bits, *start, 64, 16)) for start in ((40, 12), (-8, -3))]
    tiles.append(box(plain.numpy(), 8, 4, 16, 8))
    expected_bytes = b"".join(tile.tobytes() for tile in tiles)

    def run():
        return ask("tiles", plain, wide, mistake=mistake, size=(1152,))

    judge(
        run,
        lambda out: out.numpy().tobytes() == expected_bytes,
        expected,
        somewhere=mistake == 0,
    )


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_tiles_leave_and_stay_inside(module, ask, schedule):
    module.schedule(*schedule)
    rows = torch.randn(8, 32)
    out = ask("stores", rows, size=(8, 36))
    assert (
        torch.equal(out[2:, 6:], rows[:6, :30])
        and out[:2].isnan().all()
        and out[:, :6].isnan().all()
    )
    if schedule[1]:
        with pytest.raises(
            RuntimeError, match="a store that nobody waits for, issued at hopper_"
        ):
            ask("stores", rows, mistake=0, size=(8, 36))


MAP = {
    "rows": 20,
    "columns": 72,
    "pitch": 144,
    "height": 16,
    "width": 64,
    "swizzle": 3,
    "rank": 2,
    "base": 0,
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 3},
        {"pitch": 152},
        {"pitch": 128},
        {"base": 8},
        {"height": 257},
        {"height": 0},
        {"width": 32},
        {"width": 128},
        {"swizzle": 0, "width": 4},
        {"swizzle": 2},
        {"rows": 0},
    ],
    ids=str,
)
def test_a_tensor_map_is_refused(ask, wrong):
    matrix = torch.zeros(32, 72).bfloat16()
    ask("map", torch.tensor([*MAP.values()], dtype=torch.int32), matrix)
    with pytest.raises(RuntimeError):
        ask("map", torch.tensor([*(MAP | wrong).values()], dtype=torch.int32), matrix)


def of_threads(product):
    """What every thread of a warpgroup holds of the sums (64, columns).

    This is written as in the PTX ISA's chapter on wgmma.
    """
    held = torch.empty(128, product.shape[1] // 2)
    for thread in range(128):
        warp, lane = thread // 32, thread % 32
        for i in range(held.shape[1]):
            row = 16 * warp + (lane >> 2) + (8 if i % 4 >= 2 else 0)
            column = 8 * (i // 4) + lane % 4 * 2 + (i & 1)
            held[thread, i] = product[row, column]
    return held


FORMS = [
    "product_bf16",
    "product_f16",
    "product_transposed_a",
    "product_transposed_b",
    "product_a_in_registers",
]


def factors(kernel):
    dtype = torch.float16 if "f16" in kernel.split("_") else torch.bfloat16
    return [torch.randint(-8, 9, shape).to(dtype) for shape in ((64, 64), (72, 64))]


@pytest.mark.parametrize("kernel", FORMS)
def test_products_of_a_warpgroup(module, judge, ask, kernel):
    a, b = factors(kernel)
    exact = of_threads(a.float() @ b.float().T)  # of small whole numbers
    module.counts()
    judge(
        lambda: ask(kernel, a, b, size=(128, 36), threads=128),
        lambda out: torch.equal(out, exact),
        RIGHT,
    )
    assert module.counts()["wgmma"] == 4 * len(SCHEDULES)


@pytest.mark.parametrize(
    "mistake, threads, expected",
    [
        (0, 128, "a product that nobody waits for, issued at hopper_"),
        (3, 128, WRONG),
        (4, 128, "a descriptor of another swizzle than 128 bytes at hopper_"),
        (5, 128, "warps of a warpgroup multiply differently at hopper_"),
        (6, 128, WRONG),
        (7, 128, "a tile that does not start at a multiple of 1024 at hopper_"),
        (8, 128, WRONG),
        (9, 96, "a warpgroup of fewer than four warps at hopper_"),
        (10, 128, RIGHT),
    ],
)
def test_mistakes_with_products(judge, ask, mistake, threads, expected):
    a, b = factors("product_bf16")
    exact = of_threads(a.float() @ b.float().T)

    def run():
        return ask(
            "product_bf16", a, b, mistake=mistake, size=(128, 36), threads=threads
        )

    judge(
        run,
        lambda out: torch.equal(out, exact),
        expected,
        somewhere=mistake in (0, 6, 8),
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_products_agree_with_cute(transposed):
    """NVIDIA's own swizzles and descriptors give the same bits.

    Needs `pip install --no-deps nvidia-cutlass`.
    """
    cutlass = (
        Path(pytest.importorskip("cutlass_library").__file__).parent
        / "source"
        / "include"
    )
    cute = build.load(
        [HERE / "cute_hopper.cu"], module=HERE / "semantics.cpp", include=cutlass
    )
    a, b = (torch.randint(-8, 8, shape).bfloat16() for shape in ((64, 64), (128, 64)))
    out = torch.full((64, 128), float("nan"))
    cute.ask("", out.data_ptr(), a.data_ptr(), b.data_ptr(), transposed, 0, 0)
    cute.finish()
    assert torch.equal(out, a.float() @ b.float().T)
    assert cute.counts()["wgmma"] == 4


@pytest.mark.parametrize("kernel", ["pipeline", "pipeline_transposed"])
@pytest.mark.parametrize(
    "mistake, expected",
    [
        (1, [RIGHT]),
        (0, [WRONG, "a product that nobody waits for"]),
        (2, [WRONG]),
        (3, ["more bytes come"]),
        (4, ["lacks 1 arrivals"]),
        (5, [WRONG]),
        (6, [WRONG, "a tile that nobody waits for"]),
        (7, [WRONG, "comes when the phase of its mbarrier is over", "more arrive"]),
    ],
)
def test_a_pipeline(judge, ask, kernel, mistake, expected):
    a, b = torch.randn(150, 200).bfloat16(), torch.randn(136, 200).bfloat16()
    given = b.T.contiguous() if kernel == "pipeline_transposed" else b
    exact, same = a.double() @ b.double().T, a.float() @ b.float().T

    def run():
        return ask(kernel, a, given, mistake=mistake, size=(150, 136), blocks=2)

    judge(
        run,
        lambda out: error(out, exact) <= bound(same, exact),
        *expected,
        somewhere=mistake in (0, 2, 6, 7),
    )
