"""peftops bench compare COMMIT: time this tree against another commit, layer by layer.

Both trees take turns in every round. ROW: lora, nf4, dora, multi (by default lora alone): our
layer of that row in both trees.
"""

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

from peftops.cli import BadInput, Parser, find_device, need, probability

from . import results
from .__main__ import ROWS, shape, torch_dtype
from .progress import Progress


def options(argv):
    parser = Parser("peftops bench compare", description=__doc__)
    parser.add_argument(
        "commit",
        metavar="COMMIT",
        help="of this checkout: a name that git knows",
    )
    parser.add_argument(
        "rows",
        nargs="*",
        metavar="ROW",
        help=f"of {', '.join(ROWS)}; by default lora",
    )
    parser.add_argument(
        "--device", help="by default cuda where there is a GPU, else cpu"
    )
    parser.add_argument(
        "--shape",
        type=shape,
        metavar="m,k,n,r",
        help="instead of the layers of real models",
    )
    parser.add_argument(
        "--dtype",
        default="bf16",
        choices=["bf16", "fp16", "fp32"],
        help="of weights and input",
    )
    parser.add_argument(
        "--dropout",
        type=probability,
        help="by default 0 and 0.1",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one small layer, few rounds",
    )
    return parser.parse_intermixed_args(argv)


def main(argv=None):
    o = options(argv)
    if unknown := [row for row in o.rows if row not in ROWS]:
        raise BadInput(f"there is no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    need("torch", "peft", "pybind11", "ninja", extra="bench")
    device = find_device(o.device)
    dtype = torch_dtype(o.dtype)
    commit = resolve(o.commit)
    try:
        with tempfile.TemporaryDirectory() as folder, Progress() as progress:
            tree = check_out(commit, Path(folder, "tree"))
            for line in measure(o, dtype, device, tree, commit, progress):
                print(line, flush=True)
    finally:  # the folder is gone by now, so git must forget the worktree
        results.git("worktree", "prune")
    return 0


def resolve(name: str) -> str:
    """The commit that git knows by this name, in 12 hex digits."""
    if not (results.HERE.parent / ".git").exists():
        raise BadInput("compare needs a git checkout")
    commit = results.git("rev-parse", "--verify", "--short=12", f"{name}^{{commit}}")
    if commit in ("", "unknown"):
        raise BadInput(f"there is no commit {name!r} here")
    return commit


def check_out(commit: str, tree: Path) -> Path:
    """A worktree of the commit with its extension built in place."""
    results.git("worktree", "add", "--detach", str(tree), commit)
    if not (tree / "setup.py").exists():
        raise BadInput(f"git cannot check {commit} out")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(
        command,
        cwd=tree,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["?"]
        raise BadInput(f"{commit} does not build: {lines[-1]}")
    return tree


def problems(o, dtype, device):
    """(name, problem) of everything to compare.

    Rows share the names of layers. So the name begins with its row, except for lora.
    """
    for row in dict.fromkeys(o.rows or ["lora"]):
        module = importlib.import_module(f".{row}", __package__)
        for name, problem in module.jobs(o, dtype, device):
            yield name if row == "lora" else f"{row}, {name}", problem


def measure(o, dtype, device, tree, commit, progress):
    """A line for each problem and pass, and one for each problem that a tree cannot compute."""
    from .peers import OURS, Absent
    from .worker import Remote

    jobs = list(problems(o, dtype, device))
    rounds = 5 if o.quick else 15
    for name, problem in progress.track(jobs, len(jobs), "comparing"):
        where = f"{name} {problem.shape}, p = {problem.p}"
        remotes = {}
        for label, folder in (("this tree", None), (commit, tree)):
            try:
                remotes[label] = Remote(OURS, problem, folder)
            except Absent as error:
                yield f"{where}: {label} is absent ({error})"
        if len(remotes) == 2:
            for pass_name in remotes["this tree"].calls:
                yield f"{where}, {pass_name}: {race(remotes, pass_name, rounds, commit)}"
        for remote in remotes.values():
            remote.close()


def race(remotes, pass_name, rounds, commit):
    """How the times of one pass compare, or who failed at it, in words."""
    from . import timing

    seconds, failures = timing.race(remotes, pass_name, "eager", rounds)
    if failures:
        return "; ".join(
            f"{label} is absent ({why})" for label, why in failures.items()
        )
    ratio = timing.ratios(seconds, "this tree")[commit]
    low, mid, high = timing.spread(seconds["this tree"])
    return f"{ratio:.3f} × {commit}'s time; {mid:.3f} ms ({low:.3f}–{high:.3f})"
