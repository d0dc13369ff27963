"""4-bit weights, bit-compatible with bitsandbytes: Ŵ = table[code] · absmax of the block, rounded once."""

import torch
from torch import Tensor

from .._arguments import dtype_or_none, explained, flag, instance, size, tensor
from .._op import expect, op
from .lora_formula import formula
from .nf4_state import BLOCKS, DTYPES, NESTED, read, write
from .nf4_tables import FOUR_BITS, bounds, eight_bits, four_bits


@op
def nf4_quantize(w: Tensor, bounds: Tensor, order: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """w of N elements in any shape · bounds (15,) · order (16,)  ->  codes (⌈N/2⌉,) · absmax (⌈N/block⌉,)"""
    expect("nf4", "w", w, w.shape, *DTYPES.values(), torch.float64)
    expect("nf4", "bounds", bounds, (15,), torch.float32, torch.float64)
    expect("nf4", "order", order, (16,), torch.uint8)
    expect_block(block)
    codes, absmax = -(-w.numel() // 2), -(-w.numel() // block)
    return w.new_empty(codes, dtype=torch.uint8), bounds.new_empty(absmax)


@op
def nf4_dequantize(
    codes: Tensor,
    table: Tensor,
    scales: list[Tensor],
    block: int,
    size: int,
    dtype: torch.dtype,
) -> Tensor:
    """codes (⌈size/2⌉,) · table (16,) · scales, as expect_base has them  ->  (size,) of dtype"""
    expect_base("nf4", [codes, table, *scales], block, size, table.dtype)
    if dtype not in DTYPES.values():
        raise TypeError(
            f"nf4: dtype must be {' or '.join(map(str, DTYPES.values()))}, got {dtype}"
        )
    return codes.new_empty(size, dtype=dtype)


def expect_block(block):
    if not isinstance(block, int) or block not in BLOCKS:
        raise ValueError(f"nf4: block must be one of {BLOCKS}, got {block}")


def expect_quant_type(row, quant_type):
    if not isinstance(quant_type, str) or quant_type not in FOUR_BITS:
        raise ValueError(
            f"{row}: quant_type must be {' or '.join(FOUR_BITS)}, got {quant_type!r}"
        )


def expect_weight(w):
    """A weight that can be quantized. Its least and its largest element tell whether all are finite."""
    if not isinstance(w, Tensor):
        raise TypeError(f"nf4: w must be a tensor, got {type(w).__name__}")
    if w.dtype not in DTYPES.values():
        raise TypeError(
            f"nf4: w must be {' or '.join(map(str, DTYPES.values()))}, got {w.dtype}"
        )
    if not w.numel():
        raise ValueError(f"nf4: w must have elements, got {tuple(w.shape)}")
    if w.layout is not torch.strided:
        raise ValueError(f"nf4: w must be a dense tensor, got {w.layout}")
    values = w.detach()
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    if traced or type(values) is not Tensor or w.is_meta:
        return  # there may be no values to look at
    least, largest = values.aminmax()
    if not (largest - least).isfinite() and not (least.isfinite() and largest.isfinite()):
        nans, infs = values.isnan().sum().item(), values.isinf().sum().item()
        raise ValueError(
            f"nf4: w must be finite, got {nans} NaN and {infs} infinite of {w.numel()} elements"
        )


def expect_base(row, base, block, size, wide):
    """[codes, table (16,), absmax], or in place of that [.., absmax8, nested_absmax, nested_table (256,), offset]"""
    if len(base) not in (3, 6):
        raise ValueError(
            f"{row}: base must be codes, a table and 1 or 4 scales, got {len(base)} tensors"
        )
    codes, table, *scales = base
    count = -(-size // block)
    if codes.dtype is not torch.uint8:
        raise TypeError(f"{row}: codes must be torch.uint8, got {codes.dtype}")
    if codes.numel() != -(-size // 2):
        raise ValueError(
            f"{row}: codes must be {-(-size // 2)} bytes for {size} elements, got {codes.numel()}"
        )
    expect(row, "table", table, (16,), wide)
    if len(scales) == 1:
        expect(row, "absmax", scales[0], (count,), wide)
    else:
        expect(row, "absmax", scales[0], (count,), torch.uint8)
        expect(row, "nested_absmax", scales[1], (-(-count // NESTED),), wide)
        expect(row, "nested_table", scales[2], (NESTED,), wide)
        expect(row, "offset", scales[3], (), wide)
    expect_block(block)


class NF4Weight:
    """A weight in 4 bits an element, as bitsandbytes stores it: frozen, and read by kernels as it is.

    codes: uint8, two elements a byte, the first in the high half. table: (16,) fp32, what a code stands for.
    scales: (absmax,), or (absmax8, nested_absmax, nested_table, offset) after double quantization.
    shape, and dtype, that dequantize returns, are those of what was quantized; block elements share a scale.
    quant_type is "nf4" or "fp4". Codes whose first element is in the low half have to be turned round once.
    """

    def __init__(self, codes, table, scales, shape, dtype, block=64, quant_type="nf4"):
        self.shape, self.dtype, self.block, self.quant_type = (
            torch.Size(shape),
            dtype,
            block,
            quant_type,
        )
        self.codes, self.table, *scales = (
            aligned(t) for t in (codes.view(torch.uint8).flatten(), table, *scales)
        )
        self.scales = tuple(scales)
        expect_base("nf4", self.base, block, self.shape.numel(), torch.float32)

    @classmethod
    def quantize(cls, w, blocksize=64, double_quant=True, quant_type="nf4"):
        """What bitsandbytes makes of w, byte for byte: see quantize_nf4."""
        expect_quant_type("nf4", quant_type)
        expect_block(blocksize)
        expect_weight(w)
        table = four_bits(quant_type, w.device)
        codes, absmax = nf4_quantize(w.detach(), *bounds(table), blocksize)
        scales = quantize_scales(absmax) if double_quant else (absmax,)
        return cls(codes, table, scales, w.shape, w.dtype, blocksize, quant_type)

    def dequantize(self, dtype=None):
        """The tensor, in its own dtype or another: the fp32 product of value and scale, rounded once."""
        size, dtype = self.shape.numel(), dtype or self.dtype
        rounded = torch.float32 if dtype is torch.float64 else dtype
        if torch.compiler.is_exporting():
            return formula("nf4_plain", self.base, self.block, self.shape, rounded).to(dtype)
        flat = nf4_dequantize(
            self.codes, self.table, list(self.scales), self.block, size, rounded
        )
        return flat.view(self.shape).to(dtype)

    @property
    def base(self):
        return [self.codes, self.table, *self.scales]

    @property
    def device(self):
        return self.codes.device

    @property
    def nbytes(self):
        return sum(t.nbytes for t in self.base)

    def to(self, device):
        """The same weight on another device; it has no other dtype."""
        codes, table, *scales = (t.to(torch.device(device)) for t in self.base)
        return NF4Weight(
            codes, table, scales, self.shape, self.dtype, self.block, self.quant_type
        )

    def state_dict(self, name="weight"):
        """Under bitsandbytes' keys, in its order; saved by safetensors, the bytes are those bitsandbytes would save."""
        return write(name, self.base, self.shape, self.dtype, self.block, self.quant_type)

    @classmethod
    def load(cls, tensors, name="weight"):
        """From what state_dict, or bitsandbytes, made: ValueError or TypeError names the key that cannot be right."""
        base, *rest = read(tensors, name)
        return cls(base[0], base[1], base[2:], *rest)

    def __repr__(self):
        double = ", double_quant" if len(self.scales) == 4 else ""
        return f"NF4Weight({tuple(self.shape)}, {self.quant_type}, block={self.block}{double}, dtype={self.dtype})"


def aligned(t):
    """Kernels read 16 bytes at a time; a tensor of a file starts anywhere. One that is exported has no address."""
    if torch.compiler.is_exporting():
        return t
    return (
        t
        if t.is_contiguous() and t.data_ptr() % 16 == 0
        else t.clone(memory_format=torch.contiguous_format)
    )


def quantize_scales(absmax):
    """(codes, nested_absmax, table, offset): the nearest of 256 values for absmax - offset, in blocks of 256 scales.

    bitsandbytes takes the exact neighbour on a GPU, and on a CPU that of the nearest of 65,536 numbers; so do we.
    """
    table, offset = eight_bits(absmax.device), absmax.mean()
    rest = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % NESTED)).view(
        -1, NESTED
    )
    nested = rest.abs().amax(1)
    normal = rest * (1 / nested.clamp_min(1e-38))[:, None]
    if absmax.device.type == "cpu":
        normal = ((normal + 1) * 32767.5 + 0.5).floor() / 32767.5 - 1
    codes = torch.searchsorted(bounds(table)[0], normal).flatten()[: absmax.numel()]
    return codes.to(torch.uint8), nested, table, offset


@explained("nf4", w=tensor, blocksize=size, double_quant=flag)
def quantize_nf4(w, blocksize=64, double_quant=True):
    """NF4Weight of w, of any shape, in fp32, fp16 or bf16: codes are the bytes of bitsandbytes 0.50.

    Each block of blocksize (32, 64 … 4096) consecutive elements is divided by its largest magnitude, absmax, in fp32,
    and each element rounded to the nearest of the sixteen values of NormalFloat; double_quant: scales get 8-bit codes
    too; where torch runs no AVX2, the table that bitsandbytes makes for those differs from ours in last bits.
    Raises ValueError for another blocksize, and for NaN and infinite elements, of which it says the number; TypeError
    for another dtype, float64 for one, which the format cannot name.
    Source: Dettmers et al., QLoRA, arXiv 2305.14314.
    """
    return NF4Weight.quantize(w, blocksize, double_quant)


@explained("nf4", q=instance(NF4Weight), dtype=dtype_or_none)
def dequantize_nf4(q, dtype=None):
    """The tensor that an NF4Weight stands for, in its own dtype or in another: fl(table[code] · absmax)."""
    return q.dequantize(dtype)
