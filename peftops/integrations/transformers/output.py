"""The folder OUT: each file in it is either whole or not there. A later run goes on with it.

While a file is written it lies in a folder of our own inside OUT, which the next run clears.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from ..._errors import sentence

UNFINISHED = (
    "unfinished.json"  # what OUT is being made of; it lies there until all is there
)
BEING_WRITTEN = "unfinished.files"


def begin(out: Path, origin: dict) -> None:
    """Makes OUT, or clears what an earlier run left half written.

    Args:
        out: a folder that is new, empty, or begun with the same origin.
        origin: everything that the result depends on, as JSON.

    Raises:
        ValueError: OUT is another folder, or cannot be written to.
    """
    try:
        begin_or_go_on(out, origin)
    except OSError as error:
        raise ValueError(
            f"cannot write to {out}: {error.strerror or sentence(error)}"
        ) from None


def begin_or_go_on(out: Path, origin: dict) -> None:
    """As begin, but with OSError where OUT cannot be written to."""
    mark = out / UNFINISHED
    if mark.is_file():
        if not holds(mark, origin):
            raise ValueError(
                f"{out} was begun from another model or with other options: "
                "finish those, or remove it"
            )
        clear(out)
        return
    content = names_in(out)
    strangers = content - {BEING_WRITTEN}
    if BEING_WRITTEN in content:
        inside = names_in(out / BEING_WRITTEN) - {UNFINISHED}
        strangers |= {f"{BEING_WRITTEN}/{name}" for name in inside}
    if strangers:
        raise ValueError(f"{out} is not empty: it holds {sorted(strangers)[0]}")
    clear(out)
    put(
        out,
        UNFINISHED,
        lambda path: path.write_text(json.dumps(origin, indent=1) + "\n"),
    )


def names_in(folder: Path) -> set[str]:
    """The names of what a folder holds; none where it does not exist."""
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def holds(mark: Path, origin: dict) -> bool:
    """Whether the file `mark` says that OUT was begun from this origin."""
    try:
        return json.loads(mark.read_text()) == origin
    except (ValueError, RecursionError):
        return False


def put(
    out: Path,
    name: str | Path,
    write: Callable[[Path], object],
) -> None:
    """Makes one file of OUT. A half-written one never takes its place.

    Args:
        out: the folder OUT, after begin.
        name: where in OUT.
        write: makes a file at the path that it is given, in our own folder.
    """
    place = out / name
    path = out / BEING_WRITTEN / place.name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(path)
        with path.open("rb") as file:
            os.fsync(
                file.fileno()
            )  # else a power cut may leave the name without the bytes
        place.parent.mkdir(exist_ok=True)
        os.replace(path, place)
    finally:
        clear(out)


def put_json(
    out: Path,
    name: str | Path,
    value: dict,
) -> None:
    """Makes one JSON file of OUT, as put does."""
    put(out, name, lambda path: path.write_text(json.dumps(value, indent=2) + "\n"))


def clear(out: Path) -> None:
    """Removes what is half written and cannot be used."""
    if os.path.lexists(out / BEING_WRITTEN):
        shutil.rmtree(out / BEING_WRITTEN)


def end(out: Path) -> None:
    """Marks OUT as complete."""
    (out / UNFINISHED).unlink()


def take_back(out: Path, shards: Iterable[str]) -> None:
    """Leaves OUT as begin met it, unless a shard is finished."""
    if not any((out / name).exists() for name in shards):
        clear(out)
        (out / UNFINISHED).unlink()
