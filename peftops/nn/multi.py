"""MultiLoRALinear: a frozen linear layer in which each row meets an adapter of a pool.

The adapters lie in pages of 8 rank-rows. All layers of a pool share the numbers of the pages, so
that an adapter has the same pages in each of them.
"""

import itertools
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from .._op import LIBRARY
from ..functional import Base
from ..ops.lora_base import shaped
from ..ops.lora_formula import differentiable, transformed
from ..ops.multi import arguments_of_pages, mixed
from ..ops.multi_autograd import y_alone
from ..ops.multi_contract import PAGE
from .base_layer import Operands, features_of, operands_of, readable

NUMBERS = itertools.count()
TABLES: "WeakValueDictionary[int, SlotTable]" = WeakValueDictionary()


class Route:
    """Which slot each sample of a batch has.

    Attributes:
        samples: the slot of each sample, -1 for the base alone.
        layers: the indices of the layers in which a sample has an adapter.
        copies: how many rows `generate` makes of each sample: beams and returned sequences.
    """

    def __init__(
        self,
        samples: Sequence[int],
        layers: frozenset[int],
        device: torch.device,
        copies: int = 1,
    ):
        self.samples = tuple(samples)
        self.layers = layers
        self.device = device
        self.copies = copies
        self.kept: dict[Sequence[int], Tensor] = {}

    def of_copies(self, copies: int) -> "Route":
        """The route of a batch that has so many rows of each sample, or one."""
        return Route(self.samples, self.layers, self.device, copies)

    def slots_of(self, x: Tensor) -> Tensor:
        """The slot of each row of x (..., k), as (m,) int32.

        Raises:
            ValueError: x has not as many samples as the batch.
        """
        shape = x.shape[:-1]
        slots = self.kept.get(shape)
        if slots is None:
            slots = self.kept[shape] = self.made(shape)
        return slots

    def made(self, shape: Sequence[int]) -> Tensor:
        samples = len(self.samples)
        count = shape[0] if shape else 1
        # x (tokens, k) has the tokens of a sample one after the other
        fits = count in (samples, samples * self.copies) or (
            len(shape) == 1 and count % samples == 0
        )
        if not fits:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{samples} and {count} respectively."
            )
        rows = torch.Size(shape).numel() // samples
        with torch.inference_mode(False):
            slots = torch.tensor(self.samples, dtype=torch.int32)
            return slots.repeat_interleave(rows).to(self.device)


def copies_of_samples(
    model: Any,
    args: tuple,
    kwargs: Mapping[str, Any],
) -> int:
    """How many rows transformers' generate makes of each sample, called with these arguments."""
    passed = args[1] if len(args) > 1 else kwargs.get("generation_config")
    configs = passed, getattr(model, "generation_config", None)
    copies = 1
    for key in ("num_beams", "num_return_sequences"):
        found = [kwargs.get(key), *(getattr(config, key, None) for config in configs)]
        copies = max(copies, next((v for v in found if v is not None), 1))
    return copies


class SlotTable:
    """What the layers of a pool share: the pages, ranks and scales of its slots.

    Attributes:
        table: (S, P) int32, the pages of each slot.
        rank: (layers, S) int32. 0: the slot has no adapter in this layer.
        scale: (layers, S), what B·A is multiplied by.
        route: of the calls in this thread or task, or None for the base alone.
        number: by which compiled graphs know it.
    """

    def __init__(
        self,
        pages: int,
        max_rank: int,
        layers: int,
        device: torch.device,
        wide: torch.dtype = torch.float32,
    ):
        slots = -(-pages // 4) * 4  # so that each layer's ranks start at 16 bytes
        with torch.inference_mode(False):
            self.table = torch.zeros(
                slots, -(-max_rank // PAGE), dtype=torch.int32, device=device
            )
            self.rank = torch.zeros(layers, slots, dtype=torch.int32, device=device)
            self.scale = torch.zeros(layers, slots, dtype=wide, device=device)
        self.pages = pages
        self.device = device
        self.route: ContextVar[Route | None] = ContextVar("route", default=None)
        self.number = next(NUMBERS)
        TABLES[self.number] = self


class MultiLoRALinear(nn.Module):
    """A frozen linear layer in which each sample of a batch has an adapter of a pool, or none.

    y_i = gain[s] ⊙ (x_i·Wᵀ + scale[s] · (x_i·A[s]ᵀ)·B[s]ᵀ) + bias, with s the slot of row i

    peftops.AdapterPool puts it in the place of a model's linear layers and fills its pages.
    Outside of the pool's `use` it is its base layer. A base that a kernel cannot read, because of
    its class or of hooks, is called for its product.

    Attributes:
        a: (8 · pages, k), every lora_A.
        b: (8 · pages, n), every lora_B, turned.
        gain: (S, n), DoRA's magnitude / norm, 1 for LoRA; None as long as no adapter has DoRA.

    Args:
        base_layer: a linear layer of k inputs and n outputs. It becomes a child of this layer, and
            its parameters are frozen.
        slots: what the layers of the pool share.
        index: the layer's row in `slots`.
        dtype: of the pages: that in which the layer computes, or float32.
    """

    if TYPE_CHECKING:  # what nn.Module finds for this name
        base_layer: Any

    def __init__(
        self,
        base_layer: nn.Module,
        slots: SlotTable,
        index: int,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.in_features, self.out_features = features_of(base_layer)
        self.slots = slots
        self.index = index
        self.rank = slots.rank[index]
        self.scale = slots.scale[index]
        self.gain: Tensor | None = None
        rows = PAGE * slots.pages
        with torch.inference_mode(False):
            self.a = torch.empty(
                rows, self.in_features, dtype=dtype, device=slots.device
            )
            self.b = torch.empty(
                rows, self.out_features, dtype=dtype, device=slots.device
            )

    @property
    def weight(self) -> Tensor:
        """The base layer's, which some models look at."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's, which some models look at."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.traced(x)
        return self.routed(x)

    def routed(self, x: Tensor) -> Tensor:
        """y by the route of now."""
        route = self.slots.route.get()
        base: Any = self._modules["base_layer"]
        if route is None or self.index not in route.layers:
            return base(x)  # whatever its batch is: a vision tower has another one
        slots = route.slots_of(x)
        if readable(base):
            call = operands_of(base, x)
        else:
            self.expect_no_dora(route)
            call = self.called(base, x)
        if differentiable(call.x, call.bias) or transformed():
            y = self.recorded(call, slots)
        else:
            y = self.fused(call, slots)
        return y if call.cast is None else y.to(call.cast)

    def traced(self, x: Tensor) -> Tensor:
        """The same in a graph, which asks for the route whenever it runs."""
        base: Any = self._modules["base_layer"]
        recorded = torch.is_grad_enabled() and x.requires_grad
        if recorded or not (readable(base) or self.gain is None):
            # what to do depends on the route, so it is done between two graphs
            return torch.compiler.disable(self.routed)(x)
        slots = torch.ops.peftops.pool_slots(x, self.slots.number, self.index)
        call = operands_of(base, x) if readable(base) else self.called(base, x)
        y = self.fused(call, slots)
        return y if call.cast is None else y.to(call.cast)

    def called(
        self,
        base: nn.Module,
        x: Tensor,
    ) -> Operands:
        """The operands of a base layer that is called for its product."""
        product = base(x)
        wide = torch.promote_types(x.dtype, product.dtype)
        if self.a.dtype not in (wide, torch.float32):
            wide = self.a.dtype
        given = Base("given", [product.to(wide)])
        return Operands(x.to(wide), given, None, product.dtype)

    def expect_no_dora(self, route: Route) -> None:
        """Raises RuntimeError where DoRA's norm would need the weight that cannot be read now."""
        own = [slot for slot in route.samples if slot >= 0]
        if self.gain is not None and not bool((self.gain[own] == 1).all()):
            raise RuntimeError(
                "dora: the weight of a base layer must be readable, got one with hooks "
                "or a forward of its own since the adapter was mounted"
            )

    def fused(
        self,
        call: Operands,
        slots: Tensor,
    ) -> Tensor:
        """y by one operation over the pages."""
        x, weight, bias, _ = call
        shared = self.slots
        args = arguments_of_pages(
            x,
            weight,
            self.a,
            self.b,
            slots,
            shared.table,
            self.rank,
            self.scale,
            bias,
            self.gain,
        )
        return shaped(y_alone(*args), x.shape)

    def recorded(
        self,
        call: Operands,
        slots: Tensor,
    ) -> Tensor:
        """y for autograd, differentiable in x, from copies of the adapters that are there."""
        x, weight, bias, _ = call
        present, places = slots.unique(return_inverse=True)
        own = [slot for slot in present.tolist() if slot >= 0]
        adapters = [self.adapter_in(slot) for slot in own]
        gain = None if self.gain is None else self.gain[own]
        return mixed(
            x,
            weight,
            [a for a, _ in adapters],
            [b.T for _, b in adapters],
            places - (len(present) - len(own)),
            bias,
            tuple(self.scale[own].tolist()),
            (0.0,) * len(own),
            gain,
        )

    def adapter_in(self, slot: int) -> tuple[Tensor, Tensor]:
        """Copies of lora_A (r, k) and of lora_B, turned, (r, n)."""
        rank = int(self.rank[slot])
        pages = self.slots.table[slot, : -(-rank // PAGE)].long()
        lines = pages[:, None] * PAGE + torch.arange(PAGE, device=pages.device)
        lines = lines.flatten()[:rank]
        return self.a[lines], self.b[lines]

    def extra_repr(self) -> str:
        return f"pages={self.slots.pages}, dtype={self.a.dtype}"


def pool_slots(x: Tensor, table: int, layer: int) -> Tensor:
    """The slot of each row of x (..., k) in this thread's route through a pool, (m,) int32.

    Args:
        table: the number of the pool's SlotTable.
        layer: the index of the layer.
    """
    route = TABLES[table].route.get()
    if route is None or layer not in route.layers:
        return no_slots(x, table, layer)
    return route.slots_of(x).clone()  # a graph may write over what it got


def no_slots(x: Tensor, table: int, layer: int) -> Tensor:
    """The same where no sample has an adapter."""
    m = x.shape[:-1].numel()
    return torch.full((m,), -1, dtype=torch.int32, device=x.device)


# A CUDA graph would keep the route with which it was captured.
LIBRARY.define(
    "pool_slots(Tensor x, int table, int layer) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
LIBRARY.impl("pool_slots", pool_slots, "CompositeExplicitAutograd")
torch.library.register_fake("peftops::pool_slots", no_slots, lib=LIBRARY)
