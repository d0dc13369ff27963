"""Where results are kept: files of JSON lines, to which lines are only ever added.

Each line names the machine, the commit and the versions that it was measured with.
"""

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
PARTIAL = (
    "quick",
    "shape",
    "peers",
    "backend",
)  # options of runs that do not stand for a device
KEY = "device", "row", "layer", "shape", "dtype", "dropout", "pass"
NUMBER = int, float
TYPES = {
    "commit": str,
    "date": str,
    "device": str,
    "row": str,
    "layer": str,
    "dtype": str,
    "pass": str,
    "versions": dict,
    "shape": list,
    "dropout": NUMBER,
    "ms": dict,
    "ratio": dict,
}
RATES = {  # in lines with a roofline
    "roofline": NUMBER,
    "flops": NUMBER,
    "bytes": NUMBER,
    "tflops": NUMBER,
    "gemm_tflops": NUMBER,
    "copy_gbps": NUMBER,
}
OPTIONAL = {
    "absent": dict,
    "graph_ms": dict,
    "graph_ratio": dict,
    "op": str,
    "backend": str,
    "path": str,
}
FAMILIES = {
    "qlora": "nf4",
    "dora": "dora",
    "qdora": "dora",
}  # of a method of bench model


def keep(o) -> tuple[Path | None, str | None]:
    """(folder for results, None), or (None, why they are not kept).

    Args:
        o: the options of a command.
    """
    if o.out:
        return o.out, None
    partial = [f"--{name}" for name in PARTIAL if getattr(o, name, None)]
    if partial:
        return (
            None,
            f"a run with {' and '.join(partial)} is but a part; --out DIR keeps them",
        )
    return place()


def place() -> tuple[Path | None, str | None]:
    """(folder for results, None), or (None, why they are not kept)."""
    if not is_checkout():
        return None, "this is not a git checkout; --out DIR keeps them"
    if git(
        "status",
        "--porcelain",
        "--",
        ".",
        ":!bench/results",
        ":!docs/benchmarks.md",
    ):
        return None, "the git tree has changes; --out DIR keeps them"
    return RESULTS, None


def is_checkout() -> bool:
    return (HERE.parent / ".git").exists()


def git(*args: str) -> str:
    """What git prints in this checkout, or "unknown" if it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", HERE.parent, *args],
            capture_output=True,
            text=True,
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() if not done.returncode else "unknown"


def describe(device) -> dict:
    """The fields that every line begins with: when, on what and with what it was measured."""
    commit = git("rev-parse", "--short=12", "HEAD") if is_checkout() else "unknown"
    if commit != "unknown" and place()[1]:
        commit += "+changes"
    origin = {
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(
            timespec="seconds"
        ),
        "device": device_name(device),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
    }
    if device.type == "cuda":
        origin["driver"] = driver()
        origin["cuda"] = cuda()
    return origin


def driver() -> str:
    """The version of NVIDIA's kernel module, or of AMD's."""
    for file, pattern in (
        ("/proc/driver/nvidia/version", r"(\d+\.[\d.]+)"),
        ("/sys/module/amdgpu/version", r"(\S+)"),
    ):
        if Path(file).exists() and (
            match := re.search(pattern, Path(file).read_text())
        ):
            return match[1]
    return "unknown"


def cuda():
    import torch

    return torch.version.cuda or torch.version.hip


def beside(ratios: dict[str, float]) -> str:
    """{peer: ours over theirs} in words."""
    return ", ".join(f"{ratio:.2f} × {peer}" for peer, ratio in ratios.items())


def kernels_used(line: dict) -> str:
    """The backend and its product, where the line says them."""
    return ", ".join(filter(None, (line.get("backend"), line.get("path"))))


def slug(name):
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def append(file: Path, line: dict) -> None:
    """Adds a line. It starts a new line first if the file does not end with one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(line, ensure_ascii=False).encode() + b"\n"
    with open(file, "a+b") as out:
        out.seek(0, 2)
        if out.tell():
            out.seek(-1, 2)
            if out.read(1) != b"\n":
                text = b"\n" + text
        out.write(text)


def key(line):
    """A newer line with the same key replaces this one."""
    return tuple(tuple(line[name]) if name == "shape" else line[name] for name in KEY)


def fault(line) -> str | None:
    """What is wrong with a line, or None."""
    if not isinstance(line, dict):
        return "it is no object"
    types = TYPES | {name: OPTIONAL[name] for name in OPTIONAL if name in line}
    if "roofline" in line:
        types |= RATES
    for name, allowed in types.items():
        if name not in line:
            return f"it has no {name}"
        if not isinstance(line[name], allowed):
            return f"its {name} is {json.dumps(line[name])[:60]}"
    if len(line["shape"]) < 2 or not all(
        isinstance(size, int) for size in line["shape"]
    ):
        return f"its shape is {line['shape']}"
    ratios = [*line["ratio"].values(), *line.get("graph_ratio", {}).values()]
    if not all(isinstance(ratio, NUMBER) and ratio > 0 for ratio in ratios):
        return "its ratios must be numbers above zero"
    times = [*line["ms"].values(), *line.get("graph_ms", {}).values()]
    if not all(is_spread(ms) for ms in times):
        return "its ms must be three numbers each"
    return None


def is_spread(ms):
    """Whether it is what timing.spread returns."""
    return (
        isinstance(ms, list) and len(ms) == 3 and all(isinstance(t, NUMBER) for t in ms)
    )


def newest(folder: Path) -> list[dict]:
    """The newest line for each key in the files of a folder."""
    lines = {}
    for file in sorted(path for path in folder.glob("*.jsonl") if path.name != EVENTS):
        for number, line in read(file):
            if why := fault(line):
                raise BadInput(
                    f"{file}, line {number} is damaged ({why}); mend or delete that line"
                )
            older = lines.get(key(line), line)
            lines[key(line)] = max(line, older, key=lambda line: line["date"])
    if not lines:
        raise BadInput(
            f"there are no results in {folder}; peftops bench lora makes some"
        )
    return list(lines.values())


def read(file):
    """(number, line) of each line that is not blank."""
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


def swept(line: dict) -> bool:
    """Whether a line belongs to the sweep of one layer over its rows. Only a plot shows those."""
    return line["layer"].endswith(" rows") and family(line) == "lora"


def family(line: dict) -> str:
    """The table that shows a line: its row's, host's, or norm for DoRA's norms."""
    if line["row"] == "model":  # the name of the layer says how the model was trained
        for word in line["layer"].split(", "):
            if word in FAMILIES:
                return FAMILIES[word]
        return "lora"
    return "norm" if line.get("op") == "dora_norm" else line["row"]


def absentees(lines: list[dict]) -> list[str]:
    """A phrase for each reason, with the peers that were absent because of it."""
    reasons = defaultdict(set)
    for line in lines:
        for peer, why in line.get("absent", {}).items():
            reasons[str(why)] |= {peer} - set(line["ratio"])
    return [
        f"{', '.join(sorted(peers))} ({why})"
        for why, peers in sorted(reasons.items())
        if peers
    ]
