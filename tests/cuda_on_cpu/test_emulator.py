"""The emulator computes what a GPU computes, and notices mistakes that a GPU may let pass."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from law import error

from . import build
from .translate import Unknown, translate

pytestmark = pytest.mark.skipif(
    build.missing() is not None, reason=str(build.missing())
)
HERE = Path(__file__).parent
SCHEDULES = [
    (order, lazy)
    for order in ("forward", "reverse", "random")
    for lazy in (True, False)
]


@pytest.fixture(scope="module")
def module():
    return build.load([HERE / "semantics.cu"], module=HERE / "semantics.cpp")


@pytest.fixture
def ask(module):
    """Runs a kernel of semantics.cu and returns `out`, NaN where the kernel wrote nothing."""

    def run(kernel, values=(), bits=(), n=0, size=256, blocks=1, threads=32, out=None):
        out = torch.full((size,), float("nan")) if out is None else out
        values = torch.as_tensor(values, dtype=torch.float32)
        words = torch.from_numpy(
            numpy.asarray(bits, dtype=numpy.uint32).view(numpy.int32)
        )
        module.ask(
            kernel,
            out.data_ptr(),
            values.data_ptr(),
            words.data_ptr(),
            n,
            blocks,
            threads,
        )
        module.finish()
        return out

    yield run
    module.schedule("forward", True)


def words(out):
    return out.numpy().view(numpy.uint32)


LANES = torch.arange(32)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_shuffles_and_votes(module, ask, schedule):
    module.schedule(*schedule)
    values = torch.randn(32)
    out = ask("shuffles", values, n=31).view(8, 32)
    assert torch.equal(out[0], values[LANES ^ 5])
    assert torch.equal(out[1], values[torch.where(LANES + 3 < 32, LANES + 3, LANES)])
    assert torch.equal(out[2], values[torch.where(LANES % 8 >= 3, LANES - 3, LANES)])
    assert torch.equal(out[3], values[LANES * 7 % 32])
    assert (out[4] == float(sum(1 << int(i) for i in LANES if values[i] > 0))).all()
    assert (out[5] == 1).all() and (out[6] == 31 * 16 + 31).all()


def test_bits(ask):
    pairs = torch.randint(2**32, (32, 2)).numpy()
    out = words(ask("bits", bits=pairs.flatten(), size=320)).reshape(32, 10)
    for (a, b), row in zip(pairs.tolist(), out.tolist(), strict=True):
        signed_a = a - (a >> 31 << 32)
        signed_b = b - (b >> 31 << 32)
        bytes_of = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        mask = (2**6 - 1) << 11
        quotient = -((a % 1000) // 7)
        assert row == [
            a & b | a * b % 2**32,
            int.from_bytes(bytes(bytes_of[i] for i in (0, 4, 1, 5)), "little"),
            (b << 7 | a >> 25) % 2**32,
            a.bit_count() * 64 + 32 - b.bit_length(),
            int(f"{a:032b}"[::-1], 2),
            a * b >> 32,
            a >> 5 & 2**9 - 1,
            b & ~mask | a << 11 & mask,
            ((signed_a >> 3) + (signed_a * signed_b >> 32)) % 2**32,
            (quotient + (b > 2e9)) % 2**32,
        ]


def test_roundings(ask):
    values = torch.randn(32) * 100
    values[0] = 65519.99  # the largest that is not infinite in half precision
    out = ask("roundings", values).view(8, 32)
    assert torch.equal(out[0], values.half().float()) and torch.equal(
        out[1], values.bfloat16().float()
    )
    half = values.half().double()
    assert torch.equal(out[2], (half * 2 + 0.5).half().float()) and torch.equal(
        out[3], (half + 3).half().float()
    )
    assert torch.equal(out[4], values.round() + values.floor() + values.trunc())
    wide = values.double()
    exact = wide.abs().sqrt() + wide.clamp_min(0) + (wide.abs() + 1).rsqrt() + 1 / wide
    assert error(out[5], exact) <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize("kernel, threads", [("barriers", 256), ("warps", 32)])
def test_a_missing_barrier_shows_in_some_order(module, ask, kernel, threads):
    values = torch.randn(threads)
    is_right = {False: [], True: []}
    for schedule in SCHEDULES:
        module.schedule(*schedule)
        for has_barrier, outcomes in is_right.items():
            out = ask(kernel, values, n=has_barrier, size=threads, threads=threads)
            outcomes.append(torch.equal(out, values.flip(0)))
    assert all(is_right[True])
    assert not any(is_right[False])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_atomics(module, ask, schedule):
    module.schedule(*schedule)
    out = ask("atomics", blocks=3, threads=64, out=torch.zeros(4))
    assert out[0] == 192 and words(out)[1] == 192 * 191 // 2 and words(out)[2] == 191
    assert 1 <= words(out)[3] <= 192


def test_copies_arrive_at_the_wait(module, ask):
    values = torch.randn(32, 4)
    expected = values.clone()
    expected[3::4, 2:] = 0
    for lazy in (True, False):
        module.schedule("forward", lazy)
        assert torch.equal(
            ask("copies", values, n=1, size=128).view(32, 4), expected.flip(0)
        )
        forgotten = ask("copies", values, n=0, size=128)
        if lazy:
            assert forgotten.isnan().all()
        else:
            assert torch.equal(forgotten.view(32, 4), expected.flip(0))


def test_overlapping_launches(module, ask):
    values = torch.randn(32)
    for lazy in (True, False):
        module.schedule("forward", lazy)
        assert torch.equal(
            ask("overlapping", values, n=1, size=64).view(2, 32)[1], values
        )
        assert ask("overlapping", values, n=0, size=64)[32:].isnan().all() == lazy


def layout(factor):
    """{(lane, i): (row, column)} of the elements of a, b or c that a lane holds.

    This is written as in the PTX ISA's chapter on mma.m16n8k16 with 16-bit types.
    """
    places = {}
    for lane in range(32):
        group = lane >> 2
        inside = lane % 4
        for i in range({"a": 8, "b": 4, "c": 4}[factor]):
            pair = inside * 2 + (i & 1)
            if factor == "a":
                row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
                column = pair if i < 4 else pair + 8
            elif factor == "b":
                row = pair if i < 2 else pair + 8
                column = group
            else:
                row = group if i < 2 else group + 8
                column = pair
            places[lane, i] = row, column
    return places


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tensor_core_layout_is_the_manuals(ask, dtype):
    a = torch.randn(16, 16).to(dtype)
    b = torch.randn(16, 8).to(dtype)
    c = torch.randn(16, 8)
    halves = {
        "a": numpy.zeros((32, 8), numpy.uint16),
        "b": numpy.zeros((32, 4), numpy.uint16),
    }
    for factor, matrix in (("a", a), ("b", b)):
        for (lane, i), place in layout(factor).items():
            halves[factor][lane, i] = matrix[place].view(torch.int16).item() & 0xFFFF
    held = torch.empty(32, 4)
    for (lane, i), place in layout("c").items():
        held[lane, i] = c[place]
    bits = numpy.concatenate(
        [halves["a"].view(numpy.uint32).ravel(), halves["b"].view(numpy.uint32).ravel()]
    )
    out = ask(
        f"product_{'bf16' if dtype is torch.bfloat16 else 'f16'}", held, bits, size=128
    ).view(32, 4)
    exact = a.double() @ b.double() + c.double()
    for (lane, i), place in layout("c").items():
        assert abs(out[lane, i].item() - exact[place].item()) < 1e-5


def test_layouts_agree_with_cute():
    """NVIDIA's own layouts give the same bits. Needs `pip install --no-deps nvidia-cutlass`."""
    cutlass = (
        Path(pytest.importorskip("cutlass_library").__file__).parent
        / "source"
        / "include"
    )
    cute = build.load(
        [HERE / "cute.cu"], module=HERE / "semantics.cpp", include=cutlass
    )
    a, b = (torch.randint(-8, 8, shape).bfloat16() for shape in ((64, 64), (32, 64)))
    out = torch.full((64, 32), float("nan"))
    cute.counts()
    cute.ask("", out.data_ptr(), a.data_ptr(), b.data_ptr(), 0, 0, 0)
    cute.finish()
    assert torch.equal(out, a.float() @ b.float().T)
    counts = cute.counts()
    assert counts["mma"] == 64 and counts["matrices"] > 0 and counts["conflicts"] == 0


@pytest.mark.parametrize("stride, conflicts", [(4, 0), (8, 4)])
def test_matrices_and_the_banks_they_lie_in(module, ask, stride, conflicts):
    rows = torch.randint(2**31, (32, 4)).numpy().astype(numpy.uint32)
    module.counts()
    out = words(ask("matrices", bits=rows.ravel(), n=stride, size=128)).reshape(32, 4)
    for lane in range(32):
        for matrix in range(4):
            assert out[lane, matrix] == rows[8 * matrix + lane // 4, lane % 4]
    assert module.counts()["conflicts"] == conflicts


@pytest.mark.parametrize(
    "kernel, words",
    [
        ("divergent", "wait for others that do not come: thread"),
        ("half_a_mask", "a lane outside of its own mask at semantics.cu"),
        ("misaligned", "is no multiple of 16 at semantics.cu"),
        ("nowhere", "an address of another space, or of none, at semantics.cu"),
    ],
)
def test_faults_are_named_with_their_line(ask, kernel, words):
    with pytest.raises(RuntimeError, match=words):
        ask(kernel, torch.randn(64), n=64)


PTX = """
.version 9.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 k_param_0)
{
  .reg .b32 %r<3>;
  STATEMENT;
  ret;
}
"""


@pytest.mark.parametrize(
    "statement",
    [
        "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%r1}, %r1, %r2, %r1, 1, 1",
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%r1}, %r1, %r2, %r1, 1, 1, 0, 0",
        "mbarrier.arrive.noComplete.shared.b64 %r1, [%r2], 1",
        "barrier.cluster.arrive.aligned",
        "add.sat.s32 %r1, %r2, %r2",
        "fma.rn.ftz.f32 %r1, %r2, %r2, %r2",
        "ld.global.foo.b32 %r1, [%r2]",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r1}, {%r2}, {%r2}",
        "cp.async.bulk.prefetch.L2.global [%r1], 16",
    ],
)
def test_an_unknown_instruction_stops_with_its_text(statement):
    assert "K_k" in translate(PTX.replace("STATEMENT", "add.s32 %r1, %r2, 1"))
    with pytest.raises(Unknown, match=statement.split()[0].replace(".", r"\.")):
        translate(PTX.replace("STATEMENT", statement))


def sanitized(sanitizer, code):
    """Runs code in a process of its own, in which the sanitizer's runtime is loaded first."""
    runtime = {"address": "libasan.so", "thread": "libtsan.so", "": ""}[sanitizer]
    if runtime:
        command = ["g++", f"-print-file-name={runtime}"]
        runtime = subprocess.check_output(command, text=True).strip()
    environment = {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    code = f"import sys; sys.path.insert(0, {str(HERE.parent)!r})\n" + code
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )


ASK = """
import torch
from cuda_on_cpu import build
module = build.opened({library!r})
out, values = torch.zeros(256), torch.randn(256)
module.ask("{kernel}", out.data_ptr(), values.data_ptr(), 0, {n}, 1, {threads})
module.finish()
print("ran")
"""


@pytest.mark.parametrize(
    "sanitizer, kernel, n, threads, report",
    [
        ("address", "barriers", 1, 256, None),
        ("address", "past_the_end", 0, 32, "AddressSanitizer: use-after-poison"),
        ("thread", "barriers", 1, 256, None),
        ("thread", "barriers", 0, 256, "ThreadSanitizer: data race"),
        ("thread", "warps", 1, 32, None),
        ("thread", "warps", 0, 32, "ThreadSanitizer: data race"),
    ],
)
def test_sanitizers(sanitizer, kernel, n, threads, report):
    library = str(
        build.link([HERE / "semantics.cu"], sanitizer, HERE / "semantics.cpp")
    )
    done = sanitized(
        sanitizer, ASK.format(library=library, kernel=kernel, n=n, threads=threads)
    )
    if report:
        assert report in done.stderr and "semantics.cu" in done.stderr, done.stderr[
            -3000:
        ]
    else:
        assert (
            done.returncode == 0
            and done.stdout == "ran\n"
            and "Sanitizer" not in done.stderr
        ), done.stderr[-3000:]
