"""What may be read of a model's folder: files that lie in it, and JSON of bounded size."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TEMPLATES = "additional_chat_templates"
WEIGHTS = {  # endings of files that are not copied
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".npz",
    ".ot",
    ".tflite",
}
SMALL = 100_000_000  # most bytes of a file that is copied, and of a JSON file
DEPTH = (
    100  # of objects and lists in each other; Python and transformers recurse over them
)
# Names of numbers in a config. A model makes as many modules, one by one.
COUNTS = re.compile("layer|expert|head|depth|blocks|stage|group|label")
MANY = 1_000_000


def roots(folder: Path) -> list[Path]:
    """The folders that hold the model.

    These are its own and, for a snapshot in the hub's cache, blobs/, to which its files link.
    """
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        return [folder, (folder.parent.parent / "blobs").resolve()]
    return [folder]


def lies_in(path: Path, folders: list[Path]) -> bool:
    """Whether a file, or what it links to, lies in one of these folders or below."""
    target = path.resolve()
    return any(folder in target.parents for folder in folders)


def is_file(path: Path) -> bool:
    """Whether it is a file, or a link to one. False for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_plain(name: object) -> bool:
    """Whether it is the name of a file in a folder, and not a path to elsewhere."""
    return isinstance(name, str) and Path(name).name == name


def file_in(folder: Path, name: str) -> Path:
    """The file of that name.

    Raises:
        ValueError: it is a link that leads out of the folder.
    """
    path = folder / name
    if not lies_in(path, roots(folder)):
        raise ValueError(f"{path} is a link out of MODEL, which is not followed")
    return path


def read_json(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
        ValueError: the file cannot be read, is too large or too deep, or holds no object.
    """
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if size > SMALL:
        raise ValueError(
            f"cannot read {path}: it has {size:,} bytes, and may have {SMALL:,}"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(
            f"cannot read {path}: it is nested more than {DEPTH} deep"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"cannot read {path}: it must hold a JSON object")
    if is_deeper_than(value, DEPTH):
        raise ValueError(f"cannot read {path}: it is nested more than {DEPTH} deep")
    return value


def children(value: object) -> Iterable[object]:
    """The values that a JSON object or list holds."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def is_deeper_than(value: object, depth: int) -> bool:
    """Whether objects and lists are nested more than `depth` deep."""
    level = [value]
    for _ in range(depth):
        level = [child for parent in level for child in children(parent)]
    return bool(level)


def refuse_counts(path: Path, config: dict) -> None:
    """Refuses a config with so many layers, heads or labels that making them would never end.

    Raises:
        ValueError: it does.
    """
    waiting = [("", config)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(name, item) for item in value]
        elif isinstance(value, int) and value > MANY and COUNTS.search(name.lower()):
            raise ValueError(
                f"cannot read {path}: {name} is {value}, and may be {MANY}"
            )


def beside_weights(folder: Path) -> tuple[list[Path], list[Path]]:
    """(files to copy, links that are not copied): what is small, not hidden, no weights."""
    links = []
    files = []
    for path in entries(folder):
        if path.name.startswith(".") or path.suffix in WEIGHTS:
            continue
        if path.is_symlink() and not lies_in(path, roots(folder)[1:]):
            links.append(path)
        elif is_file(path) and path.stat().st_size <= SMALL:
            files.append(path)
    return files, links


def entries(folder: Path) -> Iterator[Path]:
    """What lies in the folder, and in that of its chat templates unless that is a link."""
    yield from sorted(folder.iterdir())
    templates = folder / TEMPLATES
    if templates.is_dir() and not templates.is_symlink():
        yield from sorted(templates.iterdir())
