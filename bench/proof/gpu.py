"""peftops bench gpu: everything a GPU can tell of this checkout, in one command and a set time.

It builds, asks doctor, holds every kernel on every GPU backend to the law, looks for bad memory accesses, captures,
compiles and replays the layers, times them and the host's work beside their peers, and trains a stack like an 8B model
in 4 bits under 24 GB.
It never stops at a failure, and keeps what it has as it goes. --device cpu rehearses it: the CPU stands in for the GPU.
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

PARTS = {  # seconds of nine minutes, and what it does
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
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 …, or cpu for a rehearsal")
    parser.add_argument("--only", metavar="PART,…", help=f"of {', '.join(PARTS)}; by default all but tune")
    parser.add_argument("--tune", action="store_true", help="measure tiles too, and write them as tables")
    parser.add_argument("--seconds", type=positive, default=540, help="of time, for everything")
    parser.add_argument(
        "--out", type=folder, metavar="DIR", default=Path("peftops-gpu"), help="what is found is kept here"
    )
    o = parser.parse_args(argv)
    o.parts = o.only.split(",") if o.only is not None else [name for name in PARTS if name != "tune" or o.tune]
    if unknown := [part for part in o.parts if part not in PARTS]:
        raise BadInput(f"--only must be of {', '.join(PARTS)}, got {unknown[0]!r}")
    return o


def main(argv=None):
    o = options(argv)
    need("torch")
    device = find_device(o.device)
    o.out.mkdir(parents=True, exist_ok=True)
    shares = budget(o.parts, o.seconds)
    print(", ".join(f"{part} {seconds} s" for part, seconds in shares.items()), flush=True)
    check = Check(o, results.describe(device))
    started, spare = time.monotonic(), 0
    for part, share in shares.items():
        before = time.monotonic()
        check.run(part, share + spare)
        spare = max(0, share + spare - (time.monotonic() - before))
    print("\n".join(check.table(time.monotonic() - started)))
    return int(bool(check.failures))


def budget(parts, seconds):
    whole = sum(PARTS[part][0] for part in parts)
    return {part: round(PARTS[part][0] * min(1, seconds / whole)) for part in parts}


class Check:
    def __init__(self, o, about):
        self.o, self.about, self.parts, self.failures, self.misses, self.absent = o, about, {}, [], [], []
        for name in (results.EVENTS, "failures.txt"):
            (o.out / name).unlink(missing_ok=True)

    def run(self, part, seconds):
        """One part in a process of its own, whose lines are kept as they come."""
        print(f"{part}: {PARTS[part][1]} …", flush=True)
        before, self.parts[part] = time.monotonic(), {"ok": 0, "failed": 0, "absent": 0}
        process = subprocess.Popen(
            self.command(part, seconds), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
            cwd=self.where(part), start_new_session=True,
        )  # fmt: skip
        stopped = []
        timer = Timer(seconds, lambda: stopped.append(kill(process)))
        timer.start()
        kept = self.o.out / f".{part}.log"
        try:
            with open(kept, "w+", errors="replace") as log:
                errors = subprocess.Popen(["cat"], stdin=process.stderr, stdout=log)
                said = [self.take(part, line) for line in process.stdout]
                process.wait(), errors.wait()
                log.seek(0)
                tail = log.read()[-4000:]
        except BaseException:  # Ctrl-C does not reach a session of its own
            kill(process)
            process.wait()
            raise
        finally:
            timer.cancel()
            kept.unlink(missing_ok=True)
        if stopped:
            self.event(part, {"what": "time", "ok": False, "said": f"stopped after {seconds:.0f} s"})
        elif process.returncode:
            last = (tail.strip().splitlines() or [f"exit {process.returncode}"])[-1]
            self.event(part, {"what": "process", "ok": False, "said": last[:300]})
        elif not any(said):
            self.event(part, {"what": PARTS[part][1], "ok": True})
        if self.parts[part]["failed"]:
            self.log(f"== {part}\n{tail}\n")
        self.parts[part]["seconds"] = round(time.monotonic() - before, 1)
        self.keep()

    def command(self, part, seconds):
        if part == "build":
            wish = ["PEFTOPS_CUDA=1", f"PEFTOPS_CUDA_ARCHS={arch()}"] if self.o.device.startswith("cuda") else []
            return ["env", *wish, sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        if part == "doctor":
            return [sys.executable, "-m", "peftops", "doctor"]
        args = part, self.o.device, str(round(seconds)), str(self.o.out.resolve())
        stand_in = ["env", "TRITON_INTERPRET=1"] if part in ("tma", "tune") and self.o.device == "cpu" else []
        return [*stand_in, sys.executable, "-c", BOOTSTRAP, *args]

    def where(self, part):
        return results.HERE.parent if part in ("build", "doctor") else None

    def take(self, part, line):
        """Whether a line is an event; whatever else is printed goes to the log."""
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or "what" not in event:
                raise ValueError
        except ValueError:
            if part in ("doctor", "build"):
                self.log(line)
            return False
        self.event(part, event)
        return True

    def event(self, part, event):
        state = "absent" if event.get("absent") else "ok" if event["ok"] else "failed"
        self.parts[part][state] += 1
        if state == "failed":
            self.failures.append([part, event["what"], event.get("said", "")])
        if state == "absent":
            self.absent.append(f"{part}: {event['what']}: {event.get('said', '')}")
        self.misses += event.get("misses", [])
        with open(self.o.out / results.EVENTS, "a") as file:
            file.write(json.dumps({"part": part} | event, ensure_ascii=False) + "\n")

    def alike(self):
        """A line for all failures of one kernel and dtype that say the same: the first, and how many more."""
        groups = {}
        for part, what, said in self.failures:
            groups.setdefault((part, *what.split(", ")[:2], said), [(part, what, said), 0])[1] += 1
        for (part, what, said), count in groups.values():
            more = f" (and {count - 1} more like it)" if count > 1 else ""
            yield f"{part}: {what}: {said}{more}"

    def log(self, text):
        with open(self.o.out / "failures.txt", "a") as file:
            file.write(text)

    def keep(self):
        found = {"parts": self.parts, "failures": self.failures, "misses": self.misses, "absent": self.absent}
        state = self.about | found
        text = json.dumps(state, indent=1, ensure_ascii=False) + "\n"
        replace(self.o.out / "summary.json", lambda beside: beside.write_text(text))

    def table(self, seconds):
        """At most LINES lines: the parts, what failed, what misses its target, what is absent and why."""
        yield f"{self.about['device']}, commit {self.about['commit']}, {seconds:.0f} s"
        for part, counts in self.parts.items():
            states = ", ".join(f"{count} {name}" for name, count in counts.items() if name != "seconds" and count)
            yield f"{part:10} {counts['seconds']:6.1f} s  {states}"
        sections = {"failed": self.alike(), "misses its target": self.misses, "absent": self.absent}
        for title, lines in sections.items():
            most = (LINES - len(self.parts) - 8) // len(sections)
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
part, device, seconds, out = sys.argv[1:]
stages.run(part, device, float(seconds), out)
"""


def arch():
    import torch

    return "".join(map(str, torch.cuda.get_device_capability()))


def kill(process):
    """It and its children, which may outlive it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
