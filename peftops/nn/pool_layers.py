"""The layers of a pool: how a model gets them, and how adapters get into their pages and out."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter_file.names import name_rule
from ..ops.lora_base import wide_dtype
from ..ops.multi_contract import PAGE
from ..ops.multi_pages import Put, put
from .base_layer import features_of, is_conv1d, readable, weight_of
from .dora import norm_of
from .multi import MultiLoRALinear, SlotTable
from .nf4 import LinearNF4
from .pool_parts import Part, Site, Sites


class Layers:
    """The MultiLoRALinear layers of a model.

    Attributes:
        each: the layers, in the model's order.
        sites: what its adapters may be.
        slots: what the layers share.
        page_bytes: what a page takes in all layers, with the gain of its slot.
    """

    def __init__(
        self,
        bases: dict[str, nn.Module],
        memory: int,
        max_rank: int,
        dtype: torch.dtype | None,
    ):
        unique = list(dict.fromkeys(bases.values()))
        dtypes = [page_dtype(base, dtype) for base in unique]
        sizes = [features_of(base) for base in unique]
        wide = wide_dtype(dtypes[0])
        self.page_bytes = sum(
            PAGE * (k + n) * of.itemsize + n * wide.itemsize
            for (k, n), of in zip(sizes, dtypes, strict=True)
        )
        pages = memory // self.page_bytes
        least = -(-max_rank // PAGE)
        if pages < least:
            raise ValueError(
                f"AdapterPool: memory must hold one adapter of rank {max_rank}, "
                f"{least * self.page_bytes} bytes, got {memory}"
            )
        try:
            self.slots = SlotTable(
                pages, max_rank, len(unique), device_of_all(unique), wide
            )
            self.each = [
                MultiLoRALinear(base, self.slots, index, of)
                for index, (base, of) in enumerate(zip(unique, dtypes, strict=True))
            ]
        except RuntimeError as error:
            text = f"AdapterPool: {memory} bytes of memory cannot be had"
            raise MemoryError(text) from error
        index_of = {base: index for index, base in enumerate(unique)}
        by_name = {
            name: Site(index_of[base], *features_of(base), readable(base))
            for name, base in bases.items()
        }
        largest = min(torch.finfo(of).max for of in {*dtypes, wide})
        self.sites = Sites(by_name, max_rank, largest)

    @torch.no_grad()
    def fill(
        self,
        pages: list[int],
        parts: list[Part],
    ) -> None:
        """Puts an adapter into pages that nobody reads. Its slot is the first of them."""
        device = self.slots.device
        slot = pages[0]
        puts = []
        for part in parts:
            layer = self.each[part.layer]
            puts.append(Put(layer.a, layer.b, part.a, part.b))
        put(puts, pages)
        rank = torch.zeros(len(self.each), dtype=torch.int32)
        scale = torch.zeros(len(self.each), dtype=self.slots.scale.dtype)
        index = torch.tensor([part.layer for part in parts])
        rank[index] = torch.tensor(
            [part.a.shape[0] for part in parts], dtype=torch.int32
        )
        scale[index] = torch.tensor([part.scaling for part in parts], dtype=scale.dtype)
        self.slots.rank[:, slot] = rank.to(device)
        self.slots.scale[:, slot] = scale.to(device)
        numbers = torch.tensor(pages, dtype=torch.int32)
        self.slots.table[slot, : len(pages)] = numbers.to(device)
        self.fill_gains(slot, parts)

    def fill_gains(
        self,
        slot: int,
        parts: list[Part],
    ) -> None:
        """Computes the slot's gains: DoRA's magnitude / norm, and 1 elsewhere."""
        if any(part.magnitude is not None for part in parts):
            self.make_gains()
        magnitudes = {part.layer: part for part in parts if part.magnitude is not None}
        for layer in self.each:
            if layer.gain is not None:
                part = magnitudes.get(layer.index)
                layer.gain[slot] = 1 if part is None else gain_of(layer, slot, part)

    def make_gains(self) -> None:
        """Gives all layers gains of 1, unless they have gains."""
        if self.each[0].gain is not None:
            return
        slots = self.slots.table.shape[0]
        with torch.inference_mode(False):
            gains = [
                layer.scale.new_ones(slots, layer.out_features) for layer in self.each
            ]
        if self.slots.device.type == "cuda":
            # calls on other streams read them as soon as the layers have them
            torch.cuda.current_stream(self.slots.device).synchronize()
        for layer, gain in zip(self.each, gains, strict=True):
            layer.gain = gain

    @torch.no_grad()
    def parts_in(
        self,
        slot: int,
        parts: list[Part],
    ) -> list[Part]:
        """The parts of the adapter in a slot, with copies of its matrices in the host's memory."""
        whole = []
        for part in parts:
            a, b = self.each[part.layer].adapter_in(slot)
            whole.append(part._replace(a=a.cpu(), b=b.T.contiguous().cpu()))
        return whole


def gain_of(
    layer: MultiLoRALinear,
    slot: int,
    part: Part,
) -> Tensor:
    """The gain (n,) of a DoRA adapter whose matrices lie in the slot's pages."""
    a, b = layer.adapter_in(slot)
    weight, dtype = weight_of(layer.base_layer)
    norm = norm_of(weight, a, b.T, part.scaling, dtype)
    magnitude: Any = part.magnitude
    return magnitude.to(norm.device, layer.scale.dtype) / norm


def wrap(
    model: nn.Module,
    memory: int,
    max_rank: int,
    dtype: torch.dtype | None,
    target_modules: str | Sequence[str],
) -> tuple[Layers, Callable[[], None]]:
    """Replaces the layers of a model that may have adapters. Returns them, and what undoes it."""
    if any("lora_A" in module._modules for module in model.modules()):
        raise ValueError(
            "AdapterPool: model must be without PEFT's layers; give it the base model"
        )
    if any(isinstance(module, MultiLoRALinear) for module in model.modules()):
        raise ValueError("AdapterPool: model has a pool already; close that first")
    bases = innermost(dict(candidates(model, target_modules)))
    if not bases:
        raise ValueError(
            f"AdapterPool: target_modules {target_modules!r} match no linear layer"
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        layers = Layers(bases, memory, max_rank, dtype)
    except BaseException:
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    model.requires_grad_(False)
    for name, site in layers.sites.by_name.items():
        owner, _, child = name.rpartition(".")
        setattr(model.get_submodule(owner), child, layers.each[site.layer])

    def undo() -> None:
        for name, base in bases.items():
            owner, _, child = name.rpartition(".")
            setattr(model.get_submodule(owner), child, base)
        for parameter in trained:
            parameter.requires_grad_(True)

    return layers, undo


def candidates(
    model: nn.Module, target_modules: str | Sequence[str]
) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of the linear layers that target_modules match.

    Experts of a list are left out: a batch's rows are mixed before they get there.
    """
    everything = target_modules == "all-linear"
    matches = name_rule(
        "target_modules",
        target_modules if isinstance(target_modules, str) else list(target_modules),
    )
    output: Any = None
    if everything and hasattr(model, "get_output_embeddings"):
        output = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or not is_linear(module) or module is output:
            continue
        if "experts" not in name.split(".") and matches(name):
            yield name, module


def innermost(bases: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of the layers that hold none of the others."""
    owners = {name.rpartition(".")[0] for name in bases}
    return {
        name: base
        for name, base in bases.items()
        if not any(f"{owner}.".startswith(f"{name}.") for owner in owners)
    }


def is_linear(module: Any) -> bool:
    """Whether a module is called for x·Wᵀ + bias: nn.Linear, Conv1D, or a quantizer's like it."""
    if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return False  # nn.MultiheadAttention reads its weight and does not call it
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return True
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return "Linear" in type(module).__name__ and all(type(v) is int for v in sizes)


def page_dtype(base: Any, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a layer's pages, where the pool has been asked for this one."""
    if isinstance(base, LinearNF4):
        computes = base.compute_dtype or base.weight_dtype
    else:
        weight: Any = getattr(base, "weight", None)
        floating = isinstance(weight, Tensor) and weight.is_floating_point()
        computes = weight.dtype if floating and weight.itemsize > 1 else torch.float32
    if dtype in (None, computes):
        return computes
    if dtype is torch.float32 and computes is not torch.float64:
        return torch.float32
    raise ValueError(
        f"AdapterPool: dtype must be {computes} or torch.float32, got {dtype}"
    )


def device_of_all(bases: list[nn.Module]) -> torch.device:
    """The device of these layers. Raises ValueError if they are on several, or on meta."""
    devices = {t.device for base in bases for t in base.parameters()}
    devices |= {t.device for base in bases for t in base.buffers()}
    found = sorted(map(str, devices))
    if len(found) != 1 or found == ["meta"]:
        raise ValueError(
            f"AdapterPool: model must be on one device, got {', '.join(found)}"
        )
    return devices.pop()
