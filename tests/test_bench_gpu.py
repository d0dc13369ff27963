"""peftops bench gpu, with the CPU in the place of the GPU: its stages, its summary, its targets."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from commands import run
from gpu_runs import give_time, run_stages
from peftops.bench import dora, lora, merge, multi, nf4, peers
from peftops.bench.proof import gpu as command
from peftops.bench.proof import stack, stages, whole

import peftops.functional  # noqa: F401  registers the ops
from peftops.nn import LinearNF4, LoRALinear

pytest.importorskip("peft")


def test_a_rehearsal_of_every_stage(capsys, tmp_path, monkeypatch):
    """Runs what a GPU would run, but for what needs a GPU and for the kernels (test_bench_matrix).

    The stages get more time, for two cores that others use too, and one thread: two would wait
    for each other there.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    give_time(monkeypatch, 4, bench=140)
    # bench comes first: otherwise it would take the time that others leave
    only = "bench,build,doctor,sanitizer,layers,models,tma,stack"
    code, out, summary, events = run_stages(capsys, tmp_path, only, "--seconds", "2000")
    assert code == 0, out
    counts = summary["parts"]
    assert set(counts) == set(only.split(","))
    assert all(
        stage["seconds"] > 0 and stage["failed"] == 0 for stage in counts.values()
    )
    assert counts["layers"]["ok"] == 6
    assert counts["sanitizer"]["absent"] == 1
    assert counts["tma"]["ok"] == 10
    assert counts["models"]["ok"] == 3
    assert {"commit", "date", "device", "versions", "failures", "misses"} <= set(
        summary
    )
    assert len(out.splitlines()) < 80
    assert "failed: nothing" in out
    assert "build 280 s" in out.splitlines()[0]
    assert any("vllm (runs on a GPU)" in said for said in summary["absent"])
    assert "bench.jsonl" in out.splitlines()[-1]
    lines = [
        json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()
    ]
    rehearsed_rows = [
        (row, pass_name)
        for row in ("lora", "nf4", "dora", "dora", "dora", "dora", "multi")
        for pass_name in ("forward", "forward + backward")
    ]
    rows = [(line["row"], line["pass"]) for line in lines if line["row"] != "model"]
    assert rows == rehearsed_rows[: max(1, len(rows))]  # until the time is up
    models = [line["layer"] for line in lines if line["row"] == "model"]
    assert models == [plan.name for plan in whole.REHEARSED]
    (steps,) = (event for event in events if event["part"] == "stack")
    assert steps["losses"][-1] < steps["losses"][0]


STAGES = {  # what runs in the place of each stage
    "build": """
import time
print('{"what": "first", "ok": true}', flush=True)
time.sleep(60)
""",
    "doctor": """
import sys
sys.stderr.write('Traceback\\nValueError: out of order\\n')
sys.exit(1)
""",
    "layers": """
print('noise')
print('{"what": "a", "ok": false, "said": "b"}')
""",
    "stack": """print('{"what": "c", "ok": true, "misses": ["d"]}')""",
}


def test_lines_end_before_the_one_that_would_not_fit(monkeypatch):
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr(stages, "time", SimpleNamespace(monotonic=lambda: now.time))

    def lines(*seconds):
        for took in seconds:
            now.time += took
            yield took

    assert list(stages.in_time(lines(30, 5, 5, 5), 49)) == [30, 5, 5]
    now.time = 0.0
    assert list(stages.in_time(lines(40, 5), 50)) == [40, 5]
    now.time = 0.0
    assert list(stages.in_time(lines(1, 1), 3)) == [1]


def test_a_stage_that_hangs_or_dies_stops_no_other(capsys, tmp_path, monkeypatch):
    def python(self, stage, seconds):
        return [sys.executable, "-c", STAGES[stage]]

    monkeypatch.setattr(command.Runner, "command", python)
    monkeypatch.setattr(command, "STAGES", {stage: (2, stage) for stage in STAGES})
    only = ",".join(STAGES)
    code, out, summary, events = run_stages(capsys, tmp_path, only, "--seconds", "8")
    assert code == 1
    event_stages = [event["part"] for event in events]
    assert event_stages == ["build", "build", "doctor", "layers", "stack"]
    assert summary["failures"] == [
        ["build", "time", "stopped after 2 s"],
        ["doctor", "process", "ValueError: out of order"],
        ["layers", "a", "b"],
    ]
    assert "failed: 3" in out
    assert "misses its target: 1\n  d" in out
    assert "Traceback\nValueError" in (tmp_path / "failures.txt").read_text()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_run_that_is_stopped_takes_its_stage_along(capsys, tmp_path, monkeypatch):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    started = []

    def python(self, stage, seconds):
        return [sys.executable, "-c", code]

    def stop(self, stage, line):
        started.append(int(line))
        raise KeyboardInterrupt

    monkeypatch.setattr(command.Runner, "command", python)
    monkeypatch.setattr(command.Runner, "take", stop)
    argv = ["--device", "cpu", "--only", "bench", "--out", str(tmp_path)]
    assert run(capsys, "bench", "gpu", *argv)[0] == 130
    with pytest.raises(ProcessLookupError):
        os.killpg(*started, 0)
    assert not list(tmp_path.iterdir())


def test_a_killed_stage_takes_its_children_along():
    child = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    code = f"import subprocess, sys; subprocess.Popen({child}).wait()"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    time.sleep(0.5)
    command.kill(process)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_the_table_stays_short(tmp_path):
    runner = command.Runner(
        SimpleNamespace(out=tmp_path, device="cpu"), {"device": "d", "commit": "c"}
    )
    for stage in command.STAGES:
        runner.stages[stage] = {"ok": 1, "failed": 90, "absent": 0, "seconds": 1.0}
        for i in range(90):
            what = f"op{i} on triton, bfloat16, (1, 2), plain"
            runner.failures.append([stage, what, "x" * 400])
        for i in range(90):
            what = f"op1 on triton, bfloat16, ({i}, 2), gain"
            runner.failures.append([stage, what, "x" * 400])
        runner.misses += ["m" * 300] * 90
        runner.absent += ["a" * 300] * 90
    lines = list(runner.table(540))
    assert len(lines) <= command.LINES
    assert max(map(len, lines)) <= 240
    assert any("and 90 more like it" in line for line in runner.alike())


def test_the_budget_is_split():
    untuned = [stage for stage in command.STAGES if stage != "tune"]
    assert sum(command.budget(untuned, 540).values()) <= 540
    assert sum(command.budget(list(command.STAGES), 540).values()) <= 545
    assert command.budget(["build"], 540) == {"build": command.STAGES["build"][0]}


def test_targets_are_read_from_graphs_where_there_are_any():
    line = {"layer": "l", "dropout": 0.0, "pass": "forward", "ratio": {"PEFT": 0.9}}
    targets = [
        ("l", 0.0, "forward", "PEFT", 0.5),
        ("l", 0.1, "forward", "PEFT", 0.5),
        ("l", 0.0, "forward", "frozen", 1),
    ]
    case = "l, p = 0.0, forward"
    misses = list(stages.misses(line, targets))
    assert misses == [f"{case}: 0.90 × PEFT's time, target 0.50"]
    timed = line | {"ms": {"peftops": [0.02] * 3}, "graph_ms": {"peftops": [0.016] * 3}}
    misses = list(stages.misses(timed, [("l", 0.0, "forward", peers.MICROSECONDS, 15)]))
    assert misses == [f"{case}: 16.0 µs, target 15 on an H200"]
    assert (
        list(stages.misses(timed, [("l", 0.0, "forward", peers.MICROSECONDS, 30)]))
        == []
    )
    in_graphs = line | {"graph_ratio": {"PEFT": 0.4, "frozen": 1.2}}
    misses = list(stages.misses(in_graphs, targets))
    assert misses == [f"{case}: 1.20 × frozen's time, target 1.00"]


def test_targets_are_of_layers_that_are_measured():
    gpu = torch.device("cuda")
    norms = {(f"{n} × {k}, r = {r}", 0.0) for n, k in dora.NORMS for r in dora.RANKS}
    for row in (lora, nf4, dora, multi, merge):
        o = SimpleNamespace(
            dropout=None, shape=None, quick=True, layers=row.layers(gpu)
        )
        measured = {
            (name, problem.p) for name, problem in row.jobs(o, torch.bfloat16, gpu)
        }
        if row is dora:
            measured |= norms
        assert {target[:2] for target in row.TARGETS} <= measured
        for *_, unit, _ in row.TARGETS:
            assert unit in {*peers.BUILDERS, peers.MICROSECONDS}


def test_the_stack_is_an_8b_model():
    layers = list(stack.Block(stack.LARGE, "meta").children())
    for layer in layers:
        assert type(layer) is LoRALinear
        assert type(layer.base_layer) is LinearNF4
    weights = stack.LARGE.layers * sum(
        math.prod(layer.base_layer.shape) for layer in layers
    )
    assert weights == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert weights > 6.9e9
