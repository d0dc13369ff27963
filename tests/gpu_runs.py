"""Runs `peftops bench gpu` with the CPU in the place of the GPU."""

import json

from commands import run


def run_stages(capsys, folder, stages, *more):
    """(exit code, stdout, summary, events) of a run of some stages, named in one text."""
    argv = ["--device", "cpu", "--only", stages, "--out", str(folder), *more]
    code, out, _ = run(capsys, "bench", "gpu", *argv)
    summary = json.loads((folder / "summary.json").read_text())
    events = [
        json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()
    ]
    return code, out, summary, events
