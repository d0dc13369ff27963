"""A test of the tests: each of these bugs is planted in the kernels, and a run must notice it.

`pytest -m slow` runs them.
"""

import shutil

import pytest

from . import build
from .bugs import BUGS
from .test_emulator import sanitized

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.missing() is not None, reason=str(build.missing())),
]

LAW = """
import sys
import torch
from cuda_on_cpu import build
from cuda_on_cpu.test_emulator import SCHEDULES
from cuda_on_cpu.test_kernels import (
    DTYPES, MULTI_SHAPES, NF4_PLANS, NORM_SHAPES, PLANS, cases,
)
from peftops.testing.cases import CASES
from peftops.testing.law import call, check_case
import peftops.functional

torch.use_deterministic_algorithms(True, warn_only=True)
emulator = build.opened({library!r})
noticer = {noticer!r}
build.serve(emulator)
shapes = {{
    "dense": PLANS, "nf4": NF4_PLANS, "norm": NORM_SHAPES, "multi": MULTI_SHAPES,
}}
ops = {{"norm": "dora_norm", "multi": "multi_gemv"}}

for schedule in SCHEDULES if noticer == "plain" else SCHEDULES[:1]:
    emulator.schedule(*schedule)
    for dtype in DTYPES if noticer != "thread" else DTYPES[1:]:
        for form in {forms!r}:
            for shape in shapes[form]:
                for label, args in cases(shape, dtype, form):
                    error, bound = check_case(ops.get(form, "lora_gemv"), "cuda", args)
                    if not error <= bound:
                        sys.exit(f"unlawful: {{schedule}}, {{shape}}, {{dtype}}, {{label}}")
        if "nf4" not in {forms!r}:
            continue
        for op in ("nf4_quantize", "nf4_dequantize"):
            for label, args in CASES[op]((0, 9001, 1, 0), dtype):
                ours = call(op, "cuda", args)
                if not all(map(torch.equal, ours, call(op, "reference", args))):
                    sys.exit(f"unlike the reference: {{schedule}}, {{dtype}}, {{label}}")
if emulator.counts()["conflicts"]:
    sys.exit("conflicts")
"""
NOTICED = {  # what each run says when it notices a bug
    "plain": "",
    "conflicts": "conflicts",
    "address": "AddressSanitizer",
    "thread": "ThreadSanitizer: data race",
}


def run(folder, noticer, *forms):
    """Holds the kernels in a folder to the law in a process of its own."""
    sanitizer = noticer if noticer in ("address", "thread") else ""
    library = build.link(sanitizer=sanitizer, include=folder)
    code = LAW.format(library=str(library), noticer=noticer, forms=forms)
    return sanitized(sanitizer, code)


@pytest.mark.parametrize("noticer", NOTICED)
def test_the_kernels_as_they_are(noticer):
    done = run(build.KERNELS, noticer, "dense", "nf4", "norm", "multi")
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug, tmp_path):
    file, right, wrong, noticer = BUGS[bug]
    folder = shutil.copytree(build.KERNELS.parent, tmp_path / "csrc") / "cuda"
    text = (folder / file).read_text()
    assert text.count(right) == 1
    (folder / file).write_text(text.replace(right, wrong))
    form = "dense"
    if "dora" in file:
        form = "norm"
    elif "nf4" in file:
        form = "nf4"
    elif "mixed rows" in bug:
        form = "multi"
    done = run(folder, noticer, form)
    errors = done.stderr.strip().splitlines() or [""]
    report = next((line for line in errors if "Sanitizer" in line), errors[-1])
    print(f"{bug}: {report[:160]}")
    assert done.returncode and NOTICED[noticer] in done.stderr, done.stderr[-3000:]
