"""AdapterPool in many threads: every row is of a version that its name had during the call."""

import random
import sys
import threading
import time
from collections import Counter
from contextlib import suppress

import pytest
import torch
from test_pool import BASE, ONE, TWO, X, formula, poison, pool_of, result, saved, write
from torch import nn

import peftops

pytestmark = pytest.mark.usefixtures("one_thread")
THREADS = 8
PAGES = 16
K = 8


def adapter(value):
    """An adapter whose results are `of_value(value)` in every column."""
    rank = (1, 9, 17)[value % 3]
    key = "base_model.model.q_proj.lora_"
    tensors = {
        f"{key}A.weight": torch.full((rank, K), 1.0 + value % 7),
        f"{key}B.weight": torch.full((K, rank), float(value)),
    }
    fields = {"r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    return tensors, {"peft_type": "LORA"} | fields


def of_value(value):
    """What the adapter adds to the row of a one."""
    return value * (1 + value % 7) * (1, 9, 17)[value % 3]


class Churn:
    """Threads that use all names, each of which one thread changes.

    Attributes:
        history: {name: its values in order, None while it is not there}.
        done: {name: the index in history of the last change that has ended}.
        counts: of what happened.
    """

    def __init__(self, operations):
        model = nn.Sequential()
        model.q_proj = nn.Linear(K, K)
        page = 4 * (8 * 2 * K + K)
        self.pool = peftops.AdapterPool(model, memory=PAGES * page, max_rank=24)
        self.operations = operations
        self.history = {f"{owner}": [None] for owner in range(THREADS)}
        self.done = dict.fromkeys(self.history, 0)
        self.counts = Counter()
        self.errors = []
        self.x = torch.eye(K)
        model.q_proj.weight.zero_()
        model.q_proj.bias.zero_()
        self.threads = [
            threading.Thread(target=self.run, args=(name,), daemon=True)
            for name in self.history
        ]

    def run(self, name):
        """What a thread does."""
        rng = random.Random(name)
        try:
            for operation in range(self.operations // THREADS):
                draw = rng.random()
                if draw < 0.6:
                    self.use(rng.choices([*self.history, BASE], k=3))
                elif draw < 0.85:
                    self.mount(name, 1 + operation % 4000)
                elif draw < 0.9:
                    self.unload(name)
                elif draw < 0.92:
                    self.poison()
                else:
                    self.pin(name)
        except BaseException as error:
            self.errors.append(error)
            raise

    def window(self, name, start):
        """The values that a name had since `start`."""
        return [None] if name == BASE else self.history[name][start:]

    def use(self, names):
        starts = {name: self.done.get(name, 0) for name in names}
        try:
            with self.pool.use(names):
                windows = [self.window(name, starts[name]) for name in names]
                y = self.pool.model.q_proj(self.x[: len(names)])
                rows = y.tolist()
        except ValueError:
            assert any(None in self.window(name, starts[name]) for name in names)
            self.counts["unknown"] += 1
            return
        except MemoryError:
            self.counts["full"] += 1
            return
        for name, row, window in zip(names, rows, windows, strict=True):
            values = {of_value(value) for value in window if value is not None}
            assert len({*row}) == 1, (name, row)
            assert row[0] in ({0} if name == BASE else values), (name, row, window)
        self.counts["used"] += 1

    def change(
        self,
        name,
        value,
        call,
    ):
        """Runs what gives a name this value, and writes down that it did."""
        history = self.history[name]
        history.append(value)
        try:
            call()
        except MemoryError:
            history[-1] = history[-2]
            self.counts["full"] += 1
        self.done[name] = len(history) - 1

    def mount(self, name, value):
        is_new = self.history[name][-1] is None
        method = self.pool.load if is_new else self.pool.replace
        self.change(name, value, lambda: method(name, *adapter(value)))

    def unload(self, name):
        if self.history[name][-1] is not None:
            self.change(name, None, lambda: self.pool.unload(name))

    def poison(self):
        """Fills what is free with NaN, while nobody takes it."""
        with self.pool.store.mounting, self.pool.store.lock:
            poison(self.pool)

    def pin(self, name):
        """Pins a name, uses others, and unpins it."""
        if self.history[name][-1] is None:
            return
        try:
            self.pool.pin(name)
        except MemoryError:
            self.counts["full"] += 1
            return
        self.use([name, *self.history][:2])
        assert self.pool.store.entries[name].version is not None
        self.pool.unpin(name)


def churn(operations, seconds):
    """Runs the threads, and returns what happened."""
    churn = Churn(operations)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for thread in churn.threads:
            thread.start()
        end = time.monotonic() + seconds
        for thread in churn.threads:
            thread.join(max(end - time.monotonic(), 0))
    finally:
        sys.setswitchinterval(interval)
    assert churn.errors == []
    assert not any(thread.is_alive() for thread in churn.threads)
    pool = churn.pool
    stats = pool.stats()
    assert (stats.used, stats.old_pages, stats.pinned) == (0, 0, 0)
    pages = [
        page
        for e in pool.store.entries.values()
        if e.version
        for page in e.version.pages
    ]
    assert sorted(pages + pool.store.room.free) == [*range(PAGES)]
    for name in pool.names():
        pool.unload(name)
    assert pool.stats().free_pages == PAGES
    assert churn.counts["used"] > operations / 8
    assert min(churn.counts["full"], churn.counts["unknown"]) > 0
    assert min(stats.evictions, stats.mounts) > operations / 100


def test_threads_get_versions_that_were_there():
    churn(10**4, 60)


@pytest.mark.slow
def test_many_operations_in_threads():
    churn(10**5, 600)


@pytest.mark.parametrize("name", ["a", "new"])
def test_a_mount_that_fails_gives_its_pages_back(name, monkeypatch):
    pool = pool_of(4)
    pool.load("a", *saved(ONE))
    before = pool.stats()

    def fail(*args):
        raise OSError("mine")

    monkeypatch.setattr(pool.store.layers, "fill", fail)
    method = pool.replace if name == "a" else pool.load
    with pytest.raises(OSError, match="mine"):
        method(name, *saved(TWO))
    assert pool.stats() == before
    assert pool.names() == ["a"] and pool.version("a") == 1
    assert torch.equal(result(pool, "a"), formula(ONE, X))


def test_a_name_that_changes_hands_while_it_is_mounted_leaks_no_page(
    tmp_path, monkeypatch
):
    pool = pool_of(4)
    folder = write(tmp_path / "a", *saved(ONE))
    pool.register("a", folder)
    read = pool.store.content

    def meanwhile(entry, source, config=None):
        content = read(entry, source, config)
        monkeypatch.undo()
        thread = threading.Thread(target=change)
        thread.start()
        thread.join(60)
        return content

    def change():
        pool.unload("a")
        pool.register("a", folder)

    monkeypatch.setattr(pool.store, "content", meanwhile)
    with suppress(ValueError):  # the adapter that was asked for is no longer there
        result(pool, "a")
    pool.unload("a")
    stats = pool.stats()
    assert (stats.free_pages, stats.old_pages) == (4, 0)
