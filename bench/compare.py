"""peftops bench compare COMMIT: this tree against another commit's, layer by layer, taking turns round by round.

ROW: lora, nf4, dora (by default lora alone): our layer of that row in both trees.
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


def main(argv=None):
    parser = Parser("peftops bench compare", description=__doc__)
    parser.add_argument(
        "commit", metavar="COMMIT", help="of this checkout: a name that git knows"
    )
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; by default lora"
    )
    parser.add_argument("--device", help="by default cuda where there is a GPU, else cpu")
    parser.add_argument(
        "--shape", type=shape, metavar="m,k,n,r", help="instead of the layers of real models"
    )
    parser.add_argument(
        "--dtype", default="bf16", choices=["bf16", "fp16", "fp32"], help="of weights and input"
    )
    parser.add_argument("--dropout", type=probability, help="by default 0 and 0.1")
    parser.add_argument("--quick", action="store_true", help="one small layer, few rounds")
    o = parser.parse_intermixed_args(argv)
    if unknown := [row for row in o.rows if row not in ROWS]:
        raise BadInput(f"there is no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    need("torch", "peft", "pybind11", "ninja")
    device, dtype = find_device(o.device), torch_dtype(o.dtype)
    commit = resolve(o.commit)
    try:
        with tempfile.TemporaryDirectory() as folder, Progress() as progress:
            tree = check_out(commit, Path(folder, "tree"))
            for line in measure(o, dtype, device, tree, commit, progress):
                print(line, flush=True)
    finally:  # the folder is gone, and git is to forget it, wherever this stopped
        results.git("worktree", "prune")
    return 0


def resolve(name):
    if not (results.HERE.parent / ".git").exists():
        raise BadInput("compare needs a git checkout")
    found = results.git("rev-parse", "--verify", "--short=12", f"{name}^{{commit}}")
    if found in ("", "unknown"):
        raise BadInput(f"there is no commit {name!r} here")
    return found


def check_out(commit, tree):
    """A worktree of the commit with its extension built in place."""
    results.git("worktree", "add", "--detach", str(tree), commit)
    if not (tree / "setup.py").exists():
        raise BadInput(f"git cannot check {commit} out")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise BadInput(
            f"{commit} does not build: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
        )
    return tree


def problems(o, dtype, device):
    """(name, problem) of everything to compare. Rows share names of layers, so a name begins with any row but lora."""
    for row in dict.fromkeys(o.rows or ["lora"]):
        for name, problem in importlib.import_module(f".{row}", __package__).jobs(
            o, dtype, device
        ):
            yield name if row == "lora" else f"{row}, {name}", problem


def measure(o, dtype, device, tree, commit, progress):
    """A line for each problem and pass, and one for each problem that a tree cannot compute."""
    from . import timing
    from .peers import OURS, Absent
    from .worker import Remote

    jobs, rounds = list(problems(o, dtype, device)), 5 if o.quick else 15
    for name, problem in progress.track(jobs, len(jobs), "comparing"):
        found = {}
        for label, where in (("this tree", None), (commit, tree)):
            try:
                found[label] = Remote(OURS, problem, where)
            except Absent as error:
                yield f"{name} {problem.shape}, p = {problem.p}: {label} is absent ({error})"
        for kind in found["this tree"].calls if len(found) == 2 else ():
            seconds, failed = timing.race(found, kind, "eager", rounds)
            if failed:
                absent = "; ".join(
                    f"{label} is absent ({why})" for label, why in failed.items()
                )
                yield f"{name} {problem.shape}, p = {problem.p}, {kind}: {absent}"
                continue
            ratio, (low, mid, high) = (
                timing.ratios(seconds, "this tree")[commit],
                timing.spread(seconds["this tree"]),
            )
            where = f"{name} {problem.shape}, p = {problem.p}, {kind}"
            yield f"{where}: {ratio:.3f} × {commit}'s time; {mid:.3f} ms ({low:.3f}–{high:.3f})"
        for one in found.values():
            one.close()
