"""Reads from the header of a safetensors file which tensors it holds."""

import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .._errors import sentence

LONGEST = 1000  # characters of a key
LARGEST_HEADER = (
    48 << 20
)  # bytes; with factors for 61 layers of 384 experts it has 25 MiB


@dataclass
class Stored:
    """One tensor of the file: where it starts, how many bytes it has, and what they hold."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int
    finite: bool = True
    zero: bool = False


def read_header(path: Path, size: int) -> dict[str, Stored]:
    """The tensors by key, in the order of the file. The package safetensors checks the file.

    Args:
        path: the file.
        size: its bytes.

    Raises:
        ValueError: the file is broken, or no adapter would have such a header.
    """
    from safetensors import SafetensorError

    try:
        with path.open("rb") as raw:
            data = 8 + int.from_bytes(raw.read(8), "little")
        if LARGEST_HEADER < data <= size:
            raise ValueError(
                f"{path} has a header of more than {LARGEST_HEADER >> 20} MiB: it is no adapter's"
            )
        tensors = read_entries(path, data)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file: {sentence(error)}"
        ) from None
    end = data + sum(stored.bytes for stored in tensors.values())
    if end != size:
        dtypes = sorted({stored.dtype for stored in tensors.values()})
        raise ValueError(
            f"{path} holds numbers of a kind whose size is unknown: {', '.join(dtypes)}"
        )
    for key in tensors:
        if len(key) > LONGEST:
            raise ValueError(
                f"{path}: a key has {len(key)} characters, more than {LONGEST}: {key[:80]}..."
            )
    return tensors


def read_entries(path: Path, start: int) -> dict[str, Stored]:
    """{key: Stored} of tensors that lie one after the other from start on."""
    from safetensors import safe_open

    tensors = {}
    with safe_open(path, "numpy") as file:
        for key in file.offset_keys():
            entry = file.get_slice(key)
            dtype = entry.get_dtype()
            shape = tuple(entry.get_shape())
            size = math.prod(shape) * bits_per_number(dtype) // 8
            tensors[key] = Stored(key, dtype, shape, start, size)
            start += size
    return tensors


@cache
def bits_per_number(dtype: str) -> int:
    """safetensors writes the bits in the names of dtypes, except for BOOL."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8
