"""What the numbers in an adapter's safetensors file are: whether one is NaN or infinite, and whether all are zero."""

import errno
import os

import numpy

CHUNK = 1 << 22  # bytes that are in memory at a time
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
EXPONENT = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}  # all set: infinite or NaN


def look(path, tensors):
    """Sets .finite and .zero of the tensors, in the order of the file, whose dtype is in BYTES."""
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        pieces = Pieces(file.fileno())
        for stored in tensors:
            if stored.dtype in BYTES:
                look_at(file, stored, pieces, buffer)


def look_at(file, stored, pieces, buffer):
    kind = numpy.dtype(f"<u{BYTES[stored.dtype]}")
    mask = kind.type(EXPONENT[stored.dtype])
    stored.finite = True
    stored.zero = stored.bytes > 0
    for start, stop in pieces.of(stored):
        part = buffer[: stop - start]
        file.seek(start)
        if file.readinto(part) != len(part):
            raise OSError(errno.EIO, "the file became shorter while it was read")
        entries = numpy.frombuffer(part, kind)
        if (entries & mask == mask).any():
            stored.finite = False
            stored.zero = False
            return
        if stored.zero:
            stored.zero = not entries.any()


class Pieces:
    """What to read of a file. The holes of a sparse file are left out: they are zero, however large they are."""

    def __init__(self, handle):
        self.handle = handle
        self.data = 0  # from here
        self.end = 0  # to here there is no hole

    def of(self, stored):
        """(start, stop) of each piece of a tensor: whole entries, and at most CHUNK bytes."""
        size = BYTES[stored.dtype]
        position = stored.start
        stop = stored.start + stored.bytes
        while position < stop:
            if not self.data <= position < self.end:
                self.find(position)
            hole = (self.data - position) // size * size  # whole entries of it
            if hole > 0:
                position += hole
                continue
            entries = -(-(self.end - position) // size)
            end = min(stop, position + CHUNK, position + entries * size)
            yield position, end
            position = end

    def find(self, position):
        """Sets data and end: of the first data at position or later. Where no file system tells, all is data."""
        forever = 1 << 63
        self.data, self.end = position, forever
        if not hasattr(os, "SEEK_DATA"):
            return
        try:
            self.data = os.lseek(self.handle, position, os.SEEK_DATA)
            self.end = os.lseek(self.handle, self.data, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole follows
                self.data = forever
