"""How a pool reads adapters from folders: whole, and fast for kinds of files that it has seen."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import adapter_file
from ..adapter_file import CONFIG, WEIGHTS
from ..adapter_file.config import LARGEST, size_of_file
from ..adapter_file.header import LARGEST_HEADER, Stored
from .pool_parts import (
    DTYPES,
    Content,
    Layout,
    Sites,
    expect_servable,
    layout_of,
    parts_of,
)

READ_AT_ONCE = 1 << 30  # bytes; systems read at most 2 GiB in one call
LARGEST_SPARE = 1 << 28  # bytes
MOST = 64  # kinds of files that are kept


class Kind(NamedTuple):
    """What is equal in all files with one config and one header."""

    layout: Layout
    stored: dict[str, Stored]


class Folders:
    """Reads adapters.

    Adapters of one training script have the same config and the same header: they differ in their
    numbers alone. What was found out about the first one holds for the others.

    Attributes:
        sites: what adapters may be.
        kinds: {config, header and size of the files: Kind}; the first one leaves first.
        spare: memory for the next file, since reading into fresh memory takes twice as long.
    """

    def __init__(self, sites: Sites):
        self.sites = sites
        self.kinds: OrderedDict[tuple, Kind] = OrderedDict()
        self.spare: list[Tensor] = []

    def content(self, folder: Path) -> Content:
        """The adapter that PEFT has saved in a folder, as safetensors.

        Raises:
            ValueError: a file is missing, broken, or changes while it is read; or the adapter is
                none that these layers can have. The text is one sentence that names the tensor.
        """
        path = folder / WEIGHTS
        before = signatures(folder)
        key = key_of(folder)
        kind = self.kinds.get(key) if key else None
        if kind is None:
            adapter = adapter_file.read(folder)
            expect_servable(adapter, self.sites)
            kind = Kind(layout_of(adapter, self.sites), adapter.tensors)
        try:
            data = self.read(path, size_of_file(path))
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from None
        header = key[1] if key else b""
        is_same = data[: len(header)].numpy().tobytes() == header
        if before is None or signatures(folder) != before or not is_same:
            raise ValueError(f"{path} changed while it was read")
        tensors = tensors_in(data, kind.stored)
        parts = parts_of(kind.layout, tensors, folder, self.sites.largest)
        if key:
            self.kinds[key] = kind
            if len(self.kinds) > MOST:
                self.kinds.popitem(last=False)
        return Content(kind.layout, parts, data)

    def read(
        self,
        path: Path,
        size: int,
    ) -> Tensor:
        """The file as the first `size` of (≥ size,) uint8, in the spare memory if that is enough.

        It is not mapped: a mapped file can be cut off under a reader.
        """
        data = self.spare.pop() if self.spare else torch.empty(0, dtype=torch.uint8)
        if data.numel() < size:
            data = torch.empty(size, dtype=torch.uint8)
        view: Any = data.numpy()
        filled = 0
        with path.open("rb", buffering=0) as file:
            while filled < size:
                count = file.readinto(view[filled : min(size, filled + READ_AT_ONCE)])
                if not count:
                    raise ValueError(f"{path} changed while it was read")
                filled += count
        return data

    def keep(self, content: Content) -> None:
        """Keeps the memory of a file that has been mounted for the next one."""
        if content.data is not None and content.data.nbytes <= LARGEST_SPARE:
            self.spare[:] = [content.data]


def key_of(folder: Path) -> tuple | None:
    """What two adapters have in common that differ in their numbers alone; None for odd files."""
    path = folder / WEIGHTS
    try:
        if size_of_file(folder / CONFIG) > LARGEST:
            return None
        size = size_of_file(path)
        config = (folder / CONFIG).read_bytes()
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if length > min(size, LARGEST_HEADER):
                return None
            return config, start + file.read(length), size
    except (OSError, ValueError):
        return None


def signatures(folder: Path) -> Sequence[int] | None:
    """What changes when one of the files is written or replaced; None if it cannot be asked."""
    found: list[int] = []
    try:
        for name in (CONFIG, WEIGHTS):
            status = (folder / name).stat()
            found += status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    except (OSError, ValueError):
        return None
    return found


def tensors_in(data: Tensor, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """The tensors of a file that was read whole, which follow each other in this order."""
    first = next(iter(stored.values()))
    dtype = DTYPES[first.dtype]
    if {t.dtype for t in stored.values()} != {first.dtype} or first.start % 8:
        return {key: tensor_in(data, t) for key, t in stored.items()}
    sizes = [t.bytes for t in stored.values()]
    pieces = data[first.start : first.start + sum(sizes)].view(dtype)
    each = pieces.split([size // dtype.itemsize for size in sizes])
    shaped = zip(stored.items(), each, strict=True)
    return {key: piece.view(t.shape) for (key, t), piece in shaped}


def tensor_in(data: Tensor, stored: Stored) -> Tensor:
    """A tensor of a file that was read whole."""
    dtype = DTYPES[stored.dtype]
    piece = data[stored.start : stored.start + stored.bytes]
    if stored.start % dtype.itemsize:
        piece = piece.clone()
    return piece.view(dtype).view(stored.shape)
