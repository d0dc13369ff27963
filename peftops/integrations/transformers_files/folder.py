"""What may be read of a model's folder: files that lie in it, and JSON that is neither huge nor deep."""

import json
import re
from pathlib import Path

TEMPLATES = "additional_chat_templates"
WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz", ".ot", ".tflite",
}  # fmt: skip
SMALL = 100_000_000  # bytes of a file that is copied, and of a JSON file
DEPTH = 100  # of objects and lists in each other; Python and transformers recurse over them
COUNTS = re.compile(
    "layer|expert|head|depth|blocks|stage|group|label"
)  # numbers of things that a model makes one by one
MANY = 1_000_000


def roots(folder):
    """The folders that hold the model: its own, and blobs/ of the hub's cache, whose snapshots are links to it."""
    folder = folder.resolve()
    snapshot = folder.parent.name == "snapshots"
    return [folder, (folder.parent.parent / "blobs").resolve()] if snapshot else [folder]


def lies_in(path, folders):
    target = path.resolve()
    return any(folder in target.parents for folder in folders)


def exists(path):
    """Is it a file, or a link to one? A name that no file can have is not."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def inside(folder, name):
    """The file of that name, or ValueError where it is a link that leads out of the folder."""
    path = folder / name
    if not lies_in(path, roots(folder)):
        raise ValueError(f"{path} is a link out of MODEL, which is not followed")
    return path


def read_json(path):
    """The object in a file, or ValueError."""
    try:
        size = path.stat().st_size
        value = json.loads(path.read_text(encoding="utf-8")) if size <= SMALL else None
    except RecursionError:
        raise ValueError(f"cannot read {path}: it is nested more than {DEPTH} deep") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if size > SMALL:
        raise ValueError(f"cannot read {path}: it has {size:,} bytes, and may have {SMALL:,}")
    if not isinstance(value, dict):
        raise ValueError(f"cannot read {path}: it must hold a JSON object")
    if deeper_than(value, DEPTH):
        raise ValueError(f"cannot read {path}: it is nested more than {DEPTH} deep")
    return value


def children(value):
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def deeper_than(value, depth):
    level = [value]
    for _ in range(depth):
        level = [child for parent in level for child in children(parent)]
    return bool(level)


def refuse_counts(path, config):
    """ValueError where config asks for so many layers, heads or labels that making them would never end."""
    waiting = [("", config)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(name, item) for item in value]
        elif isinstance(value, int) and value > MANY and COUNTS.search(name.lower()):
            raise ValueError(f"cannot read {path}: {name} is {value}, and may be {MANY}")


def beside_weights(folder):
    """(files to copy, links that are not copied): what is small, not hidden, and not weights."""
    links, files = [], []
    templates = folder / TEMPLATES
    places = [folder] if templates.is_symlink() else [folder, templates]
    for path in (path for place in places if place.is_dir() for path in sorted(place.iterdir())):
        if path.name.startswith(".") or path.suffix in WEIGHTS:
            continue
        if path.is_symlink() and not lies_in(path, roots(folder)[1:]):
            links.append(path)
        elif exists(path) and path.stat().st_size <= SMALL:
            files.append(path)
    return files, links


def is_plain(name):
    """Is it the name of a file in a folder, and not a path to elsewhere?"""
    return isinstance(name, str) and Path(name).name == name
