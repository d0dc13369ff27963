"""Runs `peftops bench gpu` with the CPU in the place of the GPU."""

import json

from commands import run
from peftops.bench.proof import gpu


def give_time(monkeypatch, times, **seconds):
    """So many times the seconds of each stage, or those named: two cores are no GPU."""
    longer = {
        stage: (seconds.get(stage, times * usual), what)
        for stage, (usual, what) in gpu.STAGES.items()
    }
    monkeypatch.setattr(gpu, "STAGES", longer)


def run_stages(capsys, folder, stages, *more):
    """(exit code, stdout, summary, events) of a run of some stages, named in one text."""
    argv = ["--device", "cpu", "--only", stages, "--out", str(folder), *more]
    code, out, _ = run(capsys, "bench", "gpu", *argv)
    summary = json.loads((folder / "summary.json").read_text())
    events = [
        json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()
    ]
    return code, out, summary, events
