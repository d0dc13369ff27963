"""Where results are kept, as lines of JSON that are only ever added, and what each says of its machine."""

import datetime
import json
import platform
import re
import subprocess
from pathlib import Path

from peftops.cli import BadInput, device_name
from peftops.cli.doctor import installed

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PACKAGES = "torch", "triton", "peft"


def place():
    """(folder for results, None), or (None, why they are not kept)."""
    if not (HERE.parent / ".git").exists():
        return None, "this is not a git checkout; --out DIR keeps them"
    changed = git("status", "--porcelain", "--", ".", ":!bench/results", ":!README.md")
    return (None, "the git tree has changes; --out DIR keeps them") if changed else (RESULTS, None)


def git(*args):
    try:
        done = subprocess.run(["git", "-C", HERE.parent, *args], capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() if not done.returncode else "unknown"


def describe(device):
    """What every line says: when, on what, with what."""
    commit = git("rev-parse", "--short=12", "HEAD") if (HERE.parent / ".git").exists() else "unknown"
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
    for file, pattern in (("/proc/driver/nvidia/version", r"(\d+\.[\d.]+)"), ("/sys/module/amdgpu/version", r"(\S+)")):
        if Path(file).exists() and (found := re.search(pattern, Path(file).read_text())):
            return found[1]
    return "unknown"


def cuda():
    import torch

    return torch.version.cuda or torch.version.hip


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


def newest(folder):
    """The newest line of each kind in a folder."""
    found = {}
    for file in sorted(folder.glob("*.jsonl")):
        for number, text in enumerate(file.read_text().splitlines(), 1):
            try:
                line = json.loads(text)
                found[key(line)] = max(line, found.get(key(line), line), key=lambda line: line["date"])
                dict(line["ms"]), dict(line["ratio"])
            except (ValueError, KeyError, TypeError):
                raise BadInput(f"{file}, line {number} is damaged; mend or delete that line") from None
    if not found:
        raise BadInput(f"there are no results in {folder}; peftops bench lora makes some")
    return list(found.values())
