"""The stages of `peftops bench gpu`.

Each runs in its own process and prints its events as lines of JSON.
"""

import json
import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import torch

from peftops.cli import replace
from peftops.testing.cases import CASES, SHAPES

from .. import results
from ..peers import MICROSECONDS, OURS

LARGER = [  # than those of every test: several tiles, one launch and two
    (300, 1024, 768, 16),
    (64, 512, 14336, 8),
    (8, 4096, 4096, 16),
    (2, 1024, 8192, 4),
    (1500, 512, 1032, 64),
]
DTYPES = "bfloat16", "float16", "float32"


def say(what, ok, said="", **more):
    print(
        json.dumps(
            {"what": what, "ok": bool(ok), "said": said, **more}, ensure_ascii=False
        ),
        flush=True,
    )


def run(stage, device, seconds, out):
    """Runs the function of this module that has the name of the stage."""
    o = SimpleNamespace(
        device=torch.device(device),
        seconds=seconds,
        out=Path(out),
        end=time.monotonic() + seconds,
    )
    globals()[stage](o)


def shapes(o):
    if o.device.type == "cuda":
        return SHAPES + LARGER
    return [*SHAPES[:2], (5, 40, 33, 5)]  # those that an interpreter is done with soon


def cells(device):
    """(op, backend) of every GPU backend that serves here; on a CPU, of those that stand in."""
    import peftops.functional  # noqa: F401  registers the ops
    from peftops import backends

    names = ("cuda", "triton") if device.type == "cuda" else ("cpu", "triton")
    return [
        (op, name)
        for op in CASES
        for name in names
        if backends.cell(name, op) and runs(name, device)
    ]


def runs(name, device):
    """Whether the backend runs on the device, or a CPU interprets it."""
    if name == "cpu" or (name, device.type) == ("triton", "cpu"):
        return True
    return import_module(f"peftops.{name}").runs(device.type)


def kernels(o):
    """Every case of every cell, dtype and shape."""
    from .matrix import run_all

    tasks = [
        (op, name, dtype, shape)
        for shape in shapes(o)
        for dtype in DTYPES
        for op, name in cells(o.device)
    ]
    if o.device.type == "cuda" and not any(name == "cuda" for _, name, *_ in tasks):
        say("the CUDA kernels", False, "are not built, or have no code for this GPU")
    for event in run_all(tasks, o.device, o.end - 4):
        say(**event)


SMALL = "from peftops.bench.proof.stages import small; small({device!r})"


def small(device):
    """What a sanitizer watches: a few cases of each cell."""
    import peftops.functional  # noqa: F401  registers the ops
    from peftops.testing.law import call

    place = torch.device(device)
    for op, name in cells(place):
        for shape in ((5, 264, 520, 5), (1, 264, 130, 20)):
            for _, args in list(CASES[op](shape, torch.bfloat16, place))[:3]:
                call(op, name, args)


def sanitizer(o):
    """compute-sanitizer's memcheck and racecheck over a few cases."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer",
        path="/usr/local/cuda/bin",
    )
    if not tool:
        say("compute-sanitizer", True, "is not installed", absent=True)
        return
    if o.device.type != "cuda":
        say("compute-sanitizer", True, "needs a GPU", absent=True)
        return
    watched = [sys.executable, "-c", SMALL.format(device=str(o.device))]
    for check in ("memcheck", "racecheck"):
        command = [
            "env",
            "PYTORCH_NO_CUDA_MEMORY_CACHING=1",
            tool,
            "--tool",
            check,
            "--error-exitcode",
            "9",
            *watched,
        ]
        left = max(5, o.end - time.monotonic() - 2)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            say(check, False, "ran out of time")
            continue
        if done.returncode == 0:
            say(check, True)
            continue
        print(done.stdout[-3000:], file=sys.stderr)
        faults = [line for line in done.stdout.splitlines() if is_fault(line)]
        say(check, False, (faults or [f"exit {done.returncode}"])[0][:200])


def is_fault(line):
    """Whether a line of compute-sanitizer names a fault."""
    return "=========" in line and ("Invalid" in line or "hazard" in line)


def layers(o):
    """A CUDA graph and torch.compile of each layer, against the same call in eager mode."""
    from .layers import examine

    for what, ok, said in examine(o.device):
        absent = {"absent": True} if ok is None else {}
        say(what, ok is not False, said, **absent)


def replays(o):
    """Every op: the same bits from two replays as from its launcher."""
    from peftops._replay import Replay, paused
    from peftops.testing.law import every, function

    def bits(outputs):
        return [t.nan_to_num() for t in every(outputs)]

    if not Replay:
        say("replays", False, "are not built")
        return
    for op in CASES:
        call = function(op)
        wrong = []  # labels of cases
        for shape in shapes(o)[:10]:
            for label, args in CASES[op](shape, torch.bfloat16, o.device):
                with paused():
                    expected = bits(call(*args))
                replayed = [bits(call(*args)) for _ in range(4)]
                if not all(
                    torch.equal(a, b)
                    for outs in replayed
                    for a, b in zip(outs, expected, strict=True)
                ):
                    wrong.append(f"{shape}, {label}")
        say(f"{op}, {call.direct.plans()} plans", not wrong, "; ".join(wrong[:3]))


def host(o):
    """What a layer takes of the host, ours beside PEFT's, until the time is up."""
    from .. import host as row
    from ..progress import Progress

    if o.device.type != "cuda":
        say(
            "host time",
            True,
            "needs a GPU; peftops bench host has a stand-in for one",
            absent=True,
        )
        return
    origin = results.describe(o.device) | {"row": "host", "dtype": "bf16"}
    lines = row.measure(o.device, list(row.SUFFIXES), (0.0, 0.1), 5, Progress())
    for line in in_time(lines, o.end):
        results.append(o.out / "bench.jsonl", origin | line)
        what = f"{line['layer']}, p = {line['dropout']}, {line['pass']}"
        ratios = line["ratio"]
        took = 1000 * line["ms"][row.OURS][1]
        missed = []
        if ratios.get(row.STOCK, 0) > row.TARGET:
            missed.append(
                f"{what}: {ratios[row.STOCK]:.2f} × PEFT's host time, target {row.TARGET}"
            )
        said = ", ".join(filter(None, (f"{took:.0f} µs", results.beside(ratios))))
        say(f"host time of {what}", True, said, misses=missed)


def in_time(lines, end):
    """Lines, as long as there is time for one that takes twice as long as the last.

    What the first one took does not count: it made what all of them use.
    """
    before = None
    for line in lines:
        yield line
        now = time.monotonic()
        last = 0 if before is None else now - before
        before = now
        if now + max(3, 2 * last) > end:
            return


def bench(o):
    """Layers and DoRA's norms beside their peers, those with a target first, until time is up."""
    from .. import dora, lora, merge, multi, nf4
    from ..__main__ import torch_dtype
    from ..measure import unlawful

    rows = lora, nf4, dora, multi, merge
    # A CPU may take minutes for peers in 16 bits.
    name = "bf16" if o.device.type == "cuda" else "fp32"
    dtype = torch_dtype(name)
    if wrong := unlawful(
        SimpleNamespace(OPS=sorted({op for row in rows for op in row.OPS})),
        dtype,
        o.device,
    ):
        say("the law", False, wrong)
        return
    origin = results.describe(o.device)
    lines = []
    for row, line in in_time(measured(rows, o.device, dtype), o.end):
        here = origin | {"row": row.__name__.rpartition(".")[2], "dtype": name} | line
        results.append(o.out / "bench.jsonl", here)
        lines.append(line)
        kernels_used = results.kernels_used(line)
        what = (
            f"{line['layer']}, p = {line['dropout']}, {line['pass']}, on {kernels_used}"
        )
        say(
            what,
            True,
            results.beside(line["ratio"]),
            misses=list(misses(line, row.TARGETS)),
        )
    for absent in results.absentees(lines):
        say("peers", True, absent, absent=True)


def measured(rows, device, dtype):
    """(row, line) of all their layers, those with a target first.

    On a GPU what rows measure beside layers, such as DoRA's norms, comes second.
    """
    from ..measure import alone, layer
    from ..peers import GPU, HERE, MULTI, NF4
    from ..timing import ceilings

    gpu = device.type == "cuda"
    options = SimpleNamespace(
        dropout=None if gpu else 0.1, shape=None, quick=True, backend=()
    )
    options.peers = [
        name for name in (*HERE, *NF4, *MULTI, *GPU) if "compile" not in name
    ]
    jobs = []  # (order, row, name of the layer, problem)
    for row in rows:
        options.layers = row.layers(device, not gpu)
        wanted = {target[:2] for target in row.TARGETS}
        for name, problem in row.jobs(options, dtype, device):
            order = 0 if (name, problem.p) in wanted else 2
            jobs.append((order, row, name, problem))
        if gpu and row.__name__.endswith(("dora", "merge")):
            jobs.append((1, row, None, None))
    limits = ceilings(device, dtype, quick=True)
    jobs.sort(key=lambda job: job[0])
    while jobs:  # what has been measured gives its memory back
        _, row, name, problem = jobs.pop(0)
        lines = (
            layer(row, name, problem, options, limits)
            if name
            else alone(row, device, False)
        )
        yield from ((row, line) for line in lines)


def misses(line, targets):
    """By how much a line misses its targets, in words; a CUDA graph counts where there is one."""
    for layer, dropout, pass_name, peer, most in targets:
        if (layer, dropout, pass_name) != (
            line["layer"],
            line["dropout"],
            line["pass"],
        ):
            continue
        where = f"{layer}, p = {dropout}, {pass_name}"
        if peer == MICROSECONDS:
            took = 1000 * line.get("graph_ms", line["ms"])[OURS][1]
            if took > most:
                yield f"{where}: {took:.1f} µs, target {most} on an H200"
        elif (
            ratio := line.get("graph_ratio", line["ratio"]).get(peer)
        ) and ratio > most:
            yield f"{where}: {ratio:.2f} × {peer}'s time, target {most:.2f}"


def models(o):
    """Steps of whole models with random weights, eager first, until the time is up."""
    from . import whole

    origin = results.describe(o.device) | {"row": "model", "dtype": "bf16"}
    plans = whole.PLANS if o.device.type == "cuda" else whole.REHEARSED
    for line, losses in whole.measure(plans, o.device, o.end - 12):
        results.append(o.out / "bench.jsonl", origin | line)
        said = f"{line['ms'][OURS][1]:.1f} ms, {results.beside(line['ratio'])}; losses {losses}"
        ratio = line["ratio"].get(whole.STOCK, 0)
        most = whole.TARGETS.get(line["layer"], float("inf"))
        missed = (
            [f"{line['layer']}: {ratio:.2f} × PEFT's step, target {most}"]
            if ratio > most
            else []
        )
        say(
            f"{line['layer']}, p = {line['dropout']}",
            whole.agree(line, losses),
            said,
            misses=missed,
        )


def stack(o):
    """Steps of an 8B-shaped stack in 4 bits under 24 GB."""
    from .stack import LARGE, TINY, train

    measured = train(LARGE if o.device.type == "cuda" else TINY, o.device, o.end)
    words = (
        "{layers} layers, {parameters:.1f}B weights: {step_s:.2f} s a step of {tokens} tokens,"
        " {peak_gb:.2f} GB"
    )
    ok = measured.pop("ok")
    say("4-bit steps under 24 GB", ok, words.format(**measured), **measured)


def tma(o):
    """Hopper's product: the law, and where it holds what it takes."""
    from . import tma as row

    if why := row.missing(o.device):
        say("TMA's product", True, why, absent=True)
        return
    for what, right, said, took in row.examine(o.device, o.end - 5):
        if right:
            loss = took["product"] / took["mm"] - 1
            times = [f"{name} {us:.0f} µs" for name, us in took.items()]
            said = ", ".join([*times, f"{loss:+.1%} of cuBLAS' time"])
        say(what, right, said, **took)


def tune(o):
    """The best tiles for this GPU, kept in tiles.json."""
    from .tune import tables

    best = {}
    for name, tile, said in tables(o.device, o.end):
        best[name] = tile
        replace(
            o.out / "tiles.json",
            lambda beside: beside.write_text(json.dumps(best, indent=1) + "\n"),
        )
        say(name, True, said)
