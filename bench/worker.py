"""A contender in a process of its own: of another tree of peftops, or of a package that changes torch for everybody."""

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Another tree's peftops, and the benches of this one: they ask for nothing but its public names.
BOOTSTRAP = """
import sys
tree, bench = sys.argv[1:]
if tree:
    sys.path.insert(0, tree)
    import importlib.util, peftops
    place = bench + "/__init__.py"
    spec = importlib.util.spec_from_file_location("peftops.bench", place, submodule_search_locations=[bench])
    sys.modules["peftops.bench"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["peftops.bench"])
from peftops.bench.worker import serve
serve()
"""


class Remote:
    """What peers.contender would return, made over there; Absent, with what was said there, where it fails."""

    def __init__(self, label, problem, tree=None):
        command = [sys.executable, "-c", BOOTSTRAP, str(tree or ""), str(HERE)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        about = {field.name: getattr(problem, field.name) for field in fields(problem)}
        about |= {
            "dtype": str(problem.dtype).removeprefix("torch."),
            "device": str(problem.device),
        }
        self.calls, self.error = self.ask("build", label, about)

    def ask(self, what, *args):
        from .peers import Absent

        try:
            print(json.dumps([what, *args]), file=self.process.stdin, flush=True)
            answer = json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            self.close()
            raise Absent(f"its process ended with {self.process.returncode}") from None
        if "absent" in answer:
            raise Absent(answer["absent"])
        return answer["result"]

    def prepare(self, kind, mode):
        return self.ask("prepare", kind, mode)

    def sample(self, kind, mode):
        return self.ask("sample", kind, mode)

    def peak(self, kind):
        return self.ask("peak", kind)

    def close(self):
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve():
    """Answers on what was standard output; whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    from .peers import Absent, Problem, contender
    from .timing import said

    held = None
    for line in sys.stdin:
        what, *args = json.loads(line)
        try:
            if what == "build":
                label, about = args
                about |= {
                    "dtype": getattr(torch, about["dtype"]),
                    "device": torch.device(about["device"]),
                }
                held = contender(label, Problem(**about | {"shape": tuple(about["shape"])}))
                result = list(held.calls), held.error
            else:
                if (
                    what == "sample"
                ):  # whose threads may still be spinning, elsewhere, and caches are cold here
                    time.sleep(0.05)
                    held.sample(*args)
                result = getattr(held, what)(*args)
            answer = {"result": result}
        except Absent as error:
            answer = {"absent": str(error)}
        except Exception as error:  # of somebody else's code, which may raise anything
            answer = {"absent": said(error)}
        print(json.dumps(answer), file=answers, flush=True)
