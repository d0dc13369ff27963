"""Which tensors of an adapter's file hold NaN or infinity, and which are all zero."""

import errno
import os
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path

import numpy

from .header import Stored

CHUNK = 1 << 22  # bytes that are in memory at a time
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
EXPONENT = {  # its bits; if all of them are set, the number is infinite or NaN
    "F64": 0x7FF << 52,
    "F32": 0xFF << 23,
    "F16": 0x1F << 10,
    "BF16": 0xFF << 7,
}


def look_at_values(path: Path, tensors: Iterable[Stored]) -> None:
    """Sets .finite and .zero of each tensor whose dtype is in BYTES.

    Args:
        path: the safetensors file.
        tensors: in the order of the file.

    Raises:
        OSError: the file cannot be read.
    """
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        pieces = Pieces(file.fileno())
        for stored in tensors:
            if stored.dtype in BYTES:
                look_at_tensor(file, stored, pieces, buffer)


def look_at_tensor(
    file: FileIO, stored: Stored, pieces: "Pieces", buffer: memoryview
) -> None:
    """Sets .finite and .zero of one tensor."""
    dtype = numpy.dtype(f"<u{BYTES[stored.dtype]}")
    mask = dtype.type(EXPONENT[stored.dtype])
    stored.finite = True
    stored.zero = stored.bytes > 0
    for start, stop in pieces.of(stored):
        piece = buffer[: stop - start]
        file.seek(start)
        if file.readinto(piece) != len(piece):
            raise OSError(errno.EIO, "the file became shorter while it was read")
        entries = numpy.frombuffer(piece, dtype)
        if (entries & mask == mask).any():
            stored.finite = False
            stored.zero = False
            return
        if stored.zero:
            stored.zero = not entries.any()


class Pieces:
    """What to read of a file. The holes of a sparse file are skipped: they are zero.

    Attributes:
        data, end: a range of the file without a hole.
    """

    def __init__(self, handle: int):
        self.handle = handle
        self.data = 0
        self.end = 0

    def of(self, stored: Stored) -> Iterator[tuple[int, int]]:
        """(start, stop) of each piece of a tensor: whole entries, and at most CHUNK bytes."""
        size = BYTES[stored.dtype]
        position = stored.start
        stop = stored.start + stored.bytes
        while position < stop:
            if not self.data <= position < self.end:
                self.find_data(position)
            hole = (self.data - position) // size * size  # whole entries of it
            if hole > 0:
                position += hole
                continue
            entries = -(-(self.end - position) // size)
            end = min(stop, position + CHUNK, position + entries * size)
            yield position, end
            position = end

    def find_data(self, position: int) -> None:
        """Sets data and end to the first range without a hole at position or later.

        Where the file system does not tell, everything counts as data.
        """
        forever = 1 << 63
        self.data = position
        self.end = forever
        if not hasattr(os, "SEEK_DATA"):
            return
        try:
            self.data = os.lseek(self.handle, position, os.SEEK_DATA)
            self.end = os.lseek(self.handle, self.data, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole follows
                self.data = forever
