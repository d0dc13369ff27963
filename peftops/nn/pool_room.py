"""Which pages of a pool are free, who has the others, and in which order a GPU may reuse them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .pool_parts import Layout, Part


class Room:
    """The free pages of a pool."""

    def __init__(self, pages: int):
        self.total = pages
        self.free = [*range(pages)]  # in order

    def take(self, count: int) -> list[int] | None:
        """So many free pages, together where that is possible; None if there are fewer."""
        free = self.free
        if len(free) < count:
            return None
        starts = range(len(free) - count + 1)
        start = next(
            (i for i in starts if free[i + count - 1] - free[i] == count - 1), 0
        )
        taken = free[start : start + count]
        del free[start : start + count]
        return taken

    def give(self, pages: Sequence[int]) -> None:
        """Makes these pages free again."""
        self.free = sorted([*self.free, *pages])


@dataclass(eq=False)
class Version:
    """An adapter as it was when it was mounted. It never changes.

    Attributes:
        pages: that hold it. The first one is its slot, which no other version can have.
        marks: what of its parts the pages do not hold. Their matrices are empty.
        users: how many `use` blocks have it now.
        retired: whether it has been replaced or unloaded. Its last user gives the pages back.
        filled: what a stream of a GPU waits for before it reads the pages.
        layers: the indices of the layers that it is in.
    """

    pages: list[int]
    marks: list[Part]
    users: int = 0
    retired: bool = False
    filled: "torch.cuda.Event | None" = None
    layers: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.layers = frozenset([part.layer for part in self.marks])

    @property
    def slot(self) -> int:
        return self.pages[0]


@dataclass(eq=False)
class Entry:
    """An adapter that a pool knows.

    Attributes:
        name: the adapter's.
        folder: from which it is mounted, or None.
        parts: of which it is mounted, where it has no folder and is not mounted now.
        layout: of the last version that was read, or None.
        version: the mounted one, or None.
        number: of the last version that was read.
        pinned: whether it stays mounted.
        used: when it was last used or mounted, counted in uses of the pool.
    """

    name: str
    folder: Path | None = None
    parts: list[Part] | None = None
    layout: Layout | None = None
    version: Version | None = None
    number: int = 0
    pinned: bool = False
    used: int = 0

    @property
    def size(self) -> int:
        """The pages that it has."""
        return 0 if self.version is None else len(self.version.pages)

    @property
    def removable(self) -> bool:
        """Whether its pages may be given to another adapter."""
        return self.version is not None and not (self.pinned or self.version.users)


@dataclass
class Fences:
    """Orders what a pool copies on a GPU with the kernels of all streams. A CPU needs no order.

    Attributes:
        device: the pool's.
        left: {stream: an event after which it no longer reads pages that were given back}.
    """

    device: torch.device
    left: "dict[int, torch.cuda.Event]" = field(default_factory=dict)

    def leave(self) -> None:
        """The kernels that this stream has been given so far may read pages that are given back."""
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            self.left[stream.cuda_stream] = stream.record_event()

    def begin(self) -> None:
        """What this stream copies from now on waits for all that read the pages before."""
        for event in [*self.left.values()]:
            torch.cuda.current_stream(self.device).wait_event(event)

    def end(self) -> "torch.cuda.Event | None":
        """What readers of the copies on other streams wait for."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, version: Version) -> None:
        """What this stream runs from now on may read the version."""
        if version.filled is not None:
            torch.cuda.current_stream(self.device).wait_event(version.filled)
