"""peftops bench gpu: everything a GPU can tell of this checkout, in one command and a set time.

It builds, asks doctor, holds every kernel on every GPU backend to the law, looks for bad memory
accesses, captures, compiles and replays the layers, times them and the host's work beside their
peers, and trains a stack like an 8B model in 4 bits under 24 GB.
It never stops at a failure, and keeps what it has as it goes. --device cpu rehearses it: the CPU
stands in for the GPU.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer

from peftops.cli import BadInput, Parser, find_device, folder, need, positive, replace

from .. import results

STAGES = {  # seconds of nine minutes, and what it does
    "build": (70, "build the extension in place, for this GPU"),
    "doctor": (25, "what runs here, and whether it computes right"),
    "kernels": (110, "every op × backend × dtype × shape against the law"),
    "sanitizer": (30, "compute-sanitizer over a few cases"),
    "layers": (60, "CUDA graphs and torch.compile of the layers"),
    "replays": (15, "what is replayed against what launchers launch"),
    "host": (35, "how long a layer keeps the host busy, beside PEFT's"),
    "bench": (45, "layers beside their peers"),
    "models": (60, "steps of whole models with random weights"),
    "tma": (60, "the product for Hopper: whether it is right, and what it takes"),
    "stack": (30, "an 8B-shaped stack in 4 bits, trained under 24 GB"),
    "tune": (150, "tiles of the Triton kernels for this GPU"),
}
LINES = 60  # of the table at the end


def options(argv):
    parser = Parser("peftops bench gpu", description=__doc__)
    parser.add_argument(
        "--device",
        default="cuda",
        help="cuda, cuda:1 …, or cpu for a rehearsal",
    )
    parser.add_argument(
        "--only",
        metavar="STAGE,…",
        help=f"of {', '.join(STAGES)}; by default all but tune",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="measure tiles too, and write them as tables",
    )
    parser.add_argument(
        "--seconds", type=positive, default=540, help="of time, for everything"
    )
    parser.add_argument(
        "--out",
        type=folder,
        metavar="DIR",
        default=Path("peftops-gpu"),
        help="where the results are kept",
    )
    o = parser.parse_args(argv)
    if o.only is None:
        o.stages = [stage for stage in STAGES if stage != "tune" or o.tune]
    else:
        o.stages = o.only.split(",")
    if unknown := [stage for stage in o.stages if stage not in STAGES]:
        raise BadInput(f"--only must be of {', '.join(STAGES)}, got {unknown[0]!r}")
    return o


def main(argv=None):
    o = options(argv)
    need("torch")
    device = find_device(o.device)
    o.out.mkdir(parents=True, exist_ok=True)
    shares = budget(o.stages, o.seconds)
    print(
        ", ".join(f"{stage} {seconds} s" for stage, seconds in shares.items()),
        flush=True,
    )
    runner = Runner(o, results.describe(device))
    started = time.monotonic()
    spare = 0
    for stage, share in shares.items():
        before = time.monotonic()
        runner.run(stage, share + spare)
        spare = max(0, share + spare - (time.monotonic() - before))
    print("\n".join(runner.table(time.monotonic() - started)))
    return int(bool(runner.failures))


def budget(stages, seconds):
    """{stage: whole seconds}; less for each where there is less time than all of them want."""
    whole = sum(STAGES[stage][0] for stage in stages)
    return {
        stage: round(STAGES[stage][0] * min(1, seconds / whole)) for stage in stages
    }


class Runner:
    """Runs stages and keeps their events in o.out, with a summary beside them."""

    def __init__(self, o, origin):
        self.o = o
        self.origin = origin
        self.stages = {}  # name: how many events of each state, and seconds
        self.failures = []
        self.misses = []
        self.absent = []
        for name in (results.EVENTS, "failures.txt"):
            (o.out / name).unlink(missing_ok=True)

    def run(self, stage, seconds):
        """One stage in a process of its own, whose events are kept as they come."""
        print(f"{stage}: {STAGES[stage][1]} …", flush=True)
        before = time.monotonic()
        self.stages[stage] = {"ok": 0, "failed": 0, "absent": 0}
        code, had_events, stopped, errors = self.watch(stage, seconds)
        if stopped:
            self.event(
                stage,
                {"what": "time", "ok": False, "said": f"stopped after {seconds:.0f} s"},
            )
        elif code:
            last = (errors.strip().splitlines() or [f"exit {code}"])[-1]
            self.event(stage, {"what": "process", "ok": False, "said": last[:300]})
        elif not had_events:
            self.event(stage, {"what": STAGES[stage][1], "ok": True})
        if self.stages[stage]["failed"]:
            self.log(f"== {stage}\n{errors}\n")
        self.stages[stage]["seconds"] = round(time.monotonic() - before, 1)
        self.keep()

    def watch(self, stage, seconds):
        """(exit code, whether events came, whether time ran out, the end of standard error)"""
        process = subprocess.Popen(
            self.command(stage, seconds),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            cwd=self.working_folder(stage),
            start_new_session=True,
        )
        stopped = []
        timer = Timer(seconds, lambda: stopped.append(kill(process)))
        timer.start()
        kept = self.o.out / f".{stage}.log"
        try:
            with open(kept, "w+", errors="replace") as log:
                copier = subprocess.Popen(["cat"], stdin=process.stderr, stdout=log)
                taken = [self.take(stage, line) for line in process.stdout]
                process.wait()
                copier.wait()
                log.seek(0)
                errors = log.read()[-4000:]
        except BaseException:  # Ctrl-C does not reach a session of its own
            kill(process)
            process.wait()
            raise
        finally:
            timer.cancel()
            kept.unlink(missing_ok=True)
        return process.returncode, any(taken), bool(stopped), errors

    def command(self, stage, seconds):
        if stage == "build":
            wish = (
                ["PEFTOPS_CUDA=1", f"PEFTOPS_CUDA_ARCHS={arch()}"]
                if self.o.device.startswith("cuda")
                else []
            )
            return [
                "env",
                *wish,
                sys.executable,
                "setup.py",
                "--quiet",
                "build_ext",
                "--inplace",
            ]
        if stage == "doctor":
            return [sys.executable, "-m", "peftops", "doctor"]
        args = stage, self.o.device, str(round(seconds)), str(self.o.out.resolve())
        interpret = (
            ["env", "TRITON_INTERPRET=1"]
            if stage in ("tma", "tune") and self.o.device == "cpu"
            else []
        )
        return [*interpret, sys.executable, "-c", BOOTSTRAP, *args]

    def working_folder(self, stage):
        return results.HERE.parent if stage in ("build", "doctor") else None

    def take(self, stage, line):
        """Whether a line is an event; whatever else is printed goes to the log."""
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or "what" not in event:
                raise ValueError
        except ValueError:
            if stage in ("doctor", "build"):
                self.log(line)
            return False
        self.event(stage, event)
        return True

    def event(self, stage, event):
        if event.get("absent"):
            state = "absent"
            self.absent.append(f"{stage}: {event['what']}: {event.get('said', '')}")
        elif event["ok"]:
            state = "ok"
        else:
            state = "failed"
            self.failures.append([stage, event["what"], event.get("said", "")])
        self.stages[stage][state] += 1
        self.misses += event.get("misses", [])
        with open(self.o.out / results.EVENTS, "a") as file:
            file.write(json.dumps({"part": stage} | event, ensure_ascii=False) + "\n")

    def alike(self):
        """The first of the failures of one kernel and dtype that say the same.

        A count says how many more there are.
        """
        groups = {}
        for failure in self.failures:
            stage, what, said = failure
            groups.setdefault((stage, *what.split(", ")[:2], said), []).append(failure)
        for (stage, what, said), *others in groups.values():
            more = f" (and {len(others)} more like it)" if others else ""
            yield f"{stage}: {what}: {said}{more}"

    def log(self, text):
        with open(self.o.out / "failures.txt", "a") as file:
            file.write(text)

    def keep(self):
        summary = self.origin | {
            "parts": self.stages,
            "failures": self.failures,
            "misses": self.misses,
            "absent": self.absent,
        }
        text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
        replace(self.o.out / "summary.json", lambda beside: beside.write_text(text))

    def table(self, seconds):
        """At most LINES lines: stages, failures, missed targets, and what is absent and why."""
        yield f"{self.origin['device']}, commit {self.origin['commit']}, {seconds:.0f} s"
        for stage, counts in self.stages.items():
            states = ", ".join(
                f"{count} {name}"
                for name, count in counts.items()
                if name != "seconds" and count
            )
            yield f"{stage:10} {counts['seconds']:6.1f} s  {states}"
        sections = {
            "failed": self.alike(),
            "misses its target": self.misses,
            "absent": self.absent,
        }
        most = (LINES - len(self.stages) - 8) // len(sections)
        for title, lines in sections.items():
            lines = list(lines)
            yield f"{title}: {len(lines) or 'nothing'}"
            yield from (f"  {line}"[:240] for line in lines[:most])
            if lines[most:]:
                yield f"  and {len(lines) - most} more"
        names = "summary.json", results.EVENTS, "bench.jsonl", "failures.txt"
        there = [name for name in names if (self.o.out / name).exists()]
        yield f"All of it is in {self.o.out}: {', '.join(there)}."


BOOTSTRAP = """
import sys
from peftops.bench.proof import stages
stage, device, seconds, out = sys.argv[1:]
stages.run(stage, device, float(seconds), out)
"""


def arch():
    import torch

    return "".join(map(str, torch.cuda.get_device_capability()))


def kill(process):
    """It and its children, which may outlive it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
