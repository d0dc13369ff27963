"""Ops × backends × dtypes × shapes, in processes of their own: a kernel that takes one down takes no other along."""

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
    """An event for each case of the tasks (op, backend, dtype, shape), in the order in which they end."""
    waiting, events = Queue(), Queue()
    for task in tasks:
        waiting.put(task)
    threads = [Thread(target=employ, args=(waiting, events, device, end)) for _ in range(min(AT_ONCE, os.cpu_count()))]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or not events.empty():
        try:
            yield events.get(timeout=0.2)
        except Empty:
            continue
    if left := waiting.qsize():
        yield {"what": "the rest", "ok": True, "absent": True, "said": f"{left} of {len(tasks)} groups ran out of time"}


def employ(waiting, events, device, end):
    """Hands task after task to a worker, and to the next one where it died."""
    worker = None
    while time.monotonic() < end:
        try:
            op, name, dtype, shape = task = waiting.get_nowait()
        except Empty:
            break
        first = 0
        while first is not None and time.monotonic() < end:
            worker = worker or Worker(device)
            begun, first, what = worker.do(task, first, events.put, end), None, f"{op} on {name}, {dtype}, {shape}"
            if begun is not None:  # it died there, or could not even start
                at, label = begun
                said = worker.last_words() if time.monotonic() < end else "stopped, since time was up"
                events.put({"what": f"{what}, {label}", "ok": False, "said": f"its process died: {said}"})
                worker, first = None, None if at is None else at + 1
    if worker:
        worker.close()


class Worker:
    def __init__(self, device):
        # Where a CPU stands in, Triton's interpreter does for its compiler; it has to be named before triton is there.
        stand_in = [] if device.type == "cuda" else ["env", "TRITON_INTERPRET=1"]
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  it lives as long as the process
        command = [*stand_in, sys.executable, "-c", WORKER, str(device)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def do(self, task, first, take, end):
        """None where the task ended well, otherwise (the index of the case that it died in, or None, and its label)."""
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
        said = [line for line in text.splitlines() if line.strip() and not line.startswith(" ")]
        return (said or [f"exit {self.process.returncode}"])[-1][:200]

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def work(device):
    """Tasks come as lines; a line goes out before each case and one behind it. After a CUDA error it dies."""
    import torch

    import peftops.functional  # noqa: F401  registers the ops
    from peftops.testing.cases import CASES
    from peftops.testing.law import check_case

    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    place, answers = torch.device(device), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        op, name, dtype, shape, first = json.loads(line)
        for i, (label, args) in enumerate(CASES[op](tuple(shape), getattr(torch, dtype), place)):
            if i < first:
                continue
            event = {"what": f"{op} on {name}, {dtype}, {tuple(shape)}, {label}", "ok": False}
            print(json.dumps({"begun": i, "label": label}), file=answers, flush=True)
            try:
                error, bound = check_case(op, name, args)
                if place.type == "cuda":
                    torch.cuda.synchronize()
                event |= {"ok": error <= bound, "error": error, "bound": bound}
                event |= {} if event["ok"] else {"said": f"error {error:.1e}, at most {bound:.1e}"}
            except Exception as failure:  # a compiler's, the driver's, ours
                if "CUDA error" in str(failure) or "an illegal" in str(failure):
                    raise
                said = (str(failure).strip().splitlines() or [""])[0]
                event["said"] = f"{type(failure).__name__}: {said}"[:240]
            print(json.dumps(event), file=answers, flush=True)
        print(json.dumps({"done": True}), file=answers, flush=True)
