"""PackedNF4: a module that owns a weight in 4 bits, which only a state dict can change."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..functional import Base
from ..ops.nf4 import NF4Weight


class PackedNF4(nn.Module):
    """Holds codes and scales of an NF4Weight. A subclass gives it a `shape`.

    They are frozen parameters of integers, so FSDP2 shards them, and no cast to another dtype
    changes a bit of them, a mixed precision policy included. Scales in fp32 are held as int32.
    Tables are buffers.
    """

    if TYPE_CHECKING:  # what nn.Module finds for these names
        _parameters: dict[str, Any]
        _buffers: dict[str, Any]
        weight: Tensor
        absmax: nn.Parameter
        nested_absmax: nn.Parameter | None

        @property
        def shape(self) -> Sequence[int]:
            """The shape of the weight before it was packed."""

    def hold(
        self,
        base: list[Tensor],
        dtype: torch.dtype,
        blocksize: int,
        quant_type: str,
    ) -> None:
        """Takes the tensors of an NF4Weight for its own. The large ones are not copied.

        Args:
            base: NF4Weight.base: codes, table, then scales.
            dtype: that of the weight before it was quantized.
            blocksize: elements that share a scale.
            quant_type: "nf4" or "fp4".
        """
        codes, table, absmax, *nested = base
        nested_absmax, nested_table, offset = nested or (None, None, None)
        self.weight_dtype = dtype
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.double_quant = bool(nested)
        self.register_parameter("weight", frozen(codes.view(-1, 1)))
        self.register_parameter("absmax", frozen(absmax))
        self.register_parameter("nested_absmax", frozen(nested_absmax))
        self.register_buffer("quant_map", own_copy(table))
        self.register_buffer("nested_quant_map", own_copy(nested_table))
        self.register_buffer("nested_offset", own_copy(offset))

    def base(self, dtype: torch.dtype = torch.float32) -> Base:
        """What lora_linear takes for the weight, where x is of this dtype."""
        parameters, tables = self._parameters, self._buffers
        tensors = [parameters["weight"], tables["quant_map"]]
        if self.double_quant:
            nested = parameters["nested_absmax"].view(torch.float32)
            tensors += [
                parameters["absmax"],
                nested,
                tables["nested_quant_map"],
                tables["nested_offset"],
            ]
        else:
            tensors.append(parameters["absmax"].view(torch.float32))
        if dtype is torch.float64:
            tensors = [t.double() if t.is_floating_point() else t for t in tensors]
        return Base("nf4", tensors, self.blocksize)

    @property
    def quantized(self) -> NF4Weight:
        """The weight as an NF4Weight, of the same bytes."""
        codes, table, *scales = self.base().tensors
        return NF4Weight(
            codes.detach(),
            table,
            scales,
            self.shape,
            self.weight_dtype,
            self.blocksize,
            self.quant_type,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Ŵ, in this dtype or, for None, in the one that the weight had before."""
        return self.quantized.dequantize(dtype)

    def _apply(self, fn, recurse=True):
        tables = {id(t) for t in self._buffers.values() if t is not None}

        def keep_bits(t):
            if id(t) in tables:
                return fn(t.view(torch.int32)).view(torch.float32)
            return fn(t)

        return super()._apply(keep_bits, recurse)


def frozen(t: Tensor | None) -> nn.Parameter | None:
    """A parameter of integers with the tensor's bits, or None."""
    if t is None:
        return None
    bits = t.view(torch.int32) if t.dtype is torch.float32 else t
    return nn.Parameter(bits, requires_grad=False)


def own_copy(table: Tensor | None) -> Tensor | None:
    """A copy, since all layers are given the same table, or None."""
    return None if table is None else table.clone()
