"""enable: bitsandbytes' own 4-bit layers and functions run on our kernels, until disable."""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..functional import Base, lora_linear
from ..ops.lora_base import no_delta
from ..ops.nf4 import nf4_dequantize, nf4_quantize
from ..ops.nf4_tables import bounds, four_bits
from . import Enabled

DEVICES = "CPU", "CUDA"
_library: torch.library.Library | None = None


def enable() -> Enabled:
    """From now on, or inside `with enable():`, bitsandbytes runs on our kernels.

    Its ops quantize_4bit, dequantize_4bit and gemm_4bit, and all that calls them, such as
    bitsandbytes.nn.Linear4bit, compute what they did before: codes and dequantized weights are the
    same bits, products are rounded as functional.lora_linear says. Once is enough.

    Returns:
        A context manager whose end puts back what was there before. Without `with`, disable() does.

    Raises:
        ModuleNotFoundError: bitsandbytes is not installed.
    """
    global _library
    if _library is not None:
        return Enabled(lambda: None)
    import_module("bitsandbytes")
    _library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        # To override is the point.
        warnings.filterwarnings(
            "ignore", "(?s).*Overriding a previously registered kernel"
        )
        for name, function in OPS.items():
            for device in DEVICES:
                _library.impl(name, function, device, allow_override=True)
    return Enabled(disable)


def disable() -> None:
    """Puts bitsandbytes' own kernels back, if `enable` has replaced them."""
    global _library
    if _library is not None:
        _library._destroy()  # the dispatcher has kept what was there before
        _library = None


@functools.cache
def shared_table(quant_type: str, device: torch.device) -> Tensor:
    """One table for all calls. No call returns it."""
    with torch.inference_mode(False):
        return four_bits(quant_type, device)


# The ops of bitsandbytes, with the arguments of its own.
def quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    codes, absmax = nf4_quantize(
        A, *bounds(shared_table(quant_type, A.device)), blocksize
    )
    return codes.view(quant_storage)[:, None], absmax


def dequantize_4bit(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    codes = A.contiguous().view(torch.uint8)
    table = shared_table(quant_type, A.device)
    flat = nf4_dequantize(
        codes, table, [absmax.float()], blocksize, math.prod(shape), dtype
    )
    return flat.view(shape)


def dequantize_4bit_out(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    out.copy_(dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype))


@torch.no_grad()  # bitsandbytes has a backward of its own
def gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    scales = [absmax.float()]
    if absmax_8bit is not None:
        assert absmax_code is not None and absmax_offset is not None
        scales = [
            absmax_8bit,
            *scales,
            absmax_code.float(),
            absmax_offset.float().reshape(()),
        ]
    codes = B.contiguous().view(torch.uint8)
    base = Base("nf4", [codes, shared_table(quant_type, A.device), *scales], blocksize)
    n, k = shapeB
    return lora_linear(A, base, *no_delta(k, n, A.dtype, A.device), bias).to(A.dtype)


OPS: dict[str, Callable[..., Any]] = {
    "quantize_4bit": quantize_4bit,
    "dequantize_4bit": dequantize_4bit,
    "dequantize_4bit.out": dequantize_4bit_out,
    "gemm_4bit": gemm_4bit,
}
