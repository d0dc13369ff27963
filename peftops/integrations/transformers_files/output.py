"""OUT: a folder in which a file is either whole or not there, and that a later run goes on with.

While a file is written it lies in a folder of our own inside OUT. The next run clears that folder.
"""

import json
import os
import shutil

from ..._errors import sentence

UNFINISHED = "unfinished.json"  # in OUT until all is there: what it is being made of
BEING_WRITTEN = "unfinished.files"


def begin(out, origin):
    """OUT is new, or was begun with the same origin, or ValueError."""
    progress = out / UNFINISHED
    try:
        if progress.is_file():
            if not holds(progress, origin):
                raise ValueError(
                    f"{out} was begun from another model or with other options: finish those, or remove it"
                )
            clear(out)
            return
        held = names(out) - {BEING_WRITTEN}
        if BEING_WRITTEN in names(out):
            held |= {f"{BEING_WRITTEN}/{name}" for name in names(out / BEING_WRITTEN) - {UNFINISHED}}
        if held:
            raise ValueError(f"{out} is not empty: it holds {sorted(held)[0]}")
        clear(out)
        put(out, UNFINISHED, lambda path: path.write_text(json.dumps(origin, indent=1) + "\n"))
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror or sentence(error)}") from None


def names(folder):
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def holds(progress, origin):
    try:
        return json.loads(progress.read_text()) == origin
    except (ValueError, RecursionError):
        return False


def put(out, name, write):
    """write(path) makes a file in our own folder, which then takes its place in OUT: a half-written one never does."""
    place = out / name
    path = out / BEING_WRITTEN / place.name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(path)
        with path.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave the name without the bytes
        place.parent.mkdir(exist_ok=True)
        os.replace(path, place)
    finally:
        clear(out)


def clear(out):
    """Removes what is half written: it is of no use to anybody."""
    if os.path.lexists(out / BEING_WRITTEN):
        shutil.rmtree(out / BEING_WRITTEN)


def end(out):
    """All is there."""
    (out / UNFINISHED).unlink()


def take_back(out, shards):
    """Leaves OUT as begin found it, unless a shard is finished."""
    if not any((out / name).exists() for name in shards):
        clear(out)
        (out / UNFINISHED).unlink()
