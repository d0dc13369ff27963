"""What a pool keeps: adapters by name, their mounted versions, and who has which pages.

A version never changes. Its pages are free again when its name has another version, or none, and
nobody is inside a `use` that began with it.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..ops.multi_contract import PAGE
from .pool_files import Folders
from .pool_layers import Layers
from .pool_parts import Content, Part, content_of_tensors, marks_of
from .pool_room import Entry, Fences, Room, Version

BASE = "__base__"
LONGEST = 1000  # characters of a name
SHOWN = 5  # names in an error


class Store:
    """The adapters of a pool.

    Attributes:
        entries: {name: Entry}, in the order in which they came.
        old: versions that are retired and in use.
        folders: reads adapters from folders.
        numbers: of versions.
        uses, mounts, evictions: how many there were.
        mounting: held while pages are filled. A thread that has both locks took this one first.
        lock: of everything else here. It is not held while files are read or pages filled.
    """

    def __init__(self, layers: Layers):
        self.layers = layers
        self.fences = Fences(layers.slots.device)
        self.room = Room(layers.slots.pages)
        self.entries: dict[str, Entry] = {}
        self.old: set[Version] = set()
        self.folders = Folders(layers.sites)
        self.numbers = itertools.count(1)
        self.uses = 0
        self.mounts = 0
        self.evictions = 0
        self.mounting = threading.RLock()
        self.lock = threading.RLock()

    def known(self, name: str) -> Entry:
        """The entry of a name. Raises ValueError without one."""
        with self.lock:
            entry = self.entries.get(name)
        if entry is None:
            raise ValueError(f"AdapterPool: there is no adapter {name!r:.80}")
        return entry

    def expect_new(self, name: str) -> None:
        """Raises ValueError for what is no name, or is taken."""
        good = isinstance(name, str) and 0 < len(name) <= LONGEST and name.isprintable()
        if not good or name in (BASE, ".", "..") or "/" in name or "\\" in name:
            raise ValueError(
                f"AdapterPool: name must be a text without slashes, got {name!r:.80}"
            )
        if name in self.entries:
            raise ValueError(
                f"AdapterPool: {name!r:.80} is there already; replace or unload it"
            )

    def expect_same(self, entry: Entry) -> None:
        """Raises ValueError where another thread has unloaded the adapter."""
        if self.entries.get(entry.name) is not entry:
            raise ValueError(
                f"AdapterPool: {entry.name!r:.80} was unloaded before it was mounted"
            )

    def content(
        self,
        entry: Entry,
        source: Any,
        config: Any = None,
    ) -> Content:
        """The adapter from a folder or tensors. The entry learns where it is from."""
        is_folder = isinstance(source, (str, Path))
        if not is_folder and not isinstance(source, Mapping):
            raise TypeError(
                "AdapterPool: source must be a folder or a dict of tensors, "
                f"got {type(source).__name__}"
            )
        if is_folder and config is not None:
            raise TypeError("AdapterPool: config must be None with a folder")
        try:
            if is_folder:
                entry.folder = Path(source)
                content = self.folders.content(entry.folder)
            else:
                content = content_of_tensors(
                    entry.name, source, config, entry.layout, self.layers.sites
                )
        except ValueError as error:
            raise ValueError(printable(str(error))) from None
        entry.layout = content.layout
        entry.number = next(self.numbers)
        return content

    def add(
        self,
        entry: Entry,
        content: Content | None = None,
    ) -> None:
        """Adds an adapter, and mounts it if its content is given."""

        def publish() -> None:
            self.expect_new(entry.name)
            self.entries[entry.name] = entry

        if content is None:
            with self.lock:
                publish()
        else:
            with self.mounting:
                self.mount(entry, content.parts, publish)
            self.folders.keep(content)

    def swap(
        self,
        entry: Entry,
        fresh: Entry,
        content: Content,
    ) -> None:
        """Mounts another version of an adapter, which is from where `fresh` is."""

        def publish() -> None:
            self.expect_same(entry)
            self.retire(entry)
            entry.folder = fresh.folder
            entry.layout = fresh.layout
            entry.number = fresh.number

        with self.mounting:
            self.mount(entry, content.parts, publish)
        self.folders.keep(content)

    def remove(self, name: str) -> None:
        """Forgets an adapter."""
        with self.lock:
            entry = self.known(name)
            del self.entries[name]
            self.retire(entry)

    @contextmanager
    def leased(self, names: Sequence[str]) -> Iterator[dict[str, Version]]:
        """The versions that these names have now. Inside, nobody else gets their pages."""
        wanted = [name for name in dict.fromkeys(names) if name != BASE]
        versions: dict[str, Version] = {}
        try:
            with self.lock:
                for entry in self.entries_of(wanted):
                    if entry.version is not None:
                        versions[entry.name] = self.taken(entry, entry.version)
            for name in wanted:
                if name not in versions:
                    versions[name] = self.taken_after_mount(name)
            for version in versions.values():
                self.fences.wait(version)
            yield versions
        finally:
            if versions:
                self.fences.leave()
            with self.lock:
                for version in versions.values():
                    self.leave(version)

    def entries_of(self, names: Sequence[str]) -> list[Entry]:
        """The entries of these names. Raises PEFT's ValueError for those without one."""
        if unknown := {*names} - {*self.entries}:
            raise ValueError(
                "Trying to infer with non-existing adapter(s): "
                f"{', '.join(sorted(map(str, unknown)))}"
            )
        return [self.entries[name] for name in names]

    def taken(
        self,
        entry: Entry,
        version: Version,
    ) -> Version:
        """The version, which has one more user."""
        self.uses += 1
        entry.used = self.uses
        version.users += 1
        return version

    def taken_after_mount(self, name: str) -> Version:
        """Mounts an adapter, unless another thread has done so by now."""
        with self.mounting:
            with self.lock:
                (entry,) = self.entries_of([name])
                if entry.version is not None:
                    return self.taken(entry, entry.version)
                parts = entry.parts

            def publish() -> None:
                self.expect_same(entry)

            if parts is not None:
                return self.mount(entry, parts, publish, users=1)
            content = self.content(entry, entry.folder)
            version = self.mount(entry, content.parts, publish, users=1)
            self.folders.keep(content)
            return version

    def mount(
        self,
        entry: Entry,
        parts: list[Part],
        publish: Callable[[], object],
        users: int = 0,
    ) -> Version:
        """Fills fresh pages, and then lets the entry have them.

        Args:
            publish: called with the lock held, right before the entry gets the version. Where it
                raises, the pages are free again.
            users: of the version, from its beginning.
        """
        with self.lock:
            pages = self.pages_for(entry, parts)
        try:
            self.fences.begin()
            self.layers.fill(pages, parts)
            version = Version(pages, marks_of(parts), users, filled=self.fences.end())
            with self.lock:
                publish()
                self.mounts += 1
                self.uses += 1
                entry.used = self.uses
                entry.parts = None
                entry.version = version
        except BaseException:
            with self.lock:
                self.room.give(pages)
            raise
        return version

    def pages_for(
        self,
        entry: Entry,
        parts: list[Part],
    ) -> list[int]:
        """Pages for an adapter with these parts. Those that were not used for longest make room.

        Raises:
            MemoryError: all others are pinned or in use. Nothing has changed.
        """
        rank = max(part.a.shape[0] for part in parts)
        count = -(-rank // PAGE)
        leaving = [other for other in self.entries.values() if other.removable]
        leaving.sort(key=lambda other: other.used)
        own = entry.version
        if own is not None and not own.users:  # it is replaced: even if it is pinned
            leaving = [other for other in leaving if other is not entry] + [entry]
        free = len(self.room.free) + sum(other.size for other in leaving)
        if free < count:
            raise MemoryError(self.full(entry.name, count, free))
        pages = self.room.take(count)
        for other in leaving:
            if pages is None:
                self.evict(other)
                pages = self.room.take(count)
        assert pages is not None
        return pages

    def full(
        self,
        name: str,
        count: int,
        free: int,
    ) -> str:
        """Why an adapter has no room, and what would give it some."""
        text = f"AdapterPool: {name!r:.80} needs {count} pages of {self.room.total}, "
        text += f"and {free} can be free"
        entries = [*self.entries.values()]
        kept = {
            "pinned": [entry for entry in entries if entry.pinned and entry.version],
            "in use": [e for e in entries if e.version and e.version.users],
        }
        for why, entries in kept.items():
            if entries:
                names = ", ".join(repr(entry.name) for entry in entries[:SHOWN])
                more = f" and {len(entries) - SHOWN} more" if entries[SHOWN:] else ""
                text += f"; {why}: {names}{more}"
        if self.old:
            pages = sum(len(version.pages) for version in self.old)
            text += f"; replaced or unloaded, and in use still: {pages} pages"
        return text

    def evict(self, entry: Entry) -> None:
        """Takes an adapter's pages. Without a folder, the host's memory gets what is in them."""
        version = entry.version
        if version is None:
            return
        if entry.folder is None:
            entry.parts = self.layers.parts_in(version.slot, version.marks)
        entry.version = None
        self.room.give(version.pages)
        self.evictions += 1

    def retire(self, entry: Entry) -> None:
        """The entry has no version any more. Its pages are free when the last user leaves."""
        version = entry.version
        entry.version = None
        entry.parts = None
        if version is None:
            return
        version.retired = True
        if version.users:
            self.old.add(version)
        else:
            self.room.give(version.pages)

    def leave(self, version: Version) -> None:
        """The version has one user less."""
        version.users -= 1
        if version.retired and not version.users:
            self.old.remove(version)
            self.room.give(version.pages)


def printable(text: str) -> str:
    """A text of strangers as one line, without what controls a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
