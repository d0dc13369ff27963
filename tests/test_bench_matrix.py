"""The law on every kernel, by workers: a bad case is named, and the other cases still run."""

import time

import pytest
import torch
from gpu_runs import give_time, run_stages
from peftops.bench.proof import matrix, stages

import peftops.functional  # noqa: F401  registers the ops

pytest.importorskip("peft")
CPU = torch.device("cpu")


def test_every_kernel_meets_the_law(capsys, tmp_path, monkeypatch):
    give_time(monkeypatch, 8)
    code, out, summary, events = run_stages(
        capsys, tmp_path, "kernels", "--seconds", "2000"
    )
    assert code == 0, out
    assert summary["parts"]["kernels"]["ok"] == len(events) > 400
    cells = {tuple(event["what"].split(", ")[:2]) for event in events}
    for name in ("cpu", "triton"):
        for dtype in stages.DTYPES:
            assert (f"lora_gemv on {name}", dtype) in cells


BROKEN = """
import os, sys, time
from peftops.bench.proof import matrix
from peftops.testing import law
right = law.check_case
def check_case(op, name, args):
    fault = {fault!r}
    if op == "lora_mask" and name == "cpu" and args[3] == 0.1:
        if fault == "dies":
            os._exit(7)
        if fault == "raises":
            raise RuntimeError("no such luck")
        if fault == "errs":
            return 1.0, 0.5
        if fault == "driver":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return right(op, name, args)
law.check_case = check_case
matrix.work(sys.argv[1])
"""


@pytest.mark.parametrize(
    "fault, said",
    [
        ("dies", "its process died: exit 7"),
        (
            "driver",
            "its process died: RuntimeError: CUDA error: an illegal memory access was encountered",
        ),
        ("raises", "RuntimeError: no such luck"),
        ("errs", "error 1.0e+00, at most 5.0e-01"),
    ],
)
def test_a_bad_case_is_named_and_the_others_go_on(monkeypatch, fault, said):
    monkeypatch.setattr(matrix, "WORKER", BROKEN.format(fault=fault))
    tasks = [
        ("lora_mask", name, "float32", (5, 33, 8, 2)) for name in ("cpu", "triton")
    ]
    events = list(matrix.run_all(tasks, CPU, time.monotonic() + 100))
    assert len(events) == 6
    (bad,) = (event for event in events if not event["ok"])
    assert bad["what"] == "lora_mask on cpu, float32, (5, 33, 8, 2), p=0.1"
    assert bad["said"] == said


def test_what_is_not_reached_in_time_is_said(monkeypatch):
    tasks = [("lora_mask", "cpu", "float32", (5, 33, 8, 2))] * 50
    *_, last = matrix.run_all(tasks, CPU, time.monotonic() + 0.01)
    assert last["absent"]
    assert "of 50 groups ran out of time" in last["said"]
