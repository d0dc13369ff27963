"""peftops bench static: what it counts, and that it refuses each fault that it looks for."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run
from peftops.bench.proof import sass, static, static_cuda
from tree import ROOT

KERNELS = [*(ROOT / "peftops/triton").glob("*.py"), *(ROOT / "csrc/cuda").glob("*.cu")]
GOOD = {
    "registers": 64,
    "shared": 1024,
    "instructions": 200,
    "spilled": 0,
    "mma": 8,
    "wide": 4,
    "fma": 0,
    "waits": 0,
}


def faults(limits, **changes):
    return list(sass.faults(GOOD | changes, limits, 4096))


def names_in(text):
    return set(re.findall(r"(?:def|__global__ void\b.*?) (\w+_kernel)\(", text))


def test_limits_are_read_from_above_the_kernel():
    text = """
# limits: registers 8-64, wide 4-, fma 0
# limits -GAIN: waits 0-1
# limits gfx942: registers 8-300
@triton.jit
def good_kernel(X):
    pass

@triton.jit
def bare_kernel(X):
    pass
"""
    inf = float("inf")
    assert sass.limits(text, "good_kernel", "sm_90") == {
        "registers": (8, 64),
        "wide": (4, inf),
        "fma": (0, 0),
    }
    assert sass.limits(text, "good_kernel", "sm_90", ["GAIN"])["waits"] == (0, 1)
    assert sass.limits(text, "good_kernel", "gfx942")["registers"] == (8, 300)
    assert sass.limits(text, "bare_kernel", "sm_90") is None
    cuda = """// limits: mma 16-
template <int M>
__global__ void __launch_bounds__(256) a_kernel(int x) {"""
    assert sass.limits(cuda, "a_kernel", "sm_80") == {"mma": (16, inf)}


def test_every_kernel_has_limits():
    count = 0
    for path in KERNELS:
        text = path.read_text()
        for name in names_in(text):
            assert sass.limits(text, name, "sm_90"), f"{path.name}: {name}"
            count += 1
    assert count > 12


@pytest.mark.parametrize(
    "limits, changes, words",
    [
        ({"mma": (1, 99)}, {"mma": 0}, "mma 0, allowed 1-99"),
        ({"wide": (1, 99)}, {"wide": 0}, "wide 0, allowed 1-99"),
        ({"fma": (0, 0)}, {"fma": 3}, "fma 3, allowed 0-0"),
        ({"spilled": (0, 16)}, {"spilled": 24}, "spilled 24, allowed 0-16"),
        ({"registers": (8, 128)}, {"registers": 168}, "registers 168, allowed 8-128"),
        ({}, {"shared": 4100}, "shared memory 4100 > 4096 of the target"),
        ({}, {"instructions": 3}, "an empty kernel: 3 instructions"),
        (None, {}, "no limits stand above it"),
    ],
)
def test_each_excess_is_named(limits, changes, words):
    assert faults(limits or {}) == []
    assert faults(limits, **changes) == [words]


def test_slow_variants_need_only_fit_and_exist():
    assert list(sass.faults(GOOD | {"mma": 0}, {"mma": (1, 9)}, 4096, fast=False)) == []
    assert len(list(sass.faults(GOOD | {"shared": 5000}, {}, 4096, fast=False))) == 1


def test_loops_and_their_instructions():
    lines = [
        "MOV",
        "HGMMA",
        "WARPGROUP.DEPBAR",
        "@P0 BRA `(x) 0x10",
        "FFMA",
        "LDL R1",
        "@P1 BRA 0x0",
        "EXIT",
    ]
    addresses = [16 * i for i in range(8)]
    counts = sass.measure(40, 128, 8, addresses, lines)
    assert counts["loop"] == 3 and counts["waits"] == 1
    assert counts["mma"] == 1 and counts["fma"] == 1
    assert counts["spilled"] == 8 and counts["reloads"] == 0  # LDL is in the outer loop
    without_stack = sass.measure(40, 0, 8, addresses[:2], lines[:2])
    assert without_stack["spilled"] == 0  # no instruction uses the stack


def child(code):
    """The output of this code in a process in which Triton does not interpret."""
    command = ["env", "-u", "TRITON_INTERPRET", sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_covering_list_meets_every_feature():
    out = child("""
from peftops.bench.proof import static_triton as s
every, few = s.launches(True), list(s.launches(False))
features = lambda launches: {feature for launch in launches for feature in launch.features()}
assert features(few) == features(every) and len(few) < len(every) / 3
print(len({launch.kernel.__name__ for launch in few}), len({launch.target for launch in few}))
""")
    kernels = set()
    for path in KERNELS:
        if path.suffix == ".py":
            kernels |= names_in(path.read_text())
    assert out.split() == [str(len(kernels)), "7"]


PLANTED = """
import triton
import triton.language as tl

# limits: fma 0
@triton.jit
def decode_kernel(OUT, CODES, TABLE, SCALES, OFFSET, N: tl.constexpr):
    o = tl.arange(0, N)
    codes = tl.load(CODES + o).to(tl.int32)
    tl.store(OUT + o, tl.load(TABLE + codes) * tl.load(SCALES + o) + tl.load(OFFSET))

# limits: mma 1-
@triton.jit
def product_kernel(OUT, A, B, N: tl.constexpr):
    o = tl.arange(0, N)
    at = o[:, None] * N + o[None, :]
    acc = tl.zeros((N, N), tl.float32)
    for i in range(N):
        a = tl.load(A + o * N + i)[:, None].to(tl.float32)
        b = tl.load(B + i * N + o)[None, :].to(tl.float32)
        acc += a * b
    tl.store(OUT + at, acc)

# limits: wide 1-
@triton.jit
def copy_kernel(OUT, A, N: tl.constexpr):
    o = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(OUT + o, tl.load(A + o))
"""


def test_planted_kernels_are_refused(tmp_path):
    """Refuses an FMA in decode, a product without tensor cores, narrow copies, too large a tile."""
    (tmp_path / "planted.py").write_text(PLANTED)
    out = child(f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import planted, triton
from pathlib import Path
from peftops.bench.proof import sass, static_triton as s
from triton.compiler import ASTSource
text = Path(planted.__file__).read_text()
half, single, byte = "*bf16", "*fp32", "*u8"

def ask(kernel, signature, options, aligned=True, shared=99 << 10):
    constants = {{(len(signature),): 128}}
    signature = dict(zip(kernel.arg_names, [*signature, "constexpr"]))
    attributes = {{}}
    if aligned:
        attributes = {{(i,): [["tt.divisibility", 16]] for i in range(len(signature) - 1)}}
    source = ASTSource(kernel, signature, constants, attributes)
    numbers = s.numbers(triton.compile(source, s.TARGETS["sm_90"][2], options), "sm_90")
    limits = sass.limits(text, kernel.__name__, "sm_90")
    print(kernel.__name__, list(sass.faults(numbers, limits, shared)))

decode = [single, byte, single, single, single]
ask(planted.decode_kernel, decode, {{"enable_fp_fusion": True}})
ask(planted.decode_kernel, decode, {{"enable_fp_fusion": False}})
ask(planted.product_kernel, [single, half, half], {{}})
ask(planted.copy_kernel, [single, single], {{"num_warps": 1}}, aligned=False)
ask(planted.copy_kernel, [single, single], {{"num_warps": 1}}, shared=-1)
""").splitlines()
    assert "'fma " in out[0] and out[1] == "decode_kernel []"
    assert "'mma 0, allowed 1-inf'" in out[2] and "'wide 0, allowed 1-inf'" in out[3]
    assert "'shared memory" in out[4] and "wide" not in out[4]


@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")
def test_cuda_kernels_that_spill_are_refused(tmp_path):
    source = tmp_path / "bad.cu"
    source.write_text("""
// limits: registers 1-255
__global__ void __launch_bounds__(1024) greedy_kernel(float* out, const float* in, int n) {
  float held[128];
  for (int i = 0; i < 128; ++i) held[i] = in[i * n + threadIdx.x];
  for (int j = 0; j < n; ++j)
#pragma unroll
    for (int i = 0; i < 128; ++i) held[i] = held[i] * held[(i + 1) % 128] + j;
  for (int i = 0; i < 128; ++i) out[i * n + threadIdx.x] = held[i];
}
template <class T> __global__ void bare_kernel(T* out) {
  out[threadIdx.x] = out[threadIdx.x + 1] * T(3);
}
template __global__ void bare_kernel<float>(float*);
""")
    greedy, bare = sorted(
        static_cuda.rows(source, "90"), key=lambda row: row["kernel"], reverse=True
    )
    assert any(
        "spills, or keeps in local memory" in fault for fault in greedy["faults"]
    )
    assert bare["case"] == "float" and bare["faults"] == ["no limits stand above it"]
    source.write_text("__global__ void broken_kernel( {")
    assert "error" in static_cuda.rows(source, "90")[0]["faults"][0]


@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")
def test_cuda_kernels_of_the_project(capsys, monkeypatch):
    """On one architecture; .ci/run covers all of them, and Triton's kernels."""
    monkeypatch.setattr(static_cuda, "architectures", lambda: ["90"])
    monkeypatch.setattr(static, "triton_rows", lambda *args: [])
    code, out, _ = run(capsys, "bench", "static")
    assert code == 0 and "lora_mma_kernel" in out and "0 beyond their limits" in out


def test_a_fault_fails_the_command(capsys, monkeypatch):
    row = GOOD | dict.fromkeys(("ldsm", "async", "loop", "reloads"), 0)
    row |= {"compiler": "c", "kernel": "k", "target": "t", "case": "", "tile": ""}
    row["faults"] = ["mma 0, allowed 1-9"]
    monkeypatch.setattr(static, "triton_rows", lambda *args: [row])
    monkeypatch.setattr(static, "cuda_tasks", list)
    code, out, _ = run(capsys, "bench", "static", "--jobs", "1")
    assert code == 1 and "k, t, c: mma 0, allowed 1-9" in out
    assert "1 kernels, 1 beyond" in out and "no nvcc" in out


def test_architectures_are_those_of_the_build():
    assert static_cuda.architectures() == ["80", "86", "89", "90", "100", "120"]
