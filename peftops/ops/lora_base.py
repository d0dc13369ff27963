"""The frozen product x·Ŵᵀ of every op: its forms, and how a call prepares its arguments."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._arguments import tensor
from .lora_formula import transformed
from .nf4 import NF4Weight

SHAPES = {  # of the tensor that a base of this form holds
    "dense": lambda m, n, k: (n, k),
    "transposed": lambda m, n, k: (k, n),
    "given": lambda m, n, k: (m, n),
}
FORMS = *SHAPES, "nf4"
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64


class Base(NamedTuple):
    """The product x·Ŵᵀ, or the tensors of which it is computed.

    Attributes:
        form: what tensors hold.
            "dense": [w (n, k)]; "transposed": [w (k, n)]; "given": [y0 (..., n)], the product;
            "nf4": [codes, table, *scales] of an NF4Weight.
        tensors: in x's dtype, apart from those of "nf4".
        block: elements that share a scale, for "nf4".
    """

    form: str
    tensors: list[Tensor]
    block: int = 0

    @staticmethod
    def of(weight: "Tensor | NF4Weight | Base") -> "Base":
        """The Base of a weight.

        Raises:
            ValueError: for a weight that requires grad, and for an unknown form.
        """
        if isinstance(weight, NF4Weight):
            return Base("nf4", weight.base, weight.block)
        if isinstance(weight, Base):
            if weight.form not in FORMS:
                raise ValueError(
                    f"lora: form must be {' or '.join(FORMS)}, got {weight.form!r}"
                )
            frozen: Sequence[Tensor] = () if weight.form == "given" else weight.tensors
        else:
            frozen = (weight,)
        for t in frozen:
            if t.requires_grad:
                raise ValueError("lora: w must be frozen, got one that requires grad")
        if isinstance(weight, Base):
            return weight
        if not weight.is_contiguous() and weight.T.is_contiguous():
            # as GPT-2's Conv1D stores its weight: no copy is needed
            return Base("transposed", [weight.T])
        return Base("dense", [weight])


def weight_fault(value: object) -> str | None:
    """What the weight of a call must be, or None if it is that; a check for @explained."""
    if isinstance(value, Base):
        good = (
            value.form in FORMS
            and isinstance(value.tensors, list)
            and not any(map(tensor, value.tensors))
        )
    else:
        good = isinstance(value, NF4Weight) or tensor(value) is None
    if good:
        return None
    return f"a dense tensor, an NF4Weight or a Base of tensors of form {' or '.join(FORMS)}"


def rows(t):
    """t (..., k) as (m, k); None stays None."""
    if t is None or t.dim() == 2:
        return t
    return t.flatten(0, -2) if t.dim() > 2 else t[None]


def base_rows(base: Sequence[Tensor], form: str) -> list[Tensor]:
    """The tensors of a base as ops take them: a given product (..., n) becomes (m, n)."""
    return [rows(t) for t in base] if form == "given" else list(base)


def shaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """y (m, n) as (..., n) for an x of this shape.

    To autograd the result is no view of y, so that callers may change it in place.
    """
    if len(shape) == 2:
        return y
    return torch.ops.aten._unsafe_view.default(y, [*shape[:-1], y.shape[1]])


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, scales and gains beside an x of this dtype: fp32, or fp64 beside fp64."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def mask_bytes(k: int) -> int:
    """The bytes that hold a row's dropout mask, one bit for each of k columns: 4⌈k/32⌉."""
    return 4 * -(-k // 32)


def prepared(
    x: Tensor,
    weight: Tensor | NF4Weight | Base,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
) -> tuple[Tensor, Base, Tensor]:
    """x, the Base of weight, and scaling as a (1,) tensor.

    Inside autocast, x and the tensors of the Base are cast to autocast's dtype.
    """
    if not (x.dim() and lora_A.dim() == lora_B.dim() == 2):
        expect_dims(x, lora_A, lora_B)
    if isinstance(weight, NF4Weight) and weight.shape != (lora_B.shape[0], x.shape[-1]):
        shape = lora_B.shape[0], x.shape[-1]
        raise ValueError(f"lora: w must be {shape}, got {tuple(weight.shape)}")
    dtype = x.dtype
    x, base = based(x, weight)
    if not isinstance(scaling, Tensor):
        return x, base, scale_of(scaling, wide_dtype(dtype), x.device)
    if scaling.requires_grad:
        raise ValueError("lora: scaling must be a constant, got one that requires grad")
    return x, base, scaling


def based(x: Tensor, weight: Tensor | NF4Weight | Base) -> tuple[Tensor, Base]:
    """x and the Base of weight, as `prepared` returns them."""
    base = Base.of(weight)
    dtype = x.dtype
    device_type = x.device.type
    if (
        device_type != "meta"
        and dtype is not torch.float64
        and torch.is_autocast_enabled(device_type)
    ):
        wanted = torch.get_autocast_dtype(device_type)
        if dtype is not wanted:
            x = x.to(wanted)
        if base.form != "nf4" and any(t.dtype is not wanted for t in base.tensors):
            base = base._replace(tensors=[t.to(wanted) for t in base.tensors])
    return x, base


def expect_dims(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """Raises for the first tensor with a wrong number of dimensions, which contracts rely on."""
    if not x.dim():
        raise ValueError(f"lora: x must be (..., k), got {tuple(x.shape)}")
    if lora_A.dim() != 2:
        raise ValueError(f"lora: a must be (r, k), got {tuple(lora_A.shape)}")
    if lora_B.dim() != 2:
        raise ValueError(f"lora: b must be (n, r), got {tuple(lora_B.shape)}")


def scale_of(scaling: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """scaling as a (1,) tensor, which is cached except while a graph is captured or traced."""
    if torch.compiler.is_compiling():
        # torch.full would compile anew for every value
        return torch.ones(1, dtype=dtype, device=device) * scaling
    if capturing(device) or traced():
        return torch.full((1,), scaling, dtype=dtype, device=device)
    return kept_scale(float(scaling), dtype, device)


def traced() -> bool:
    """Whether a tensor that is made now is a tracer's, and must not be kept."""
    return bool(
        torch.compiler.is_compiling()
        or transformed()
        or torch._C._len_torch_dispatch_stack()
    )


def capturing(device: torch.device) -> bool:
    """Whether a tensor that is made now belongs to a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def no_delta(
    k: int,
    n: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """lora_A (0, k) and lora_B (n, 0), an adapter that adds nothing, for an x of this dtype.

    The tensors are cached, except while a graph is traced.
    """
    wide = wide_dtype(dtype)
    if traced():
        return empty_adapter(k, n, wide, device)
    return kept_empty(k, n, wide, device)


def empty_adapter(
    k: int, n: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    lora_A = torch.empty(0, k, dtype=dtype, device=device)
    lora_B = torch.empty(n, 0, dtype=dtype, device=device)
    return lora_A, lora_B


@functools.lru_cache(maxsize=1024)
def kept_empty(
    k: int, n: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    # training could not save a tensor of inference mode for backward
    with torch.inference_mode(False):
        return empty_adapter(k, n, dtype, device)


@functools.lru_cache(maxsize=1024)
def kept_scale(scaling: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # as above
        scale = torch.full((1,), scaling, dtype=dtype, device="cpu")
        return scale.to(
            device
        )  # the copy is done when it returns, so every stream may read it
