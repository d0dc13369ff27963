"""peftops bench: time a row's contenders on this machine, after proving that they compute right."""

import datetime
import importlib
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median, quantiles

from peftops.cli import BadInput, Parser, device_name, find_device, need, probability, replace
from peftops.cli.doctor import installed

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
ROWS = ("lora", "model")
MARKS = "<!-- bench -->", "<!-- /bench -->"
SHORTEST = 0.005  # seconds of a sample


def options(argv):
    parser = Parser("peftops bench", description=__doc__)
    parser.add_argument("row", metavar="ROW", help=f"{', '.join(ROWS)}; or readme, which rewrites README's table")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", type=shape, metavar="m,k,n,r", help="instead of the layers of real models")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--dropout", type=probability, help="by default 0 and 0.1")
    parser.add_argument("--quick", action="store_true", help="one small layer, few rounds")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"where to append results, by default {RESULTS.name}/")
    return parser.parse_args(argv)


def shape(text):
    sizes = text.split(",")
    if len(sizes) != 4 or not all(size.isdigit() and int(size) for size in sizes):
        raise BadInput(f"--shape must be four whole numbers m,k,n,r, got {text!r}")
    return tuple(map(int, sizes))


def main(argv=None):
    o = options(argv)
    if o.row == "readme":
        return readme(HERE.parent / "README.md", o.out or RESULTS)
    if o.row not in ROWS:
        raise BadInput(f"there is no row {o.row!r}; there are {', '.join(ROWS)}")
    need("torch", "peft", "transformers", *(("gguf",) if o.row == "model" else ()))
    device = find_device(o.device)
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[o.dtype]
    row = importlib.import_module(f".{o.row}", __package__)
    if wrong := unlawful(row, dtype, device):
        print(wrong)
        return 1
    folder, why = (o.out, None) if o.out else place()
    if why:
        print(f"Results are only shown, since {why}.")
    about = describe(device) | {"row": o.row, "dtype": o.dtype}
    for line in row.measure(o, dtype, device, race):
        show(line, row)
        if folder:
            append(folder / f"{slug(about['device'])}.jsonl", about | line)
    return 0


def unlawful(row, dtype, device):
    """A sentence on the first case that is computed wrong, or None."""
    import torch

    import peftops.functional  # noqa: F401  registers the ops
    from peftops import backends

    from .cases import SHAPES
    from .law import check

    for op in row.OPS:
        backend = backends.find(op, torch.empty(0, dtype=dtype, device=device)).__module__.split(".")[1]
        for sizes in SHAPES:
            for label, error, bound in check(op, backend, sizes, dtype, device):
                if not error <= bound:
                    where = f"{op} on {backend}, {sizes}, {label}"
                    return f"{where} is wrong (error {error:.1e}, at most {bound:.1e}), so it is not timed."
    return None


def race(calls, ours, rounds, device, common):
    """A result for each pass: contenders take turns, round by round; ratios are medians of those within a round."""
    for kind in calls[ours]:
        runs = {label: call[kind] for label, call in calls.items() if kind in call}
        repeats = {label: warm(run, device) for label, run in runs.items()}
        times = {label: [] for label in runs}
        for _ in range(rounds):
            for label, run in runs.items():
                times[label].append(sample(run, repeats[label], device))
        ratio = {
            label: round(median(a / b for a, b in zip(times[ours], values, strict=True)), 4)
            for label, values in times.items()
            if label != ours
        }
        yield common | {"pass": kind, "ms": {label: spread(t) for label, t in times.items()}, "ratio": ratio}


def warm(run, device):
    """How many calls make a sample long enough, once everything lazy has happened."""
    for _ in range(3):
        run()
    return max(1, round(SHORTEST / max(sample(run, 2, device), 1e-7)))


def sample(run, repeats, device):
    """Seconds of one call: by events on a GPU, by the clock elsewhere."""
    if device.type == "cuda":
        import torch

        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def spread(seconds):
    """Milliseconds: 20th, 50th, 80th percentile."""
    low, _, _, high = quantiles(seconds, n=5, method="inclusive")
    return [round(1000 * value, 5) for value in (low, median(seconds), high)]


def show(line, row):
    m, k, n, r = line["shape"]
    ours = line["ms"][row.OURS]
    ratios = ", ".join(f"{ratio:.2f} × {label}" for label, ratio in line["ratio"].items())
    where = f"{line['layer']} ({m}, {k}, {n}, {r}), p = {line['dropout']}, {line['pass']}"
    print(f"{where}: {ours[1]:.3f} ms ({ours[0]:.3f}–{ours[2]:.3f}) on {line['backend']} = {ratios}", flush=True)


def place():
    """(folder for results, None), or (None, why they are not kept)."""
    if not (HERE.parent / ".git").exists():
        return None, "this is not a git checkout; --out DIR keeps them"
    changed = git("status", "--porcelain", "--", ".", ":!bench/results", ":!README.md")
    return (None, "the git tree has changes; --out DIR keeps them") if changed else (RESULTS, None)


def git(*args):
    done = subprocess.run(["git", "-C", HERE.parent, *args], capture_output=True, text=True)
    return done.stdout.strip() if not done.returncode else "unknown"


def describe(device):
    commit = git("rev-parse", "--short=12", "HEAD") if (HERE.parent / ".git").exists() else "unknown"
    changed = place()[1] and commit != "unknown"
    return {
        "commit": commit + "+changes" * bool(changed),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in ("torch", "triton", "peft")},
    }


def slug(name):
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def append(file, line):
    old = file.read_text() if file.exists() else ""
    old += "\n" * (old != "" and not old.endswith("\n"))
    replace(file, lambda beside: beside.write_text(old + json.dumps(line, ensure_ascii=False) + "\n"))


def readme(target, folder):
    """Rewrites the table between the marks from the newest result of each kind."""
    newest = {}
    for file in sorted(folder.glob("*.jsonl")):
        for number, text in enumerate(file.read_text().splitlines(), 1):
            try:
                line = json.loads(text)
                key = (line["device"], line["layer"], line["dtype"], line["dropout"], line["pass"])
                newest[key] = max(line, newest.get(key, line), key=lambda line: line["date"])
            except (ValueError, KeyError, TypeError):
                raise BadInput(f"{file}, line {number} is damaged; mend or delete that line") from None
    if not newest:
        raise BadInput(f"there are no results in {folder}; peftops bench lora makes some")
    try:
        text = target.read_text()
        head, (_, tail) = text.split(MARKS[0])[0], text.split(MARKS[0])[1].split(MARKS[1])
    except (OSError, IndexError, ValueError):
        raise BadInput(f"{target} must exist and hold {MARKS[0]} and {MARKS[1]} once") from None
    body = "\n".join([MARKS[0], *tables(newest.values()), MARKS[1]])
    replace(target, lambda beside: beside.write_text(head + body + tail))
    return 0


def tables(lines):
    """Markdown: a table for each device, times as multiples of the frozen layer's.

    From the medians of ratios within a round, which a machine that slows down for a while does not move.
    """
    names = ("PEFT", "PEFT, bfloat16 adapters", "peftops")
    for name in sorted({line["device"] for line in lines}):
        mine = [line for line in lines if line["device"] == name]
        shown = [line for line in mine if line["pass"] != "forward" or line["shape"][0] == 1]
        newest = max(mine, key=lambda line: line["date"])
        made = " / ".join(sorted({line["commit"] for line in shown}))
        versions = ", ".join(f"{package} {number}" for package, number in newest["versions"].items())
        yield f"\n{name}, commit {made}, {newest['date'][:10]}, {versions}; times as multiples of the frozen layer's:\n"
        yield "| layer | m, k, n, r | dtype | dropout | pass | PEFT | PEFT, bf16 adapters | **peftops** | speed-up |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for line in shown:
            ours = line["ratio"]["frozen"]
            times = {label: ours / line["ratio"].get(label, 1) for label in names if label in line["ms"]}
            cells = [f"{times[label]:.2f}" if label in times else "–" for label in names]
            cells[-1], sizes = f"**{cells[-1]}**", ", ".join(map(str, line["shape"]))
            facts = line["layer"], sizes, line["dtype"], line["dropout"], line["pass"]
            yield f"| {' | '.join(map(str, facts))} | {' | '.join(cells)} | {1 / line['ratio']['PEFT']:.2f}× PEFT |"
        yield ""


if __name__ == "__main__":
    from peftops.__main__ import main as run

    raise SystemExit(run(["bench", *sys.argv[1:]]))
