"""The commands, and what they share.

main(argv) of each command returns the exit code. Heavy packages are imported inside functions, so
that a command starts fast.
"""

import argparse
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .._errors import not_installed
from .._errors import sentence as sentence  # commands and bench import it from here

if TYPE_CHECKING:
    import torch

SHOWN = 1000  # characters of a message


class BadInput(Exception):
    """One sentence for the user. The command ends with exit code 2."""


@contextmanager
def refusing(show: Callable[[str], str] = str) -> Iterator[None]:
    """Turns a ValueError into BadInput. Wrap only the call whose errors are for the user.

    Args:
        show: turns the text of the error into the text for the user.
    """
    try:
        yield
    except ValueError as error:
        raise BadInput(show(str(error))) from None


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that names the default of an option, unless it says nothing."""

    def _get_help_string(self, action):
        silent = (
            action.default is None or action.default is False or action.default == ()
        )
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser that raises BadInput instead of ending the process."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=Help, **kwargs)

    def error(self, message):
        raise BadInput(message)


def need(*packages: str, extra: str | None = None) -> None:
    """Raises BadInput if a package is not installed. The text has the pip command for it.

    Args:
        extra: the extra of peftops that installs the packages, if there is one.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise BadInput(not_installed(missing, extra))


def find_device(name: str | None = None) -> "torch.device":
    """The device of this name, or without a name the GPU if there is one, else the CPU.

    Raises:
        BadInput: this machine has no such device.
    """
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"there is no device {name!r}; try cpu or cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(
            f"there is no device {name!r} on this machine;"
            f" torch {torch.__version__} sees no such GPU"
        )
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"device must be cpu or cuda, got {name!r}")
    return device


INSTRUCTIONS = {
    "portable": "portable",
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "avx512_bf16": "AVX-512 bf16",
}


def cpu_kernels() -> str:
    """The instructions that the kernels use on this CPU, or "no kernels"."""
    try:
        from peftops._C import cpu
    except ImportError:
        return "no kernels"
    isa = cpu.__name__.rpartition(".")[2]
    return INSTRUCTIONS.get(isa, isa)


def device_name(device: "torch.device") -> str:
    """The name of this device in a table. For a CPU it includes the instructions of the kernels."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return f"{cpu_model()}, {cpu_kernels()}"


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(": ")[2].strip()
    return platform.processor() or platform.machine()


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Replaces a file by a new one, so that no reader ever sees half of it.

    Args:
        path: the file.
        write: write(beside) makes the new file beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    try:
        write(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())  # else after a power cut the file may be empty
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def named(text: str) -> Path:
    """The path of a folder. An empty text, which would be the current folder, is refused."""
    if not text:
        raise argparse.ArgumentTypeError("must name a folder, got ''")
    return Path(text)


def folder(text: str) -> Path:
    """The path of a folder that can be written to or made. The check leaves nothing behind."""
    path = named(text)
    try:
        ancestors = path, *path.absolute().parents
        nearest = next(ancestor for ancestor in ancestors if ancestor.exists())
        with tempfile.TemporaryDirectory(dir=nearest):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"cannot write to {text}: {error.strerror}"
        ) from None


def escaped(text: str) -> str:
    """The text with escapes for line breaks and for characters that move the cursor."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def one_line(text: str) -> str:
    """Untrusted text for a message: cut to SHOWN characters, and no character moves the cursor."""
    return escaped(text[:SHOWN]) + ("…" if len(text) > SHOWN else "")


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(
            f"must be a whole number from 1 on, got {text!r}"
        )
    return int(text)


def probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text!r}")
    return value
