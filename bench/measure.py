"""A row's problems, measured: contenders by turns, eager and as CUDA graphs, with memory, errors and ceilings."""

import torch

import peftops.functional  # noqa: F401  registers the ops
from peftops import backends
from peftops.testing.cases import SHAPES
from peftops.testing.law import check

from . import results, timing
from .peers import BASE, GPU, OURS, Absent, contender
from .worker import Remote


def unlawful(row, dtype, device):
    """A sentence on the first case that is computed wrong, or None."""
    for op in row.OPS:
        backend = backends.find(
            op, torch.empty(0, dtype=dtype, device=device)
        ).__module__.split(".")[1]
        for sizes in SHAPES:
            for label, error, bound in check(op, backend, sizes, dtype, device):
                if not error <= bound:
                    where = f"{op} on {backend}, {sizes}, {label}"
                    return f"{where} is wrong (error {error:.1e}, at most {bound:.1e}), so it is not timed."
    return None


def measure(row, o, dtype, device, progress, others=True):
    """A result for each problem and pass, and for what else the row measures: Python's time, for example."""
    ceilings, jobs = timing.ceilings(device, dtype, o.quick), list(row.jobs(o, dtype, device))
    for name, problem in progress.track(jobs, len(jobs), row.__name__.rpartition(".")[2]):
        yield from layer(row, name, problem, o, ceilings)
    if others:
        yield from alone(row, device, o.quick)


def layer(row, name, problem, o, ceilings):
    """A result for each pass of one problem."""
    labels, absent = row.contenders(problem, o.backend)
    if o.peers:
        labels = [
            label
            for label in labels
            if label in o.peers or label == BASE or label.startswith(OURS)
        ]
        absent = {label: why for label, why in absent.items() if label in o.peers}
    found = build(labels, problem, absent)
    common = {"layer": name, "shape": problem.shape, "dropout": problem.p, "absent": absent}
    common["error"] = {label: c.error for label, c in found.items() if c.error is not None}
    for kind in found[OURS].calls:
        line = common | row.describe(problem, kind) | rate(row, problem, kind, ceilings)
        yield finish(line, *times(found, kind, 5 if o.quick else 15, problem.device))
    close(found)


def alone(row, device, quick):
    """A result for each pass of what else the row measures."""
    for line, calls, modes in row.others(device, quick):
        found = {label: timing.Contender(passes, device) for label, passes in calls.items()}
        for kind in found[OURS].calls:
            measured = times(found, kind, 5 if quick else 15, device, modes=modes)
            yield finish({"dropout": 0.0, "absent": {}} | line, *measured)


def build(labels, problem, absent):
    """{label: contender}; who does not take part is said in `absent`."""
    torch._dynamo.reset()  # else the shapes of the problems before count against the compiler's limit, and it gives up
    found = {}
    for label in labels:
        try:
            found[label] = Remote(label, problem) if label in GPU else contender(label, problem)
        except Absent as error:
            absent[label] = str(error)
        except Exception as error:  # of somebody else's code, which may raise anything
            if label == OURS:
                raise
            absent[label] = timing.said(error)
    return found


def close(found):
    for one in found.values():
        if isinstance(one, Remote):
            one.close()


def times(found, kind, rounds, device, modes=None):
    """Milliseconds and ratios in each mode, and the peaks of memory; and who failed at it, and why."""
    able, failed = {label: c for label, c in found.items() if kind in c.calls}, {}
    line = {"pass": kind}
    for mode in modes or (("eager", "graph") if device.type == "cuda" else ("eager",)):
        seconds, unable = timing.race(able, kind, mode, rounds)
        prefix, suffix = ("", "") if mode == "eager" else ("graph_", ", as a graph")
        failed |= {label + suffix: why for label, why in unable.items()}
        if OURS in seconds:
            line[f"{prefix}ms"] = {label: timing.spread(t) for label, t in seconds.items()}
            line[f"{prefix}ratio"] = timing.ratios(seconds, OURS)
        elif mode == "eager":
            raise RuntimeError(f"{OURS} failed: {unable[OURS]}")
    peaks = {label: c.peak(kind) for label, c in able.items() if label not in failed}
    line["peak_mb"] = {
        label: round(peak / 1e6, 2) for label, peak in peaks.items() if peak is not None
    }
    return line, failed


def rate(row, problem, kind, ceilings):
    """What ours moves and computes a second, and how much of what this device can."""
    (copied, computed), (flops, moved) = ceilings, row.cost(problem, "backward" in kind)
    return {
        "flops": flops,
        "bytes": moved,
        "copy_gbps": round(copied / 1e9, 1),
        "gemm_tflops": round(computed / 1e12, 6),
    }


def finish(line, measured, failed):
    """What follows from the time: of a graph, where there is one, since Python is not the kernel's."""
    line = line | measured | {"absent": line["absent"] | failed}
    seconds = (line.get("graph_ms") or line["ms"])[OURS][1] / 1000
    if "flops" in line:
        least = max(
            line["flops"] / line["gemm_tflops"] / 1e12, line["bytes"] / line["copy_gbps"] / 1e9
        )
        line["gbps"] = round(line["bytes"] / seconds / 1e9, 1)
        line["tflops"] = round(line["flops"] / seconds / 1e12, 3)
        line["roofline"] = round(least / seconds, 4)
    return line


def show(line):
    low, mid, high = line["ms"][OURS]
    ratios = results.beside(line["ratio"])
    where = f"{line['layer']} {tuple(line['shape'])}, p = {line['dropout']}, {line['pass']}"
    way = ", ".join(filter(None, (line.get("backend"), line.get("path"))))
    share = f", {line['roofline']:.0%} of the roofline" if "roofline" in line else ""
    print(
        f"{where}: {mid:.3f} ms ({low:.3f}–{high:.3f}){share}{f' on {way}' if way else ''} = {ratios}",
        flush=True,
    )
