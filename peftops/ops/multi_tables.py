"""Multi-LoRA's small tensors: which pages an adapter has, ranks, scales, slots.

They depend on a call's constants alone, so that all layers and all steps share them. They are kept,
except while a graph is traced.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .lora_base import capturing, traced
from .multi_contract import PAGE

MOST = 1024  # tensors that are kept
KEPT: dict[Hashable, Tensor] = {}


def tensor_of(numbers: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers as a tensor (len(numbers),)."""

    def make():
        # a copy from the host cannot be captured
        if numbers and capturing(device):
            filled = [torch.full((1,), v, dtype=dtype, device=device) for v in numbers]
            return torch.cat(filled)
        return torch.tensor(numbers, dtype=dtype).to(device)

    return kept((numbers, dtype, device), device, make)


def pages_of(ranks: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """table (adapters, pages) and rank (adapters,) of adapters that lie one below the other."""

    def make():
        pages = [-(-rank // PAGE) for rank in ranks]
        most = max(pages)
        table: list[int] = []
        first = 0
        for count in pages:
            table += [*range(first, first + count), *[0] * (most - count)]
            first += count
        flat = tensor_of(tuple(table), torch.int32, device)
        return flat.view(len(ranks), most)

    table = kept(("pages", ranks, device), device, make)
    return table, tensor_of(ranks, torch.int32, device)


def slots_of(samples: tuple[int, ...], rows: int, device: torch.device) -> Tensor:
    """(m,) int32: the slot of each row, where each sample has so many rows."""

    def make():
        return tensor_of(samples, torch.int32, device).repeat_interleave(rows)

    return kept(("slots", samples, rows, device), device, make)


def kept(key: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """make(), or what it returned before for this key."""
    if traced():
        return make()
    found = KEPT.get(key)
    if found is None:
        with torch.inference_mode(False):  # training could not save it for backward
            found = make()
        if capturing(device):  # it belongs to the graph
            return found
        if len(KEPT) >= MOST:
            KEPT.clear()
        KEPT[key] = found
    return found
