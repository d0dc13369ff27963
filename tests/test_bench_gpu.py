"""peftops bench gpu, with the CPU standing in for the GPU: what it finds, what it survives, what it keeps."""

import json
import math
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from commands import run
from peftops.bench import peers, timing
from peftops.bench.proof import gpu as command
from peftops.bench.proof import layers, matrix, stack, stages, whole

import peftops.functional  # noqa: F401  registers the ops
from peftops.nn import LinearNF4, LoRALinear

pytest.importorskip("peft")
CPU = torch.device("cpu")


def checked(capsys, folder, only, *more):
    code, out, _ = run(
        capsys, "bench", "gpu", "--device", "cpu", "--only", only, "--out", str(folder), *more
    )
    summary = json.loads((folder / "summary.json").read_text())
    events = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return code, out, summary, events


def test_a_rehearsal_of_every_stage(capsys, tmp_path, monkeypatch):
    """As a GPU would run it, but for what only a GPU has, and with time for two cores that others use too; the kernels
    have a test of their own."""
    long = {
        stage: (80 if stage == "bench" else 4 * seconds, what)
        for stage, (seconds, what) in command.STAGES.items()
    }
    monkeypatch.setattr(command, "STAGES", long)
    only = "bench,build,doctor,sanitizer,layers,models,tma,stack"  # else bench would take what others leave of theirs
    code, out, summary, events = checked(capsys, tmp_path, only, "--seconds", "2000")
    assert code == 0, out
    assert set(summary["parts"]) == set(only.split(","))
    assert all(
        counts["seconds"] > 0 and counts["failed"] == 0 for counts in summary["parts"].values()
    )
    assert (
        summary["parts"]["layers"]["ok"] == 6 and summary["parts"]["sanitizer"]["absent"] == 1
    )
    assert summary["parts"]["tma"]["ok"] == 10 and summary["parts"]["models"]["ok"] == 3
    assert {"commit", "date", "device", "versions", "failures", "misses"} <= set(summary)
    assert (
        len(out.splitlines()) < 80
        and "failed: nothing" in out
        and "build 280 s" in out.splitlines()[0]
    )
    lines = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    rows = [
        (row, kind)
        for row in ("lora", "nf4", *["dora"] * 4)
        for kind in ("forward", "forward + backward")
    ]
    layers = [(line["row"], line["pass"]) for line in lines if line["row"] != "model"]
    assert layers == rows[: max(1, len(layers))]  # until the time is up
    assert [line["layer"] for line in lines if line["row"] == "model"] == [
        plan.name for plan in whole.REHEARSED
    ]
    assert (
        any("vllm (runs on a GPU)" in said for said in summary["absent"])
        and "bench.jsonl" in out.splitlines()[-1]
    )
    (steps,) = (event for event in events if event["part"] == "stack")
    assert steps["losses"][-1] < steps["losses"][0]


def test_every_kernel_meets_the_law(capsys, tmp_path):
    code, _, summary, events = checked(capsys, tmp_path, "kernels")
    assert code == 0 and summary["parts"]["kernels"]["ok"] == len(events) > 400
    cells = {tuple(event["what"].split(", ")[:2]) for event in events}
    assert {
        (f"lora_gemv on {name}", dtype) for name in ("cpu", "triton") for dtype in stages.DTYPES
    } <= cells


BROKEN = """
import os, sys, time
from peftops.bench.proof import matrix
from peftops.testing import law
right = law.check_case
def check_case(op, name, args):
    what = {what!r}
    if op == "lora_mask" and name == "cpu" and args[3] == 0.1:
        if what == "dies": os._exit(7)
        if what == "raises": raise RuntimeError("no such luck")
        if what == "errs": return 1.0, 0.5
        if what == "hangs": time.sleep(60)
        if what == "driver": raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return right(op, name, args)
law.check_case = check_case
matrix.work(sys.argv[1])
"""


@pytest.mark.parametrize(
    "what, said",
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
def test_a_bad_case_is_named_and_the_others_go_on(monkeypatch, what, said):
    monkeypatch.setattr(matrix, "WORKER", BROKEN.format(what=what))
    tasks = [("lora_mask", name, "float32", (5, 33, 8, 2)) for name in ("cpu", "triton")]
    events = list(matrix.run_all(tasks, CPU, time.monotonic() + 100))
    assert len(events) == 6
    (bad,) = (event for event in events if not event["ok"])
    assert (
        bad["what"] == "lora_mask on cpu, float32, (5, 33, 8, 2), p=0.1" and bad["said"] == said
    )


def test_what_is_not_reached_in_time_is_said(monkeypatch):
    tasks = [("lora_mask", "cpu", "float32", (5, 33, 8, 2))] * 50
    *_, last = matrix.run_all(tasks, CPU, time.monotonic() + 0.01)
    assert last["absent"] and "of 50 groups ran out of time" in last["said"]


def test_a_stage_that_hangs_or_dies_stops_no_other(capsys, tmp_path, monkeypatch):
    commands = {
        "build": 'import time; print(\'{"what": "first", "ok": true}\', flush=True); time.sleep(60)',
        "doctor": "import sys; sys.stderr.write('Traceback\\nValueError: out of order\\n'); sys.exit(1)",
        "layers": 'print(\'noise\'); print(\'{"what": "a", "ok": false, "said": "b"}\')',
        "stack": 'print(\'{"what": "c", "ok": true, "misses": ["d"]}\')',
    }
    monkeypatch.setattr(
        command.Runner,
        "command",
        lambda self, stage, seconds: [sys.executable, "-c", commands[stage]],
    )
    monkeypatch.setattr(command, "STAGES", {stage: (2, stage) for stage in commands})
    code, out, summary, events = checked(capsys, tmp_path, ",".join(commands), "--seconds", "8")
    assert code == 1 and [event["part"] for event in events] == [
        "build",
        "build",
        "doctor",
        "layers",
        "stack",
    ]
    assert summary["failures"] == [
        ["build", "time", "stopped after 2 s"],
        ["doctor", "process", "ValueError: out of order"],
        ["layers", "a", "b"],
    ]
    assert "failed: 3" in out and "misses its target: 1\n  d" in out
    assert "Traceback\nValueError" in (tmp_path / "failures.txt").read_text()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_run_that_is_stopped_takes_its_stage_along(capsys, tmp_path, monkeypatch):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    started = []
    monkeypatch.setattr(
        command.Runner, "command", lambda self, stage, seconds: [sys.executable, "-c", code]
    )

    def stop(self, stage, line):
        started.append(int(line))
        raise KeyboardInterrupt

    monkeypatch.setattr(command.Runner, "take", stop)
    assert (
        run(
            capsys, "bench", "gpu", "--device", "cpu", "--only", "bench", "--out", str(tmp_path)
        )[0]
        == 130
    )
    with pytest.raises(ProcessLookupError):
        os.killpg(*started, 0)
    assert not list(tmp_path.iterdir())


def test_the_table_stays_short(tmp_path):
    o = SimpleNamespace(out=tmp_path, device="cpu")
    runner = command.Runner(o, {"device": "d", "commit": "c"})
    for stage in command.STAGES:
        runner.stages[stage] = {"ok": 1, "failed": 90, "absent": 0, "seconds": 1.0}
        runner.failures += [
            [stage, f"op{i} on triton, bfloat16, (1, 2), plain", "x" * 400] for i in range(90)
        ]
        runner.failures += [
            [stage, f"op1 on triton, bfloat16, ({i}, 2), gain", "x" * 400] for i in range(90)
        ]
        runner.misses += ["m" * 300] * 90
        runner.absent += ["a" * 300] * 90
    lines = list(runner.table(540))
    assert len(lines) <= command.LINES and max(map(len, lines)) <= 240
    assert any("and 90 more like it" in line for line in runner.alike())


def test_the_budget_is_split():
    everything = [stage for stage in command.STAGES if stage != "tune"]
    assert sum(command.budget(everything, 540).values()) <= 540
    assert sum(command.budget(list(command.STAGES), 540).values()) <= 545
    assert command.budget(["build"], 540) == {"build": command.STAGES["build"][0]}


def test_targets_are_read_from_graphs_where_there_are_any():
    line = {"layer": "l", "dropout": 0.0, "pass": "forward", "ratio": {"PEFT": 0.9}}
    targets = [
        ("l", 0.0, "forward", "PEFT", 0.5),
        ("l", 0.1, "forward", "PEFT", 0.5),
        ("l", 0.0, "forward", "frozen", 1),
    ]
    assert list(stages.misses(line, targets)) == [
        "l, p = 0.0, forward: 0.90 × PEFT's time, target 0.50"
    ]
    took = line | {"ms": {"peftops": [0.02] * 3}, "graph_ms": {"peftops": [0.016] * 3}}
    assert list(stages.misses(took, [("l", 0.0, "forward", peers.MICROSECONDS, 15)])) == [
        "l, p = 0.0, forward: 16.0 µs, target 15 on an H200"
    ]
    assert list(stages.misses(took, [("l", 0.0, "forward", peers.MICROSECONDS, 30)])) == []
    assert list(
        stages.misses(line | {"graph_ratio": {"PEFT": 0.4, "frozen": 1.2}}, targets)
    ) == ["l, p = 0.0, forward: 1.20 × frozen's time, target 1.00"]


def test_targets_are_of_layers_that_are_measured():
    from peftops.bench import dora, lora, nf4

    gpu = torch.device("cuda")
    for row in (lora, nf4, dora):
        o = SimpleNamespace(dropout=None, shape=None, quick=True, layers=row.layers(gpu))
        known = {(name, problem.p) for name, problem in row.jobs(o, torch.bfloat16, gpu)}
        known |= {
            (f"{n} × {k}, r = {r}", 0.0)
            for n, k in dora.NORMS
            for r in dora.RANKS
            if row is dora
        }
        assert {target[:2] for target in row.TARGETS} <= known
        assert all(who in {*peers.BUILDERS, peers.MICROSECONDS} for *_, who, _ in row.TARGETS)


class Graph:
    """Stands in for a CUDA graph: what was called while it was captured is called again."""

    recorded = None

    def __enter__(self):
        Graph.recorded = self

    def __exit__(self, *_):
        Graph.recorded = None

    def replay(self):
        for call in self.calls:
            call()


@pytest.fixture
def gpu(monkeypatch):
    """What of torch.cuda the benches call, on a clock of the CPU: so that no name of it is met first on a GPU."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = time.perf_counter()

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            assert isinstance(other, Stream)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    for name, value in {
        "Event": Event, "Stream": Stream, "synchronize": lambda device=None: None, "stream": lambda stream: stream,
        "current_stream": lambda device=None: Stream(), "memory_allocated": lambda device: 100,
        "reset_peak_memory_stats": lambda device: None, "max_memory_allocated": lambda device: 1100,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1 << 20, total_memory=80 * 10**9),
        "get_device_capability": lambda device=None: (9, 0),
        "set_per_process_memory_fraction": lambda share, device: None,
    }.items():  # fmt: skip
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, value)
    return SimpleNamespace(type="cuda", index=0)


def test_timing_on_a_gpu(gpu, monkeypatch):
    monkeypatch.setattr(timing, "SHORTEST", 1e-4)
    monkeypatch.setattr(timing, "PATIENCE", 0.01)
    called, graphs = [], []

    class CUDAGraph:
        def replay(self):
            called.append("replay")

    class Capture:
        def __init__(self, graph):
            graphs.append(graph)

        def __enter__(self):
            called.append("capture")

        def __exit__(self, *_):
            called.append("captured")

    assert hasattr(torch.cuda, "CUDAGraph") and hasattr(torch.cuda, "graph")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    contender = timing.Contender(
        {"pass": [lambda: called.append("a"), lambda: called.append("b")]}, gpu
    )
    assert contender.prepare("pass", "eager") >= 2 and contender.sample("pass", "eager") > 0
    assert called[:6] == ["a", "b"] * 3 and contender.peak("pass") == 1000
    called.clear()
    contender.prepare("pass", "graph")
    assert called[:6] == ["a", "b"] * 3 and called[6:10] == ["capture", "a", "b", "captured"]
    assert set(called[10:]) == {"replay"} and len(graphs) == 1
    assert contender.sample("pass", "graph") > 0 and command.arch() == "90"


def test_what_a_graph_must_show(gpu, monkeypatch):
    """A replay reads new inputs; one that draws the same mask again, or computes something else, is noticed."""
    monkeypatch.setattr(layers, "trained", trained := layers.trained)

    class CUDAGraph:
        def replay(self):
            for target, source in zip(self.out, trained(self.layer, self.held), strict=True):
                target.copy_(source)

    class Capture:
        def __init__(self, graph):
            self.graph = graph

        def __enter__(self):
            def remember(layer, x, call=None):
                self.graph.layer, self.graph.held, self.graph.out = layer, x, trained(layer, x)
                return self.graph.out

            monkeypatch.setattr(layers, "trained", remember)

        def __exit__(self, *_):
            monkeypatch.setattr(layers, "trained", trained)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    x = torch.randn(70, 32).bfloat16()
    for p in (0.0, 0.1):
        assert layers.replayed(layers.layer_of(32, 48, p, CPU), x) == (True, "")
    monkeypatch.setattr(CUDAGraph, "replay", lambda self: None)
    for p, said in (
        (0.0, "a replay differs from the eager call"),
        (0.1, "every replay draws the same mask"),
    ):
        assert layers.replayed(layers.layer_of(32, 48, p, CPU), x) == (False, said)
    assert layers.graph(layers.layer_of(32, 48, 0.0, CPU), x) == (None, "needs a GPU")


def test_the_stack_is_an_8b_model():
    block = stack.Block(stack.LARGE, "meta")
    assert all(
        type(part) is LoRALinear and type(part.base_layer) is LinearNF4
        for part in block.children()
    )
    weights = stack.LARGE.layers * sum(
        math.prod(part.base_layer.shape) for part in block.children()
    )
    assert (
        weights == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
        and weights > 6.9e9
    )


def test_a_killed_stage_takes_its_children_along(tmp_path):
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait()"
    import subprocess

    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    time.sleep(0.5)
    command.kill(process)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
