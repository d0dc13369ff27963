"""What vLLM's layers call for their LoRA products, and where their adapters lie.

A layer keeps its stacks of adapters, but as views of pools whose rank-rows lie as the kernels read
them; the real rank of each slot is noted. vLLM's punica wrapper is shared by all layers; each of
ours stands before it, and passes on what it does not do itself.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops.multi import multi_add_
from ...ops.multi_contract import PAGE
from ...ops.multi_pages import DTYPES


class Slots:
    """The part of a punica wrapper that is ours: which slot each row has.

    Attributes:
        rows, prompts: (tokens,) int32, the slot of each row of a layer, and of each row of the
            logits; -1 for the base alone.
        present: the slots that the batch has.
        table: (slots, pages) int32, see multi_contract.py.
        dtype: the model's.
    """

    dtype: torch.dtype
    present: set[int]

    def __init__(
        self,
        max_num_batched_tokens,
        *args,
        device,
        lora_config,
        **kwargs,
    ):
        sizes = max_num_batched_tokens, *args
        super().__init__(*sizes, device=device, lora_config=lora_config, **kwargs)
        none = torch.full((max_num_batched_tokens,), -1, dtype=torch.int32)
        self.rows = none.to(device, copy=True)
        self.prompts = none.to(device, copy=True)
        self.present = set()
        slots = lora_config.max_loras
        pages = -(-lora_config.max_lora_rank // PAGE)
        numbers = torch.arange(slots * pages, dtype=torch.int32, device=device)
        self.table = numbers.view(slots, pages)

    def update_metadata(
        self,
        mapping,
        lora_index_to_id,
        *args,
        **kwargs,
    ):
        super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)
        put(self.rows, self.token_lora_indices)
        put(self.prompts, self.sampler_indices)
        ids = {*mapping.index_mapping, *mapping.prompt_mapping}
        self.present = {i for i, name in enumerate(lora_index_to_id) if name in ids}


def put(rows: Tensor, slots: Tensor) -> None:
    """The slots of a batch; what is beyond them has none."""
    count = slots.shape[0]
    rows[:count] = slots
    rows[count:] = -1


@functools.cache
def extended(theirs: type) -> type:
    """vLLM's punica wrapper of a platform, with Slots."""
    return type("PeftopsPunicaWrapper", (Slots, theirs), {})


class OfLayer:
    """What one layer calls instead of the punica wrapper that it shares with all others.

    Attributes:
        adapted: the slots whose adapters have this layer.
    """

    def __init__(
        self,
        wrapper: Any,
        layer: Any,
    ):
        self.wrapper = wrapper
        self.adapted: set[int] = set()
        set_lora, reset_lora = layer.set_lora, layer.reset_lora

        def set_and_note(
            slot,
            lora_a,
            lora_b,
        ):
            set_lora(slot, lora_a, lora_b)
            self.adapted.add(slot)
            self.note(slot, lora_a)

        def reset_and_note(slot):
            reset_lora(slot)
            self.adapted.discard(slot)
            self.note(slot, None)

        layer.set_lora = set_and_note
        layer.reset_lora = reset_and_note

    def note(
        self,
        slot: int,
        lora_a: Tensor | Sequence[Tensor | None] | None,
    ) -> None:
        """Takes notice of the lora_A that a slot has got, or of None."""

    def unused(self) -> bool:
        """Whether no row of the batch has an adapter of this layer."""
        return self.adapted.isdisjoint(self.wrapper.present)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapper, name)


class Embedding(OfLayer):
    """For the embedding: vLLM's product, where an adapter has one."""

    def add_lora_embedding(
        self,
        y: Tensor,
        x: Tensor,
        *args: Any,
        **kwargs: Any,
    ):
        """y += x·b, with the b of each row's slot."""
        if self.unused():
            return y
        # vLLM's kernels for CPUs take slot -1 for the last one
        none = self.wrapper.rows[: x.shape[0], None] < 0
        return self.wrapper.add_lora_embedding(
            y, x.masked_fill(none, 0), *args, **kwargs
        )


class Pooled(OfLayer):
    """A layer with pools, whose parts lie side by side in its output, such as q, k and v.

    Attributes:
        a: (parts, R, k) and b (R, n), the pools; slot s has the rank-rows of its pages.
        rank: (parts, slots) int32, and scale (parts, slots) fp32, which is 1: vLLM multiplies
            lora_B by its scaling when it loads an adapter.
        widths: (parts,) int32, the columns of each part.
    """

    def __init__(
        self,
        wrapper: Any,
        layer: Any,
        like: Tensor,
        widths: Sequence[int],
    ):
        """like: a stack of lora_A (slots, 1, rank, k); widths: of the parts"""
        super().__init__(wrapper, layer)
        slots, _, _, k = like.shape
        parts = len(widths)
        device = like.device
        rows = PAGE * wrapper.table.numel()
        self.a = like.new_zeros(parts, rows, k)
        self.b = like.new_zeros(rows, sum(widths))
        self.rank = torch.zeros(parts, slots, dtype=torch.int32, device=device)
        self.scale = torch.ones(parts, slots, device=device)
        self.widths = torch.tensor(widths, dtype=torch.int32, device=device)
        self.sizes = tuple(widths)  # the same, for the host
        self.most = like.shape[2]

    def stacks(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Views in vLLM's shapes: of each part (slots, 1, rank, k) and (slots, 1, width, rank)."""
        parts, slots = self.rank.shape
        a = self.a.view(parts, slots, 1, -1, self.a.shape[2])
        b = self.b.view(slots, 1, -1, self.b.shape[1])
        turned = b[:, :, : self.most].transpose(2, 3)
        return tuple(a[:, :, :, : self.most]), turned.split(self.sizes, 2)

    def note(
        self,
        slot,
        lora_a,
    ):
        whole = lora_a is None or isinstance(lora_a, Tensor)
        each = [lora_a] if whole else lora_a
        ranks = [0 if part is None else part.shape[0] for part in each]
        parts = len(self.sizes)
        if len(ranks) != parts:  # vLLM deals them out; rows beyond a part's rank are 0
            ranks = [max(ranks)] * parts
        self.rank[:, slot] = torch.tensor(ranks, dtype=torch.int32)

    def add(
        self,
        y: Tensor,
        x: Tensor,
        rows: Tensor,
        scale: float,
    ) -> None:
        """y += scale · (x·aᵀ)·b in each part; y (m, ≥ n), x (m, k), rows (≥ m,)"""
        multi_add_(
            y,
            x,
            self.a,
            self.b,
            rows[: x.shape[0]],
            self.wrapper.table,
            self.rank,
            self.scale if scale == 1 else self.scale * scale,
            self.widths,
        )


class Linear(Pooled):
    """For a linear layer."""

    def __init__(
        self,
        wrapper: Any,
        layer: Any,
    ):
        like = layer.lora_a_stacked[0]
        super().__init__(wrapper, layer, like, layer.output_slices)
        layer.lora_a_stacked, layer.lora_b_stacked = self.stacks()
        self.can_skip = like.device.type == "cpu"  # a CUDA graph cannot

    def add_lora_linear(
        self,
        y,
        x,
        a,
        b,
        scale,
        output_slices,
        **kwargs: Any,
    ) -> None:
        if not (self.can_skip and self.unused()):
            self.add(y, x, self.wrapper.rows, scale)


class Head(Pooled):
    """For the product that makes logits. It is never part of a CUDA graph."""

    def __init__(
        self,
        wrapper: Any,
        layer: Any,
    ):
        width = layer.lora_b_stacked.shape[2]
        super().__init__(wrapper, layer, layer.lora_a_stacked, (width,))
        (layer.lora_a_stacked,), (layer.lora_b_stacked,) = self.stacks()

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        a,
        b,
        scale,
        **kwargs: Any,
    ):
        if self.unused():
            return y
        x = x.flatten(0, -2)
        if y.dtype is x.dtype:
            self.add(y, x, self.wrapper.prompts, scale)
        else:  # logits may be made in fp32
            delta = y.new_zeros(y.shape, dtype=x.dtype)
            self.add(delta, x, self.wrapper.prompts, scale)
            y += delta
        return y


def can_pool(stacks: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether a pool can take the place of these stacks of lora_A in a model of this dtype."""
    like = stacks[0]
    return (
        dtype in DTYPES
        and like.dtype in (dtype, torch.float32)
        and like.device.type in ("cpu", "cuda")
        and all(stack.shape == like.shape for stack in stacks)
    )


def can_serve(layer: Any, dtype: torch.dtype) -> bool:
    """Whether a linear layer's stacks are such that pools can take their place."""
    widths = tuple(stack.shape[2] for stack in layer.lora_b_stacked)
    return (
        not layer.lora_config.fully_sharded_loras
        and can_pool(layer.lora_a_stacked, dtype)
        and widths == tuple(layer.output_slices)
    )
