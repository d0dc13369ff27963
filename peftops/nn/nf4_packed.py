"""PackedNF4: what a module does to own a weight in 4 bits that nothing but a state dict can change."""

import torch
from torch import nn

from ..functional import Base
from ..ops.nf4 import NF4Weight


class PackedNF4(nn.Module):
    """Codes and scales of an NF4Weight, of whatever `shape` a subclass has.

    They are frozen parameters of integers, so that FSDP2 shards them and no cast to another dtype, that of a mixed
    precision policy included, changes a bit of them: scales in fp32 are held as int32. Tables are buffers.
    """

    def hold(self, base, dtype, blocksize, quant_type):
        """Takes the tensors of an NF4Weight for its own, without a copy of the large ones."""
        codes, table, absmax, *nested = base
        nested_absmax, nested_table, offset = nested or (None, None, None)
        self.weight_dtype, self.blocksize, self.quant_type = dtype, blocksize, quant_type
        self.double_quant = bool(nested)
        for name, t in (
            ("weight", codes.view(-1, 1)),
            ("absmax", absmax),
            ("nested_absmax", nested_absmax),
        ):
            whole = t.view(torch.int32) if t is not None and t.dtype is torch.float32 else t
            self.register_parameter(
                name, None if t is None else nn.Parameter(whole, requires_grad=False)
            )
        for name, t in (
            ("quant_map", table),
            ("nested_quant_map", nested_table),
            ("nested_offset", offset),
        ):
            self.register_buffer(
                name, None if t is None else t.clone()
            )  # the tables of all layers are one tensor

    def base(self, dtype=torch.float32):
        """What lora_linear takes for the weight, where x is of this dtype."""
        parts, small = self._parameters, self._buffers
        tensors = [parts["weight"], small["quant_map"]]
        if self.double_quant:
            nested = parts["nested_absmax"].view(torch.float32)
            tensors += [
                parts["absmax"],
                nested,
                small["nested_quant_map"],
                small["nested_offset"],
            ]
        else:
            tensors.append(parts["absmax"].view(torch.float32))
        if dtype is torch.float64:
            tensors = [t.double() if t.is_floating_point() else t for t in tensors]
        return Base("nf4", tensors, self.blocksize)

    @property
    def quantized(self):
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

    def dequantize(self, dtype=None):
        """Ŵ, in the dtype it had before or in another."""
        return self.quantized.dequantize(dtype)

    def _apply(self, fn, recurse=True):
        small = {id(t) for t in self._buffers.values() if t is not None}

        def whole(t):
            return fn(t.view(torch.int32)).view(torch.float32) if id(t) in small else fn(t)

        return super()._apply(whole, recurse)
