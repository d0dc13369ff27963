"""The commands: main(argv) of each returns the exit code. Functions do the heavy imports."""

import argparse
import os
import platform
import tempfile
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from .._errors import sentence  # noqa: F401  commands and bench import it from here

SHOWN = 1000  # characters of a message


class BadInput(Exception):
    """One sentence for the user; the command ends with exit code 2."""


@contextmanager
def refusing(show=str):
    """Turns a ValueError into BadInput. Wrap only the call whose errors are for the user.

    Args:
        show: makes what the user reads of the error's text.
    """
    try:
        yield
    except ValueError as error:
        raise BadInput(show(str(error))) from None


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or action.default == ()
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=Help, **kwargs)

    def error(self, message):
        raise BadInput(message)


def need(*packages):
    """Raises BadInput with the command that mends it where a package is not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        *others, last = missing
        names = f"{', '.join(others)} and {last} are" if others else f"{last} is"
        raise BadInput(f"{names} not installed: pip install {' '.join(missing)}")


def find_device(name=None):
    """torch.device(name), or BadInput where it is not here. Default: the GPU, else the CPU."""
    import torch

    name = ("cuda" if torch.cuda.is_available() else "cpu") if name is None else name
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"there is no device {name!r}; try cpu or cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(
            f"there is no device {name!r} on this machine; torch {torch.__version__} sees no such GPU"
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


def cpu_kernels():
    """The instructions of the kernels that run on this CPU, or "no kernels"."""
    try:
        from peftops._C import cpu
    except ImportError:
        return "no kernels"
    isa = cpu.__name__.rpartition(".")[2]
    return INSTRUCTIONS.get(isa, isa)


def device_name(device):
    """What to call this device in a table; a CPU's instructions are a part of its name."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return f"{cpu_model()}, {cpu_kernels()}"


def cpu_model():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.partition(": ")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def replace(path, write):
    """write(beside) makes a file beside path. When it is whole it takes the place of path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    try:
        write(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave the name without the bytes
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def named(text):
    """A path, but not that of the current folder by the empty name."""
    if not text:
        raise argparse.ArgumentTypeError("must name a folder, got ''")
    return Path(text)


def folder(text):
    """The path of a folder that can be written to, or made; a try leaves nothing behind."""
    path = named(text)
    try:
        nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
        with tempfile.TemporaryDirectory(dir=nearest):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {text}: {error.strerror}") from None


def escaped(text):
    """The text with escapes for line breaks and for what moves the cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text):
    """Text of somebody else for a message: short, and no character moves the cursor."""
    return escaped(text[:SHOWN]) + ("…" if len(text) > SHOWN else "")


def positive(text):
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def probability(text):
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text!r}")
    return value
