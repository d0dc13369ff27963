"""What a pool mounts: the matrices of an adapter, from a folder or from tensors, checked whole."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapter_file import EMBEDDING, Adapter, faults, without_prefix
from ..adapter_file.config import checked, fields_of
from ..adapter_file.features import LACKED, MOVES_BASE, UNREAD
from ..adapter_file.header import Stored
from ..ops.multi_pages import not_finite

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_SCALING = torch.finfo(torch.float32).max


class Site(NamedTuple):
    """A layer of a pool.

    Attributes:
        layer: its row in the pool's SlotTable.
        k, n: its inputs and outputs.
        has_norm: whether DoRA's norm of its weight can be computed.
    """

    layer: int
    k: int
    n: int
    has_norm: bool


class Sites(NamedTuple):
    """What adapters of a pool may be.

    Attributes:
        by_name: {name in the model: Site}.
        max_rank: the largest rank.
        largest: the largest number that all pages can hold.
    """

    by_name: Mapping[str, Site]
    max_rank: int
    largest: float


class Part(NamedTuple):
    """An adapter in one layer.

    Attributes:
        layer: its index.
        a: lora_A (r, k).
        b: lora_B (n, r).
        scaling: what B·A is multiplied by.
        magnitude: (n,), of DoRA, or None.
    """

    layer: int
    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None


class Place(NamedTuple):
    """Where the tensors of a Part are: its layer, their keys, and the scaling."""

    layer: int
    a: str
    b: str
    scaling: float
    magnitude: str | None


class Layout(NamedTuple):
    """What an adapter is apart from its numbers. A pool can serve whatever has one.

    Attributes:
        config: the fields of its adapter_config.json.
        kinds: {key: (shape, dtype)} of its tensors.
        places: the layers that it is in.
    """

    config: dict[str, Any]
    kinds: dict[str, tuple[torch.Size, torch.dtype]]
    places: list[Place]


class Content(NamedTuple):
    """An adapter that a pool can mount.

    Attributes:
        data: the memory that its matrices lie in, if another file may be read into it afterwards.
    """

    layout: Layout
    parts: list[Part]
    data: Tensor | None = None


def content_of_tensors(
    name: str,
    tensors: Mapping[str, Tensor],
    config: Any,
    before: Layout | None,
    sites: Sites,
) -> Content:
    """The adapter that consists of these tensors, which are not copied.

    Args:
        name: the adapter's, for errors.
        tensors: under the keys of an adapter's file, as get_peft_model_state_dict gives them.
        config: a LoraConfig, or the fields of adapter_config.json as a dict. None: that of before.
        before: the layout of another version of the adapter. Where tensors are of the same kinds,
            nothing else is looked at.

    Raises:
        ValueError: the adapter is none that these layers can have.
        TypeError: config or tensors are of another type.
    """
    for key, t in tensors.items():
        if not isinstance(key, str):
            raise TypeError(f"{name}: a key must be a text, got {key!r}")
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: {key} must be a tensor, got {type(t).__name__}")
        if t.layout is not torch.strided or t.is_nested or t.is_meta:
            raise TypeError(f"{name}: {key} must be a dense tensor with values")
    layout = before
    if config is not None or before is None or kinds_of(tensors) != before.kinds:
        stored = {key: stored_of(key, t) for key, t in tensors.items()}
        fields = fields_of(
            before.config if config is None and before else config, "AdapterPool"
        )
        adapter = Adapter(Path(name), checked(fields, Path(name)), stored)
        expect_servable(adapter, sites)
        layout = layout_of(adapter, sites)
    assert layout is not None
    return Content(layout, parts_of(layout, tensors, Path(name), sites.largest))


def stored_of(key: str, t: Tensor) -> Stored:
    """A tensor as if it were in a file."""
    return Stored(key, NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape), 0, t.nbytes)


def kinds_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {key: (t.shape, t.dtype) for key, t in tensors.items()}


def expect_servable(adapter: Adapter, sites: Sites) -> None:
    """Raises ValueError for the first thing that keeps a pool from serving an adapter."""
    source = adapter.folder
    config = adapter.config
    if not adapter.is_lora:
        raise ValueError(f"{source}: peft_type must be LORA, got {config['peft_type']}")
    for field, what in (LACKED | UNREAD | {"lora_bias": "biases of lora_B"}).items():
        if config.get(field):
            raise ValueError(f"{source}: {field}: a pool has no {what}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and MOVES_BASE.fullmatch(init):
        raise ValueError(
            f"{source}: init_lora_weights {init!r} changes the base's weights, "
            "which the adapters of a pool share; convert it to plain LoRA"
        )
    for verdict, text in faults(adapter):
        if verdict == "broken":
            raise ValueError(f"{source}: {text}")
    if adapter.others:
        key = without_prefix(adapter.others[0])
        raise ValueError(f"{source}: {key} is no LoRA weight of a linear layer")
    for module, tensors in adapter.modules.items():
        if wrong := misplaced(adapter, module, tensors, sites):
            raise ValueError(f"{source}: {wrong}")


def misplaced(
    adapter: Adapter,
    module: str,
    tensors: Mapping[str, Stored],
    sites: Sites,
) -> str | None:
    """Why these layers cannot have the tensors of a module, or None."""
    a = tensors["A"]
    b = tensors["B"]
    site = sites.by_name.get(module)
    target = adapter.targets[module]
    if site is None or target == "parameter" or EMBEDDING in a.key:
        return f"{without_prefix(a.key)} is of no layer of the pool"
    if target != "module":
        return f"{without_prefix(a.key)}: {target} leaves {module} out"
    rank = a.shape[0]
    if a.shape != (rank, site.k):
        return f"{without_prefix(a.key)} must be {(rank, site.k)}, got {a.shape}"
    if b.shape != (site.n, rank):
        return f"{without_prefix(b.key)} must be {(site.n, rank)}, got {b.shape}"
    if rank > sites.max_rank:
        return (
            f"{without_prefix(a.key)} has rank {rank}, and max_rank of the pool is "
            f"{sites.max_rank}"
        )
    if abs(adapter.scaling_of(module)) > LARGEST_SCALING:
        return f"{module} has a scaling of more than {LARGEST_SCALING:.3g}"
    if "magnitude_vector" in tensors and not site.has_norm:
        return f"{module}: its weight cannot be read, and so it has no DoRA"
    return None


def layout_of(
    adapter: Adapter,
    sites: Sites,
) -> Layout:
    """The layout of an adapter that was found servable.

    Raises:
        ValueError: the model has one layer under two names, and the adapter has something for both.
    """
    places: dict[int, Place] = {}
    for module, held in adapter.modules.items():
        magnitude = held.get("magnitude_vector")
        place = Place(
            sites.by_name[module].layer,
            held["A"].key,
            held["B"].key,
            adapter.scaling_of(module),
            None if magnitude is None else magnitude.key,
        )
        if place.layer in places:
            both = without_prefix(places[place.layer].a), without_prefix(place.a)
            raise ValueError(
                f"{adapter.folder}: {' and '.join(both)} are of one layer, which can have one"
            )
        places[place.layer] = place
    kinds = {
        key: (torch.Size(t.shape), DTYPES[t.dtype])
        for key, t in adapter.tensors.items()
    }
    return Layout(adapter.config, kinds, [*places.values()])


def parts_of(
    layout: Layout, tensors: Mapping[str, Tensor], source: Path, largest: float
) -> list[Part]:
    """The parts of an adapter with this layout.

    Raises:
        ValueError: a tensor holds NaN, infinity, or a number of more than `largest`.
    """
    wrong = not_finite([*tensors.values()])
    if wrong is not None:
        key = without_prefix([*tensors][wrong])
        raise ValueError(f"{source}: {key} holds NaN or infinity")
    wide = {
        dtype
        for dtype in {t.dtype for t in tensors.values()}
        if torch.finfo(dtype).max > largest
    }
    for key, t in tensors.items():
        if t.dtype in wide and t.abs().max() > largest:
            raise ValueError(
                f"{source}: {without_prefix(key)} holds a number of more than "
                f"{largest:.3g}, which the pages cannot hold"
            )
    return [
        Part(
            place.layer,
            tensors[place.a],
            tensors[place.b],
            place.scaling,
            None if place.magnitude is None else tensors[place.magnitude].flatten(),
        )
        for place in layout.places
    ]


def marks_of(parts: Sequence[Part]) -> list[Part]:
    """The parts with empty matrices, and with magnitudes of their own."""
    none = torch.empty(0)
    marks = []
    for layer, _, _, scaling, magnitude in parts:
        own = None if magnitude is None else magnitude.detach().clone()
        marks.append(Part(layer, none, none, scaling, own))
    return marks
