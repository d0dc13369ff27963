"""A contender in a process of its own.

It belongs to another tree of peftops, or to a package that changes torch for its whole process.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

HERE = Path(__file__).resolve().parent
# It imports the peftops of the other tree and the bench of this one. The bench uses only public
# names of peftops, so this works.
BOOTSTRAP = """
import sys
tree, bench = sys.argv[1:]
if tree:
    sys.path.insert(0, tree)
    import importlib.util, peftops
    spec = importlib.util.spec_from_file_location(
        "peftops.bench", bench + "/__init__.py", submodule_search_locations=[bench]
    )
    sys.modules["peftops.bench"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["peftops.bench"])
from peftops.bench.worker import serve
serve()
"""


class Remote:
    """Stands for a timing.Contender that lives in another process.

    Args:
        label: a key of peers.BUILDERS.
        problem: the layer to build.
        tree: the folder of another checkout; None for this one.

    Raises:
        Absent: the other process cannot build it. The text is that process' reason.
    """

    def __init__(self, label, problem, tree=None):
        command = [sys.executable, "-c", BOOTSTRAP, str(tree or ""), str(HERE)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        settings = {
            field.name: getattr(problem, field.name) for field in fields(problem)
        }
        settings["dtype"] = str(problem.dtype).removeprefix("torch.")
        settings["device"] = str(problem.device)
        self.calls, self.error = self.ask("build", label, settings)

    def ask(self, request, *args):
        from .peers import Absent

        try:
            print(
                json.dumps([request, *args]),
                file=self.process.stdin,
                flush=True,
            )
            answer = json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            self.close()
            raise Absent(f"its process ended with {self.process.returncode}") from None
        if "absent" in answer:
            raise Absent(answer["absent"])
        return answer["result"]

    def prepare(self, pass_name, mode):
        return self.ask("prepare", pass_name, mode)

    def sample(self, pass_name, mode):
        return self.ask("sample", pass_name, mode)

    def peak(self, pass_name):
        return self.ask("peak", pass_name)

    def close(self):
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve():
    """Answers the requests of a Remote, one line of JSON each.

    Answers go to what was standard output. Everything else that is printed goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from .peers import Absent
    from .timing import said

    held = None
    for line in sys.stdin:
        request, *args = json.loads(line)
        try:
            if request == "build":
                held = build(*args)
                result = list(held.calls), held.error
            else:
                if request == "sample":
                    # Threads of other contenders may still spin, and caches are cold here.
                    time.sleep(0.05)
                    held.sample(*args)
                result = getattr(held, request)(*args)
            answer = {"result": result}
        except Absent as error:
            answer = {"absent": str(error)}
        except Exception as error:  # code of other packages may raise anything
            answer = {"absent": said(error)}
        print(json.dumps(answer), file=answers, flush=True)


def build(label, settings):
    """The contender, on a problem whose fields came as JSON."""
    import torch

    from .peers import Problem, contender

    settings["shape"] = tuple(settings["shape"])
    settings["dtype"] = getattr(torch, settings["dtype"])
    settings["device"] = torch.device(settings["device"])
    return contender(label, Problem(**settings))
