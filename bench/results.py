"""Where results are kept, as lines of JSON that are only ever added, and what each says of its machine."""

import datetime
import json
import platform
import re
import subprocess
from collections import defaultdict
from pathlib import Path

from peftops.cli import BadInput, device_name
from peftops.cli.doctor import installed

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PACKAGES = "torch", "triton", "peft"
EVENTS = "results.jsonl"  # of bench gpu, which keeps results beside it
PARTIAL = "quick", "shape", "peers", "backend"  # options of runs that do not stand for a device


def keep(o):
    """(folder for results, None), or (None, why they are not kept), of the options of a command."""
    if o.out:
        return o.out, None
    partial = [f"--{name}" for name in PARTIAL if getattr(o, name, None)]
    return (
        (None, f"a run with {' and '.join(partial)} is but a part; --out DIR keeps them")
        if partial
        else place()
    )


def place():
    """(folder for results, None), or (None, why they are not kept)."""
    if not (HERE.parent / ".git").exists():
        return None, "this is not a git checkout; --out DIR keeps them"
    changed = git("status", "--porcelain", "--", ".", ":!bench/results", ":!README.md")
    return (
        (None, "the git tree has changes; --out DIR keeps them") if changed else (RESULTS, None)
    )


def git(*args):
    try:
        done = subprocess.run(["git", "-C", HERE.parent, *args], capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() if not done.returncode else "unknown"


def describe(device):
    """What every line says: when, on what, with what."""
    commit = (
        git("rev-parse", "--short=12", "HEAD") if (HERE.parent / ".git").exists() else "unknown"
    )
    changed = commit != "unknown" and place()[1]
    about = {
        "commit": commit + "+changes" * bool(changed),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
    }
    return about | {"driver": driver(), "cuda": cuda()} if device.type == "cuda" else about


def driver():
    """The version of NVIDIA's kernel module, or of AMD's."""
    for file, pattern in (
        ("/proc/driver/nvidia/version", r"(\d+\.[\d.]+)"),
        ("/sys/module/amdgpu/version", r"(\S+)"),
    ):
        if Path(file).exists() and (found := re.search(pattern, Path(file).read_text())):
            return found[1]
    return "unknown"


def cuda():
    import torch

    return torch.version.cuda or torch.version.hip


def beside(ratios):
    """{peer: ours over theirs} in words"""
    return ", ".join(f"{ratio:.2f} × {peer}" for peer, ratio in ratios.items())


def slug(name):
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def append(file, line):
    """Adds a line, on a line of its own whatever the file ends with, and touches nothing that stands there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+b") as out:
        out.seek(0, 2)
        if out.tell():
            out.seek(-1, 2)
            cut = out.read(1) != b"\n"
        else:
            cut = False
        out.write(b"\n" * cut + json.dumps(line, ensure_ascii=False).encode() + b"\n")


def key(line):
    """What a later line takes the place of."""
    return tuple(line[name] if name != "shape" else tuple(line[name]) for name in KEY)


KEY = "device", "row", "layer", "shape", "dtype", "dropout", "pass"


NUMBER = int, float
TYPES = {
    **dict.fromkeys(("commit", "date", "device", "row", "layer", "dtype", "pass"), str),
    **{"versions": dict, "shape": list, "dropout": NUMBER, "ms": dict, "ratio": dict},
}
RATES = dict.fromkeys(
    ("roofline", "flops", "bytes", "tflops", "gemm_tflops", "copy_gbps"), NUMBER
)
PERHAPS = {
    "absent": dict,
    "graph_ms": dict,
    "graph_ratio": dict,
    "op": str,
    "backend": str,
    "path": str,
}


def fault(line):
    """What is wrong with a line, or None."""
    if not isinstance(line, dict):
        return "it is no object"
    wanted = (
        TYPES
        | (RATES if "roofline" in line else {})
        | {name: PERHAPS[name] for name in PERHAPS if name in line}
    )
    for name, kind in wanted.items():
        if not isinstance(line.get(name), kind):
            return (
                f"it has no {name}"
                if name not in line
                else f"its {name} is {json.dumps(line[name])[:60]}"
            )
    if len(line["shape"]) < 2 or not all(isinstance(size, int) for size in line["shape"]):
        return f"its shape is {line['shape']}"
    ratios = [*line["ratio"].values(), *line.get("graph_ratio", {}).values()]
    if not all(isinstance(ratio, NUMBER) and ratio > 0 for ratio in ratios):
        return "its ratios must be numbers above zero"
    times = [*line["ms"].values(), *line.get("graph_ms", {}).values()]
    if not all(
        isinstance(ms, list) and len(ms) == 3 and all(isinstance(t, NUMBER) for t in ms)
        for ms in times
    ):
        return "its ms must be three numbers each"
    return None


def newest(folder):
    """The newest line of each kind in a folder."""
    found = {}
    for file in sorted(path for path in folder.glob("*.jsonl") if path.name != EVENTS):
        for number, line in read(file):
            if why := fault(line):
                raise BadInput(
                    f"{file}, line {number} is damaged ({why}); mend or delete that line"
                )
            found[key(line)] = max(
                line, found.get(key(line), line), key=lambda line: line["date"]
            )
    if not found:
        raise BadInput(f"there are no results in {folder}; peftops bench lora makes some")
    return list(found.values())


def read(file):
    """(number, line) of each that is not blank."""
    try:
        texts = file.read_bytes().split(b"\n")
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror}") from None
    for number, text in enumerate(texts, 1):
        try:
            if text.strip():
                yield number, json.loads(text.decode())
        except ValueError:
            raise BadInput(
                f"{file}, line {number} is damaged (it is no JSON); mend or delete that line"
            ) from None


def swept(line):
    """Whether a line belongs to one layer's sweep over rows, which only a plot shows."""
    return line["layer"].endswith(" rows") and family(line) == "lora"


METHODS = {"qlora": "nf4", "dora": "dora", "qdora": "dora"}


def family(line):
    """What a line is shown among: lora, nf4, dora, or DoRA's norms."""
    if line["row"] == "model":  # whose layers say how it was trained
        found = [METHODS[word] for word in line["layer"].split(", ") if word in METHODS]
        return found[0] if found else "lora"
    return "norm" if line.get("op") == "dora_norm" else line["row"]


def absentees(lines):
    """A phrase for each reason: who was not there in any of the lines because of it."""
    reasons = defaultdict(set)
    for line in lines:
        for peer, why in line.get("absent", {}).items():
            reasons[str(why)] |= {peer} - set(line["ratio"])
    return [
        f"{', '.join(sorted(peers))} ({why})" for why, peers in sorted(reasons.items()) if peers
    ]
