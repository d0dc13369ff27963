"""Measures the problems of a row: times by turns, eager and as CUDA graphs, memory and errors."""

import torch

import peftops.functional  # noqa: F401  registers the ops
from peftops import backends
from peftops.testing.cases import SHAPES
from peftops.testing.law import check

from . import results, timing
from .peers import BASE, GPU, OURS, Absent, contender
from .worker import Remote


def unlawful(row, dtype: torch.dtype, device: torch.device) -> str | None:
    """A sentence on the first case that is computed wrong, or None."""
    for op in row.OPS:
        cell = backends.find(op, torch.empty(0, dtype=dtype, device=device))
        backend = cell.__module__.split(".")[1]
        for sizes in SHAPES:
            for label, error, bound in check(op, backend, sizes, dtype, device):
                if not error <= bound:
                    where = f"{op} on {backend}, {sizes}, {label}"
                    errors = f"error {error:.1e}, at most {bound:.1e}"
                    return f"{where} is wrong ({errors}), so it is not timed."
    return None


def measure(row, o, dtype, device, progress, others=True):
    """A result for each problem and pass.

    Args:
        others: whether to measure what the row has beside layers, such as Python's time.
    """
    jobs = list(row.jobs(o, dtype, device))
    ceilings = timing.ceilings(device, dtype, o.quick) if jobs else None
    for name, problem in progress.track(
        jobs, len(jobs), row.__name__.rpartition(".")[2]
    ):
        yield from layer(row, name, problem, o, ceilings)
    if others:
        yield from alone(row, device, o.quick)


def layer(row, name, problem, o, ceilings):
    """A result for each pass of one problem."""
    labels, absent = row.contenders(problem, o.backend)
    if o.peers:
        labels = [
            label for label in labels if label in o.peers or is_always_there(label)
        ]
        absent = {label: why for label, why in absent.items() if label in o.peers}
    contenders = build(labels, problem, absent)
    common = {
        "layer": name,
        "shape": problem.shape,
        "dropout": problem.p,
        "absent": absent,
        "error": {
            label: racer.error
            for label, racer in contenders.items()
            if racer.error is not None
        },
    }
    rounds = 5 if o.quick else 15
    for pass_name in contenders[OURS].calls:
        line = common | row.describe(problem, pass_name)
        line |= rate(row, problem, pass_name, ceilings)
        yield finish(line, *times(contenders, pass_name, rounds, problem.device))
    close(contenders)


def is_always_there(label):
    """Whether a contender takes part whatever --peers says."""
    return label == BASE or label.startswith(OURS)


def alone(row, device, quick):
    """A result for each pass of what the row measures beside layers."""
    rounds = 5 if quick else 15
    for line, calls, modes in row.others(device, quick):
        contenders = {
            label: timing.Contender(passes, device) for label, passes in calls.items()
        }
        for pass_name in contenders[OURS].calls:
            measured = times(contenders, pass_name, rounds, device, modes=modes)
            yield finish({"dropout": 0.0, "absent": {}} | line, *measured)


def build(labels, problem, absent):
    """{label: contender}. Those that cannot take part are added to `absent` with the reason."""
    # Else the shapes of earlier problems count against the compiler's limit, and it gives up.
    torch._dynamo.reset()
    contenders = {}
    for label in labels:
        make = Remote if label in GPU else contender
        try:
            contenders[label] = make(label, problem)
        except Absent as error:
            absent[label] = str(error)
        except Exception as error:  # code of other packages may raise anything
            if label == OURS:
                raise
            absent[label] = timing.said(error)
    return contenders


def close(contenders):
    for remote in contenders.values():
        if isinstance(remote, Remote):
            remote.close()


def times(contenders, pass_name, rounds, device, modes=None):
    """(line, failures) of one pass.

    Args:
        modes: "eager", "graph" or both; None for all that the device has.

    Returns:
        line: milliseconds and ratios in each mode, and the peaks of memory.
        failures: {label: why} of those that failed.
    """
    able = {
        label: racer for label, racer in contenders.items() if pass_name in racer.calls
    }
    failures = {}
    line = {"pass": pass_name}
    if not modes:
        modes = ("eager", "graph") if device.type == "cuda" else ("eager",)
    for mode in modes:
        seconds, unable = timing.race(able, pass_name, mode, rounds)
        prefix, suffix = ("", "") if mode == "eager" else ("graph_", ", as a graph")
        failures |= {label + suffix: why for label, why in unable.items()}
        if OURS in seconds:
            line[f"{prefix}ms"] = {
                label: timing.spread(t) for label, t in seconds.items()
            }
            line[f"{prefix}ratio"] = timing.ratios(seconds, OURS)
        elif mode == "eager":
            raise RuntimeError(f"{OURS} failed: {unable[OURS]}")
    line["peak_mb"] = {}
    for label, racer in able.items():
        peak = None if label in failures else racer.peak(pass_name)
        if peak is not None:
            line["peak_mb"][label] = round(peak / 1e6, 2)
    return line, failures


def rate(row, problem, pass_name, ceilings):
    """What the pass computes and moves, and how much of either this device can in a second."""
    copied, computed = ceilings
    flops, moved = row.cost(problem, "backward" in pass_name)
    return {
        "flops": flops,
        "bytes": moved,
        "copy_gbps": round(copied / 1e9, 1),
        "gemm_tflops": round(computed / 1e12, 6),
    }


def finish(line, measured, failures):
    """The whole line, with the rates that follow from the time.

    They follow from the time of a graph, where there is one: that of eager calls may be Python's.
    """
    line = line | measured | {"absent": line["absent"] | failures}
    seconds = (line.get("graph_ms") or line["ms"])[OURS][1] / 1000
    if "flops" in line:
        computing = line["flops"] / line["gemm_tflops"] / 1e12
        moving = line["bytes"] / line["copy_gbps"] / 1e9
        line["gbps"] = round(line["bytes"] / seconds / 1e9, 1)
        line["tflops"] = round(line["flops"] / seconds / 1e12, 3)
        line["roofline"] = round(max(computing, moving) / seconds, 4)
    return line


def show(line):
    """Prints a result."""
    low, mid, high = line["ms"][OURS]
    where = (
        f"{line['layer']} {tuple(line['shape'])}, p = {line['dropout']}, {line['pass']}"
    )
    text = f"{where}: {mid:.3f} ms ({low:.3f}–{high:.3f})"
    if "roofline" in line:
        text += f", {line['roofline']:.0%} of the roofline"
    if kernels_used := results.kernels_used(line):
        text += f" on {kernels_used}"
    print(f"{text} = {results.beside(line['ratio'])}", flush=True)
