"""AdapterPool: many adapters on one frozen model, which come and go while it serves."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapter_file.config import fields_of
from ..ops.multi_contract import PAGE
from .multi import Route, copies_of_samples
from .pool_layers import wrap
from .pool_room import Entry
from .pool_store import BASE, Store

METHODS = "forward", "generate"  # of the model, which take adapter_names
SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?\s*", re.IGNORECASE)


class PoolStats(NamedTuple):
    """What a pool holds. A page is 8 rank-rows in every layer.

    Attributes:
        adapters: how many names it knows.
        mounted, pinned, used: how many of them are in its pages, are pinned, are in use now.
        pages: how many there are.
        free_pages: those that hold nothing.
        old_pages: those of versions that were replaced or unloaded, and are in use still.
        page_bytes: the bytes of a page in all layers, with the gain of its slot.
        mounts, evictions: how many there were.
    """

    adapters: int
    mounted: int
    pinned: int
    used: int
    pages: int
    free_pages: int
    old_pages: int
    page_bytes: int
    mounts: int
    evictions: int


class AdapterPool:
    """Serves many LoRA and DoRA adapters on one model, each sample of a batch with its own.

    y_i = gain[s] ⊙ (x_i·Wᵀ + scaling[s] · (x_i·A[s]ᵀ)·B[s]ᵀ) + bias, with s the adapter of row i

    The model's linear layers become nn.MultiLoRALinear, and its parameters are frozen. Adapters may
    have unequal ranks, scalings and layers. They are mounted into pages of 8 rank-rows, on first
    use if not before; where there is no room, those that were not used for the longest time leave.
    A mounted adapter never changes: `replace` mounts another version, and whoever is inside `use`
    keeps the one that it began with. All methods may be called by many threads at once.

        pool = peftops.AdapterPool(model, memory="4GiB")
        pool.load("anna", "adapters/anna")
        logits = model(input_ids=ids, adapter_names=["anna", "__base__"]).logits
        with pool.use(["anna", "__base__"]):
            tokens = model.generate(input_ids=ids)

    Args:
        model: a model without PEFT's layers, on one device. It is changed in place.
        memory: what the pages of all layers may take: bytes, or a text such as "4GiB".
        max_rank: the largest rank of an adapter.
        dtype: of the pages: torch.float32, or None for the dtype in which each layer computes.
        target_modules: the layers that may have adapters, as in PEFT's LoraConfig: names, a regex,
            or "all-linear" for all linear layers but the output's. Fewer layers make smaller pages.

    Raises:
        ValueError: an argument is none of the above, or memory is too small for one adapter.
        MemoryError: there is not so much memory.

    Source: Sheng et al., S-LoRA, arXiv 2311.03285.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        memory: int | str = "4GiB",
        max_rank: int = 64,
        dtype: torch.dtype | None = None,
        target_modules: str | Sequence[str] = "all-linear",
    ):
        if type(max_rank) is not int or max_rank < 1:
            raise ValueError(
                f"AdapterPool: max_rank must be at least 1, got {max_rank!r}"
            )
        self.model: Any = model
        layers, self.unwrap = wrap(
            model, bytes_of(memory), max_rank, dtype, target_modules
        )
        self.store = Store(layers)
        self.current = layers.slots.route
        self.own: dict[str, Any] = {}
        for name in METHODS:
            method: Any = getattr(model, name, None)
            if method is not None:
                self.own[name] = vars(model).get(name)
                vars(model)[name] = self.taking_names(name, method)

    def load(
        self,
        name: str,
        source: str | Path | Mapping[str, Tensor],
        config: Any = None,
        *,
        pin: bool = False,
    ) -> None:
        """Adds an adapter and mounts it.

        Args:
            name: how requests name it: a text without slashes.
            source: the folder of an adapter that PEFT has saved as safetensors, or its tensors
                under the keys of such a file, as PEFT's get_peft_model_state_dict gives them. They
                are copied.
            config: with tensors: the adapter's LoraConfig, or its fields as a dict.
            pin: whether it stays mounted.

        Raises:
            ValueError: the name is taken or is none, or the adapter is broken or of another model.
            MemoryError: there is no room for it. Nothing has changed then, as after all errors.
        """
        self.store.expect_new(name)
        entry = Entry(name, pinned=pin)
        content = self.store.content(entry, source, config)
        self.store.add(entry, content)

    def register(
        self,
        name: str,
        folder: str | Path,
    ) -> None:
        """Adds an adapter that is mounted when it is first used. Its folder is not read now.

        Raises:
            ValueError: the name is taken or is none, or there is no such folder.
        """
        self.store.expect_new(name)
        try:
            is_folder = Path(folder).is_dir()
        except OSError:  # the text is too long for a path
            is_folder = False
        if not is_folder:
            raise ValueError(f"AdapterPool: there is no folder {folder}")
        self.store.add(Entry(name, Path(folder)))

    def replace(
        self, name: str, source: str | Path | Mapping[str, Tensor], config: Any = None
    ) -> None:
        """Mounts a new version of an adapter, which those who use it from now on get.

        Whoever uses the old version keeps it; its pages are free when the last of them leaves.

        Args:
            name: of an adapter that the pool knows.
            source, config: as in load. Tensors without a config have that of the version before.

        Raises:
            ValueError, MemoryError: as load does; the old version stays.
        """
        entry = self.store.known(name)
        fresh = Entry(name, layout=entry.layout)
        content = self.store.content(fresh, source, config)
        self.store.swap(entry, fresh, content)

    def unload(self, name: str) -> None:
        """Forgets an adapter. Whoever uses it keeps it.

        Raises:
            ValueError: there is no such adapter.
        """
        self.store.remove(name)

    def pin(self, name: str) -> None:
        """Mounts an adapter, if it is not, and keeps it mounted.

        Raises:
            ValueError: there is no such adapter, or it is broken.
            MemoryError: there is no room for it.
        """
        entry = self.store.known(name)
        with self.store.leased([name]):
            entry.pinned = True

    def unpin(self, name: str) -> None:
        """Lets an adapter make room for others again.

        Raises:
            ValueError: there is no such adapter.
        """
        self.store.known(name).pinned = False

    def names(self) -> list[str]:
        """The adapters that the pool knows, mounted or not, in the order in which they came."""
        with self.store.lock:
            return [*self.store.entries]

    def version(self, name: str) -> int:
        """A number that is another one whenever the adapter is. A cache of prompts may go by it.

        It is 0 before a registered adapter is read. No two versions of any adapters share another.

        Raises:
            ValueError: there is no such adapter.
        """
        return self.store.known(name).number

    def stats(self) -> PoolStats:
        """What the pool holds now."""
        store = self.store
        with store.lock:
            entries = [*store.entries.values()]
            versions = [entry.version for entry in entries if entry.version is not None]
            return PoolStats(
                adapters=len(entries),
                mounted=len(versions),
                pinned=sum(entry.pinned for entry in entries),
                used=sum(version.users > 0 for version in versions),
                pages=store.room.total,
                free_pages=len(store.room.free),
                old_pages=sum(len(version.pages) for version in store.old),
                page_bytes=store.layers.page_bytes,
                mounts=store.mounts,
                evictions=store.evictions,
            )

    def fits(self, config: Any) -> int:
        """How many adapters of a LoraConfig, or a dict of its fields, can be mounted at once.

        0 where its largest rank is more than max_rank.
        """
        fields = fields_of(config, "AdapterPool")
        patterns = (fields.get("rank_pattern") or {}).values()
        rank = max(fields.get("r") or 8, *patterns, 1)
        if rank > self.store.layers.sites.max_rank:
            return 0
        return self.store.room.total // -(-rank // PAGE)

    @contextmanager
    def use(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, calls of the model have these adapters, whatever happens to their names.

        It counts for the calls of this thread or task. Inside of another `use`, the inner one
        counts. Adapters that are not mounted are mounted first.

        Args:
            names: one for each sample of the batch; "__base__" is the model alone.

        Raises:
            ValueError: a name is not known, or its adapter is broken.
            MemoryError: there is no room for all of them at once.
        """
        if not isinstance(names, (list, tuple)):
            raise TypeError(
                f"Got adapter names of type {type(names)}, expected a list of str."
            )
        with self.store.leased(names) as versions:
            samples = [-1 if name == BASE else versions[name].slot for name in names]
            layers = [version.layers for version in versions.values()]
            device = self.store.fences.device
            with self.routed(Route(samples, frozenset().union(*layers), device)):
                yield

    @contextmanager
    def routed(self, route: Route) -> Iterator[None]:
        """Inside, the layers go by this route."""
        token = self.current.set(route)
        try:
            yield
        finally:
            self.current.reset(token)

    def taking_names(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the model that takes adapter_names, too: one for each sample."""

        @wraps(method)
        def call(
            *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
        ) -> Any:
            if adapter_names is not None:
                with self.use(adapter_names):
                    return call(*args, **kwargs)
            if name == "forward":
                return method(*args, **kwargs)
            route = self.current.get()
            if route is None:
                return method(*args, **kwargs)
            copies = copies_of_samples(self.model, args, kwargs)
            with self.routed(route.of_copies(copies)):
                return method(*args, **kwargs)

        return call

    def close(self) -> None:
        """Gives the model its own layers back, and lets the parameters train that did before.

        Raises:
            RuntimeError: somebody is inside `use`.
        """
        with self.store.mounting, self.store.lock:
            stats = self.stats()
            if stats.used or stats.old_pages or self.current.get() is not None:
                raise RuntimeError("AdapterPool: close must be called outside of use")
            for name in self.names():
                self.unload(name)
            self.unwrap()
            for name, method in self.own.items():
                del vars(self.model)[name]
                if method is not None:
                    vars(self.model)[name] = method


def bytes_of(memory: int | str) -> int:
    """The bytes that a text such as "4GiB" or "500MB" means."""
    if type(memory) is int and memory > 0:
        return memory
    match = SIZE.fullmatch(memory) if isinstance(memory, str) else None
    if match is None:
        raise ValueError(
            f'AdapterPool: memory must be bytes or a text like "4GiB", got {memory!r}'
        )
    number, prefix, binary = match.groups()
    power = "KMGT".index(prefix.upper()) + 1 if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** power)
