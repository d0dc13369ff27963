"""Ops × backends × dtypes × shapes against the law.

Tasks run in processes of their own, so a kernel that kills its process stops no other.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from queue import Empty, Queue
from threading import Thread

AT_ONCE = 14
WORKER = """
import sys
from peftops.bench.proof.matrix import work
work(sys.argv[1])
"""


def run_all(tasks, device, end):
    """An event for each case of the tasks (op, backend, dtype, shape), as they end."""
    waiting = Queue()
    events = Queue()
    for task in tasks:
        waiting.put(task)
    count = min(AT_ONCE, os.cpu_count())
    threads = [
        Thread(target=employ, args=(waiting, events, device, end)) for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or not events.empty():
        try:
            yield events.get(timeout=0.2)
        except Empty:
            continue
    if left := waiting.qsize():
        yield {
            "what": "the rest",
            "ok": True,
            "absent": True,
            "said": f"{left} of {len(tasks)} groups ran out of time",
        }


def employ(waiting, events, device, end):
    """Hands task after task to a worker, and to the next one where it died."""
    worker = None
    while time.monotonic() < end:
        try:
            task = waiting.get_nowait()
        except Empty:
            break
        op, name, dtype, shape = task
        first = 0  # the case to begin with; None where there are no more
        while first is not None and time.monotonic() < end:
            worker = worker or Worker(device)
            begun = worker.do(task, first, events.put)
            first = None
            if begun is not None:  # it died there, or could not even start
                at, label = begun
                said = (
                    worker.last_words()
                    if time.monotonic() < end
                    else "stopped, since time was up"
                )
                what = f"{op} on {name}, {dtype}, {shape}, {label}"
                events.put(
                    {"what": what, "ok": False, "said": f"its process died: {said}"}
                )
                worker = None
                if at is not None:
                    first = at + 1
    if worker:
        worker.close()


class Worker:
    def __init__(self, device):
        # On a CPU Triton's kernels are interpreted, which is set before the import.
        interpret = [] if device.type == "cuda" else ["env", "TRITON_INTERPRET=1"]
        # It lives as long as the process.
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        command = [*interpret, sys.executable, "-c", WORKER, str(device)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def do(self, task, first, take):
        """None where the task ended well, else (index, label) of the case it died in.

        The index is None where it died before any.
        """
        begun = None, "before any case"
        try:
            print(json.dumps([*task, first]), file=self.process.stdin, flush=True)
        except OSError:
            return begun
        for line in self.process.stdout:
            event = json.loads(line)
            if "done" in event:
                return None
            if "begun" in event:
                begun = event["begun"], event["label"]
            else:
                take(event)
        return begun

    def last_words(self):
        self.process.wait()
        self.errors.seek(0)
        text = self.errors.read()
        print(text[-3000:], file=sys.stderr)
        said = [
            line
            for line in text.splitlines()
            if line.strip() and not line.startswith(" ")
        ]
        return (said or [f"exit {self.process.returncode}"])[-1][:200]

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def work(device):
    """Reads tasks as lines. Prints a line before each case and one after it.

    After a CUDA error the process ends, since no later call would be right.
    """
    import torch

    import peftops.functional  # noqa: F401  registers the ops
    from peftops.testing.cases import CASES
    from peftops.testing.law import check_case

    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    place = torch.device(device)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        op, name, dtype, shape, first = json.loads(line)
        for i, (label, args) in enumerate(
            CASES[op](tuple(shape), getattr(torch, dtype), place)
        ):
            if i < first:
                continue
            event = {
                "what": f"{op} on {name}, {dtype}, {tuple(shape)}, {label}",
                "ok": False,
            }
            print(json.dumps({"begun": i, "label": label}), file=answers, flush=True)
            try:
                error, bound = check_case(op, name, args)
                if place.type == "cuda":
                    torch.cuda.synchronize()
                event |= {"ok": error <= bound, "error": error, "bound": bound}
                if not event["ok"]:
                    event["said"] = f"error {error:.1e}, at most {bound:.1e}"
            except Exception as failure:  # a compiler's, the driver's, ours
                if "CUDA error" in str(failure) or "an illegal" in str(failure):
                    raise
                said = (str(failure).strip().splitlines() or [""])[0]
                event["said"] = f"{type(failure).__name__}: {said}"[:240]
            print(json.dumps(event), file=answers, flush=True)
        print(json.dumps({"done": True}), file=answers, flush=True)
