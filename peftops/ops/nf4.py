"""4-bit weights with the bits of bitsandbytes: Ŵ = table[code] · absmax, rounded once."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .._arguments import dtype_or_none, expect, explained, flag, instance, size, tensor
from .._op import op
from .lora_formula import exporting, formula
from .nf4_state import BLOCKS, DTYPES, NESTED, read, write
from .nf4_tables import FOUR_BITS, bounds, eight_bits, four_bits


@op
def nf4_quantize(
    w: Tensor, bounds: Tensor, order: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """absmax = the largest magnitude of a block; codes of w / absmax, two in a byte

    w of N elements in any shape · bounds (15,) · order (16,)
    ->  codes (⌈N/2⌉,) · absmax (⌈N/block⌉,)
    """
    expect("nf4", "w", w, w.shape, *DTYPES.values(), torch.float64)
    expect("nf4", "bounds", bounds, (15,), torch.float32, torch.float64)
    expect("nf4", "order", order, (16,), torch.uint8)
    expect_block(block)
    count = w.numel()
    codes = w.new_empty(-(-count // 2), dtype=torch.uint8)
    absmax = bounds.new_empty(-(-count // block))
    return codes, absmax


@op
def nf4_dequantize(
    codes: Tensor,
    table: Tensor,
    scales: list[Tensor],
    block: int,
    size: int,
    dtype: torch.dtype,
) -> Tensor:
    """table[code] · absmax of the block, rounded once to dtype

    codes (⌈size/2⌉,) · table (16,) · scales, see expect_base  ->  (size,) of dtype
    """
    expect_base("nf4", [codes, table, *scales], block, size, table.dtype)
    if dtype not in DTYPES.values():
        raise TypeError(
            f"nf4: dtype must be {' or '.join(map(str, DTYPES.values()))}, got {dtype}"
        )
    return codes.new_empty(size, dtype=dtype)


def expect_block(block: int) -> None:
    """Raises unless a scale may be shared by this number of elements."""
    if not isinstance(block, int) or block not in BLOCKS:
        raise ValueError(f"nf4: block must be one of {BLOCKS}, got {block}")


def expect_quant_type(row: str, quant_type: str) -> None:
    """Raises unless quant_type is "nf4" or "fp4"; row is the first word of the message."""
    if not isinstance(quant_type, str) or quant_type not in FOUR_BITS:
        raise ValueError(
            f"{row}: quant_type must be {' or '.join(FOUR_BITS)}, got {quant_type!r}"
        )


def expect_weight(w: object) -> None:
    """Raises unless w can be quantized: a dense float tensor with elements, all of them finite."""
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
        return  # there may be no values to read
    least, largest = values.aminmax()  # both are finite only if all elements are
    if not (largest - least).isfinite() and not (
        least.isfinite() and largest.isfinite()
    ):
        nans = values.isnan().sum().item()
        infs = values.isinf().sum().item()
        raise ValueError(
            f"nf4: w must be finite, got {nans} NaN and {infs} infinite of {w.numel()} elements"
        )


def expect_base(
    row: str, base: list[Tensor], block: int, size: int, wide: torch.dtype
) -> None:
    """Raises for the first tensor of base that is not as it must be.

    base is [codes, table (16,), absmax], or after double quantization
    [codes, table (16,), absmax8, nested_absmax, nested_table (256,), offset].
    """
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
    """A frozen weight of 4 bits an element, in the format of bitsandbytes, which kernels read.

    Args:
        codes: uint8, or any dtype with the same bytes; a byte holds two elements, the first in the
            high half. Codes with the first element in the low half must be swapped before.
        table: (16,) fp32, the value of each code.
        scales: (absmax,), or (absmax8, nested_absmax, nested_table, offset) after double
            quantization; see expect_base.
        shape: of the weight that was quantized.
        dtype: of the weight that was quantized; dequantize returns it by default.
        block: elements that share a scale: 32, 64, …, 4096.
        quant_type: "nf4" or "fp4".

    Raises:
        ValueError: for sizes of tensors that do not fit the shape, and for another block.
        TypeError: for dtypes of tensors.

    Source:
        Dettmers et al., QLoRA, arXiv 2305.14314.
    """

    def __init__(
        self,
        codes: Tensor,
        table: Tensor,
        scales: Sequence[Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        block: int = 64,
        quant_type: str = "nf4",
    ):
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.block = block
        self.quant_type = quant_type
        self.codes = aligned(codes.view(torch.uint8).flatten())
        self.table = aligned(table)
        self.scales = tuple([aligned(t) for t in scales])
        expect_base("nf4", self.base, block, self.shape.numel(), torch.float32)

    @classmethod
    def quantize(
        cls,
        w: Tensor,
        blocksize: int = 64,
        double_quant: bool = True,
        quant_type: str = "nf4",
    ) -> "NF4Weight":
        """Quantizes w to the bytes that bitsandbytes would store; see quantize_nf4.

        Args:
            w: of any shape, in fp32, fp16 or bf16.
            blocksize: elements that share a scale: 32, 64, …, 4096.
            double_quant: store scales as 8-bit codes.
            quant_type: "nf4" or "fp4".

        Raises:
            ValueError: for another blocksize or quant_type, and for elements that are not finite.
            TypeError: for another dtype.
        """
        expect_quant_type("nf4", quant_type)
        expect_block(blocksize)
        expect_weight(w)
        table = four_bits(quant_type, w.device)
        codes, absmax = nf4_quantize(w.detach(), *bounds(table), blocksize)
        scales = quantize_scales(absmax) if double_quant else (absmax,)
        return cls(codes, table, scales, w.shape, w.dtype, blocksize, quant_type)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a tensor: the fp32 product of value and scale, rounded once.

        Args:
            dtype: of the result; by default the dtype of what was quantized.
        """
        dtype = dtype or self.dtype
        rounded = torch.float32 if dtype is torch.float64 else dtype
        if exporting():
            return formula("nf4_plain", self.base, self.block, self.shape, rounded).to(
                dtype
            )
        flat = nf4_dequantize(
            self.codes,
            self.table,
            list(self.scales),
            self.block,
            self.shape.numel(),
            rounded,
        )
        return flat.view(self.shape).to(dtype)

    @property
    def base(self) -> list[Tensor]:
        """The tensors in the order of the ops: [codes, table, *scales]."""
        return [self.codes, self.table, *self.scales]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.base)

    def to(self, device: torch.device | str | int) -> "NF4Weight":
        """The same weight on another device; its dtype cannot be changed."""
        codes, table, *scales = (t.to(torch.device(device)) for t in self.base)
        return NF4Weight(
            codes,
            table,
            scales,
            self.shape,
            self.dtype,
            self.block,
            self.quant_type,
        )

    def state_dict(self, name: str = "weight") -> dict[str, Tensor]:
        """The tensors under bitsandbytes' keys, in its order.

        safetensors writes the bytes that it would write for bitsandbytes.

        Args:
            name: of the parameter, with which all keys start.
        """
        return write(
            name, self.base, self.shape, self.dtype, self.block, self.quant_type
        )

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], name: str = "weight") -> "NF4Weight":
        """The weight that state_dict or bitsandbytes wrote.

        Args:
            tensors: by key; other keys are ignored.
            name: of the parameter, with which all of its keys start.

        Raises:
            ValueError, TypeError: with the key whose tensor cannot be right.
        """
        base, shape, dtype, block, quant_type = read(tensors, name)
        codes, table, *scales = base
        return cls(codes, table, scales, shape, dtype, block, quant_type)

    def __repr__(self) -> str:
        double = ", double_quant" if len(self.scales) == 4 else ""
        shape = tuple(self.shape)
        settings = f"{self.quant_type}, block={self.block}{double}, dtype={self.dtype}"
        return f"NF4Weight({shape}, {settings})"


def aligned(t: Tensor) -> Tensor:
    """t, or a copy if t is not contiguous or does not start at a multiple of 16 bytes.

    Kernels read 16 bytes at a time, and a tensor of a file may start anywhere.
    """
    if exporting():
        return t  # it has no address
    if t.is_contiguous() and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, nested_absmax, table, offset): absmax - offset in 8 bits, in blocks of 256 scales.

    A code stands for the nearest of 256 values. On a CPU, bitsandbytes first rounds to the nearest
    of 65,536 numbers, and on a GPU it does not; we do the same.
    """
    table = eight_bits(absmax.device)
    offset = absmax.mean()
    padding = -absmax.numel() % NESTED
    blocks = torch.nn.functional.pad(absmax - offset, (0, padding)).view(-1, NESTED)
    nested = blocks.abs().amax(1)
    normal = blocks * (1 / nested.clamp_min(1e-38))[:, None]
    if absmax.device.type == "cpu":
        normal = ((normal + 1) * 32767.5 + 0.5).floor() / 32767.5 - 1
    codes = torch.searchsorted(bounds(table)[0], normal).flatten()[: absmax.numel()]
    return codes.to(torch.uint8), nested, table, offset


@explained("nf4", w=tensor, blocksize=size, double_quant=flag)
def quantize_nf4(
    w: Tensor, blocksize: int = 64, double_quant: bool = True
) -> NF4Weight:
    """codes = the nearest of NormalFloat's sixteen values to w / absmax, for each block of w

    absmax is the largest magnitude of a block of consecutive elements, and the division is in fp32.
    The codes are the bytes that bitsandbytes 0.50 makes.

    Args:
        w: of any shape, in fp32, fp16 or bf16. The format cannot name float64.
        blocksize: elements of a block: 32, 64, …, 4096.
        double_quant: store scales as 8-bit codes. Where torch runs no AVX2, the table that
            bitsandbytes makes for these codes differs from ours in last bits.

    Returns:
        The weight, of w's shape and dtype.

    Raises:
        ValueError: for another blocksize, and for NaN and infinite elements, which it counts.
        TypeError: for another dtype.

    Source:
        Dettmers et al., QLoRA, arXiv 2305.14314.
    """
    return NF4Weight.quantize(w, blocksize, double_quant)


@explained("nf4", q=instance(NF4Weight), dtype=dtype_or_none)
def dequantize_nf4(q: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """fl(table[code] · absmax): the weight as a tensor, rounded once.

    Args:
        q: the quantized weight.
        dtype: of the result; by default the dtype of what was quantized.

    Returns:
        A tensor of q's shape.

    Raises:
        TypeError: for a q that is not an NF4Weight, and for another dtype than fp32, fp16, bf16 and
            fp64.
    """
    return q.dequantize(dtype)
