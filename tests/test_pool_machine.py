"""AdapterPool against a dictionary, which says what it must do and return."""

import tempfile
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from test_pool import (
    BASE,
    SIZES,
    K,
    Spec,
    formula,
    poison,
    pool_of,
    saved,
    whole,
    write,
)

pytestmark = pytest.mark.usefixtures("one_thread")
PAGES = 7
NAMES = [*"abcdef"]


@dataclass(eq=False)
class Mounted:
    """A version, as the dictionary has it. `real` is the pool's."""

    spec: Spec
    users: int = 0
    real: Any = None


@dataclass(eq=False)
class Known:
    spec: Spec | None  # None: its folder is broken
    version: Mounted | None = None
    pinned: bool = False
    used: int = 0


class Book:
    """What a pool does, as a dictionary."""

    def __init__(self):
        self.entries = {}
        self.old = []
        self.uses = 0
        self.mounts = 0
        self.evictions = 0

    @property
    def mounted(self):
        return [e for e in self.entries.values() if e.version is not None]

    @property
    def free(self):
        versions = [entry.version for entry in self.mounted] + self.old
        return PAGES - sum(version.spec.pages for version in versions)

    def known(self, name):
        if name not in self.entries:
            raise ValueError(name)
        return self.entries[name]

    def add(self, name, entry, is_mounted):
        if name in self.entries:
            raise ValueError(name)
        if is_mounted:
            self.mount(entry, entry.spec)
        self.entries[name] = entry

    def replace(self, name, spec):
        entry = self.known(name)
        self.mount(entry, spec)
        entry.spec = spec

    def remove(self, name):
        self.retire(self.known(name))
        del self.entries[name]

    def mount(self, entry, spec):
        if spec is None:
            raise ValueError
        removable = [e for e in self.mounted if not (e.pinned or e.version.users)]
        removable.sort(key=lambda e: e.used)
        if entry.version is not None and not entry.version.users:
            removable = [e for e in removable if e is not entry] + [entry]
        if self.free + sum(e.version.spec.pages for e in removable) < spec.pages:
            raise MemoryError
        while self.free < spec.pages:
            removable.pop(0).version = None
            self.evictions += 1
        self.retire(entry)
        entry.version = Mounted(spec)
        self.mounts += 1
        self.touch(entry)

    def retire(self, entry):
        if entry.version is not None and entry.version.users:
            self.old.append(entry.version)
        entry.version = None

    def touch(self, entry):
        self.uses += 1
        entry.used = self.uses

    def enter(self, names):
        """The versions of these names, which have one more user."""
        wanted = {name: self.known(name) for name in names if name != BASE}
        versions = {}
        for name, entry in wanted.items():
            if entry.version is not None:
                versions[name] = entry.version
                entry.version.users += 1
                self.touch(entry)
        try:
            for name, entry in wanted.items():
                if name not in versions:
                    self.mount(entry, entry.spec)
                    versions[name] = entry.version
                    entry.version.users += 1
        except (ValueError, MemoryError):
            self.leave(versions)
            raise
        return versions

    def leave(self, versions):
        for version in versions.values():
            version.users -= 1
        self.old = [version for version in self.old if version.users]


class Held(NamedTuple):
    """A `use` that is open, in a context of its own."""

    names: list
    versions: dict
    block: Any
    context: Any


def drawn_of(choose):
    """Draws of the names that the machine's dictionary holds now."""
    return st.runner().flatmap(lambda machine: choose([*machine.book.entries]))


names = st.sampled_from(NAMES)
known = drawn_of(lambda names: st.sampled_from([*names, *names, "unknown"]))
batches = drawn_of(
    lambda names: st.lists(
        st.sampled_from([*3 * names, BASE, "unknown"]), min_size=1, max_size=4
    )
)
specs = st.builds(
    Spec,
    st.integers(0, 99),
    st.integers(1, 24),
    st.integers(1, 24),
    st.sampled_from([("q_proj",), ("k_proj", "v_proj"), tuple(SIZES)]),
    st.sampled_from([0.5, 1.0, -2.0]),
    st.booleans(),
)


def broken(spec):
    """Tensors and configs that no pool can have."""
    tensors, config = saved(spec)
    key = f"base_model.model.{spec.layers[0]}.lora_"
    a = tensors[f"{key}A.weight"]
    b = tensors[f"{key}B.weight"]
    for value in (torch.nan, torch.inf):
        yield tensors | {f"{key}A.weight": torch.full_like(a, value)}, config
    yield tensors | {f"{key}A.weight": a[:, 1:]}, config
    yield tensors | {f"{key}B.weight": b[1:]}, config
    yield {f"{key}B.weight": b}, config
    yield tensors | {"base_model.model.o_proj.lora_A.weight": a}, config
    yield tensors, config | {"r": 25, "rank_pattern": {"k_proj": 25}}
    yield tensors, config | {"peft_type": "LOHA"}
    yield saved(spec._replace(rank=25, other=25))


class PoolMachine(RuleBasedStateMachine):
    """A pool that does what a dictionary does."""

    def __init__(self):
        super().__init__()
        self.pool = pool_of(PAGES)
        self.book = Book()
        self.held = []
        self.home = tempfile.TemporaryDirectory()
        self.seed = 0
        self.numbers = {}  # of versions

    def both(self, of_book, of_pool):
        """Runs the same on both. What the book raises the pool must raise, and change nothing."""
        try:
            of_book()
        except (ValueError, MemoryError) as error:
            with pytest.raises(type(error)):
                of_pool()
        else:
            of_pool()

    def source(self, spec, is_folder):
        """What load and replace take."""
        if not is_folder:
            return saved(spec)
        folder = Path(self.home.name) / str(abs(hash(spec)))
        return (write(folder, *saved(spec)),)

    @rule(
        name=names,
        spec=specs,
        is_folder=st.booleans(),
        pin=st.booleans(),
    )
    def load(self, name, spec, is_folder, pin):
        source = self.source(spec, is_folder)
        self.both(
            lambda: self.book.add(name, Known(spec, pinned=pin), True),
            lambda: self.pool.load(name, *source, pin=pin),
        )

    @rule(name=names, spec=st.none() | specs)
    def register(self, name, spec):
        folder = self.home.name
        if spec is not None:
            (folder,) = self.source(spec, True)
        self.both(
            lambda: self.book.add(name, Known(spec), False),
            lambda: self.pool.register(name, folder),
        )

    @rule(name=known, spec=specs, is_folder=st.booleans())
    def replace(self, name, spec, is_folder):
        source = self.source(spec, is_folder)
        self.both(
            lambda: self.book.replace(name, spec),
            lambda: self.pool.replace(name, *source),
        )

    @rule(name=known)
    def unload(self, name):
        self.both(lambda: self.book.remove(name), lambda: self.pool.unload(name))

    @rule(name=known)
    def pin(self, name):
        def in_book():
            self.book.leave(self.book.enter([name]))
            self.book.known(name).pinned = True

        self.both(in_book, lambda: self.pool.pin(name))

    @rule(name=known)
    def unpin(self, name):
        def in_book():
            self.book.known(name).pinned = False

        self.both(in_book, lambda: self.pool.unpin(name))

    @rule(name=names, spec=specs)
    def refuse_what_is_broken(self, name, spec):
        for tensors, config in broken(spec):
            for method in (self.pool.load, self.pool.replace):
                with pytest.raises(ValueError):
                    method(name, tensors, config)
        for bad in ("", BASE, "a/b", "..", "a\n"):
            with pytest.raises(ValueError):
                self.pool.load(bad, *saved(spec))

    def enter(self, names, context):
        """Opens a `use`, unless both raise."""
        block = self.pool.use(names)
        opened = []
        self.both(
            lambda: opened.append(self.book.enter(names)),
            lambda: context.run(block.__enter__),
        )
        self.agree()
        return [Held(names, versions, block, context) for versions in opened]

    def leave(self, held):
        held.context.run(held.block.__exit__, None, None, None)
        self.book.leave(held.versions)

    def check(self, held):
        """Every row has the version that its name had when the `use` began."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        x = whole(generator, len(held.names), 2, K)
        y = held.context.run(self.pool.model, x)
        for name, rows, result in zip(held.names, x, y, strict=True):
            version = held.versions.get(name)
            spec = None if version is None else version.spec
            assert torch.equal(result, formula(spec, rows)), (held.names, name, spec)

    @rule(names=batches, data=st.data())
    def use(self, names, data):
        contexts = [copy_context(), *(held.context for held in self.held)]
        context = data.draw(st.sampled_from(contexts))
        for held in self.enter(names, context):
            try:
                self.check(held)
            finally:
                self.leave(held)

    @precondition(lambda self: len(self.held) < 3)
    @rule(names=batches)
    def keep_open(self, names):
        self.held += self.enter(names, copy_context())

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def leave_one(self, data):
        held = data.draw(st.sampled_from(self.held))
        self.held.remove(held)
        self.leave(held)

    @invariant()
    def agree(self):
        """The pool and the dictionary say the same, and no page has two versions."""
        book = self.book
        store = self.pool.store
        assert self.pool.names() == [*book.entries]
        versions = []
        for name, entry in book.entries.items():
            real = store.entries[name].version
            assert (real is None) == (entry.version is None), name
            if entry.version is not None:
                spec = entry.version.spec
                assert self.numbers.setdefault(self.pool.version(name), spec) == spec
                entry.version.real = entry.version.real or real
                versions.append(entry.version)
                assert entry.version.real is real
        assert store.old == {version.real for version in book.old}
        for version in [*versions, *book.old]:
            assert len(version.real.pages) == version.spec.pages
            assert version.real.users == version.users
        held = [version.real.pages for version in [*versions, *book.old]]
        assert sorted(sum(held, store.room.free)) == [*range(PAGES)]
        self.agree_on_stats(self.pool.stats(), [version.users for version in versions])

    def agree_on_stats(self, stats, users):
        book = self.book
        assert stats._replace(page_bytes=0) == (
            len(book.entries),
            len(users),
            sum(entry.pinned for entry in book.entries.values()),
            sum(count > 0 for count in users),
            PAGES,
            book.free,
            sum(version.spec.pages for version in book.old),
            0,
            book.mounts,
            book.evictions,
        )

    @invariant()
    def open_uses_keep_their_versions(self):
        poison(self.pool)
        for held in self.held:
            self.check(held)

    def teardown(self):
        for held in self.held:
            self.leave(held)
        for name in self.pool.names():
            self.pool.unload(name)
        assert self.pool.stats().free_pages == PAGES
        self.pool.close()
        self.home.cleanup()


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)


def test_a_slot_forgets_the_layers_of_the_adapter_before():
    pool = pool_of(2, max_rank=8)
    pool.load("a", *saved(Spec(1, 8, 8)))
    pool.load("b", *saved(Spec(2, 8, 8)))
    pool.unload("a")
    poison(pool)
    small = Spec(3, 5, 5, ("q_proj",))
    pool.load("a", *saved(small))
    x = whole(torch.Generator().manual_seed(4), 2, 3, K)
    with pool.use(["a", "b"]):
        y = pool.model(x)
    assert torch.equal(y[0], formula(small, x[0]))
    assert torch.equal(y[1], formula(Spec(2, 8, 8), x[1]))
