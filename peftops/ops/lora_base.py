"""The frozen product x·Ŵᵀ that every row stands on: its forms, and what a call makes of its arguments."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .._arguments import tensor
from .lora_formula import transformed
from .nf4 import NF4Weight

SHAPES = {
    "dense": lambda m, n, k: (n, k),
    "transposed": lambda m, n, k: (k, n),
    "given": lambda m, n, k: (m, n),
}
FORMS = *SHAPES, "nf4"
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64


class Base(NamedTuple):
    """x·Ŵᵀ or what it is made of: "dense" [w (n, k)], "transposed" [w (k, n)], "given" [y0 (..., n)], or "nf4"
    [codes, table, *scales] of an NF4Weight, with its block."""

    form: str
    tensors: list[Tensor]
    block: int = 0

    @staticmethod
    def of(weight):
        if isinstance(weight, NF4Weight):
            return Base("nf4", weight.base, weight.block)
        if isinstance(weight, Base):
            if weight.form not in FORMS:
                raise ValueError(
                    f"lora: form must be {' or '.join(FORMS)}, got {weight.form!r}"
                )
            frozen = () if weight.form == "given" else weight.tensors
        else:
            frozen = (weight,)
        for t in frozen:
            if t.requires_grad:
                raise ValueError("lora: w must be frozen, got one that requires grad")
        if isinstance(weight, Base):
            return weight
        columns = (
            not weight.is_contiguous() and weight.T.is_contiguous()
        )  # GPT-2's Conv1D: read where it lies
        return Base("transposed", [weight.T]) if columns else Base("dense", [weight])


def weight_fault(value):
    """What is wrong with the weight of a call, for @explained"""
    if isinstance(value, Base):
        good = (
            value.form in FORMS
            and isinstance(value.tensors, list)
            and not any(map(tensor, value.tensors))
        )
    else:
        good = isinstance(value, NF4Weight) or tensor(value) is None
    return (
        None
        if good
        else f"a dense tensor, an NF4Weight or a Base of tensors of form {' or '.join(FORMS)}"
    )


def rows(t):
    """t (..., k) as (m, k)"""
    if t is None or t.dim() == 2:
        return t
    return t.flatten(0, -2) if t.dim() > 2 else t[None]


def shaped(y, shape):
    """y (m, n) as (..., n) for an x of this shape: no view of y, so it may be changed in place."""
    return (
        y
        if len(shape) == 2
        else torch.ops.aten._unsafe_view.default(y, [*shape[:-1], y.shape[1]])
    )


def prepared(x, weight, lora_A, lora_B, scaling):
    """x, in autocast's dtype where there is one, the Base of weight likewise, and scaling as a (1,) tensor."""
    if not (x.dim() and lora_A.dim() == lora_B.dim() == 2):
        expect_dims(x, lora_A, lora_B)
    if isinstance(weight, NF4Weight) and weight.shape != (lora_B.shape[0], x.shape[-1]):
        wanted = lora_B.shape[0], x.shape[-1]
        raise ValueError(f"lora: w must be {wanted}, got {tuple(weight.shape)}")
    base, device, dtype = Base.of(weight), x.device, x.dtype
    kind = device.type
    if kind != "meta" and dtype is not torch.float64 and torch.is_autocast_enabled(kind):
        wanted = torch.get_autocast_dtype(kind)
        if dtype is not wanted:
            x = x.to(wanted)
        if base.form != "nf4" and any(t.dtype is not wanted for t in base.tensors):
            base = base._replace(tensors=[t.to(wanted) for t in base.tensors])
    if not isinstance(scaling, Tensor):
        return (
            x,
            base,
            scale_of(
                scaling, torch.float64 if dtype is torch.float64 else torch.float32, device
            ),
        )
    if scaling.requires_grad:
        raise ValueError("lora: scaling must be a constant, got one that requires grad")
    return x, base, scaling


def expect_dims(x, lora_A, lora_B):
    """Raises for the first that is not what its name says; the contract takes the number of dimensions for granted."""
    for name, shape, t, right in (
        ("x", "(..., k)", x, x.dim()),
        ("a", "(r, k)", lora_A, lora_A.dim() == 2),
        ("b", "(n, r)", lora_B, lora_B.dim() == 2),
    ):
        if not right:
            raise ValueError(f"lora: {name} must be {shape}, got {tuple(t.shape)}")


def scale_of(scaling, dtype, device):
    """A (1,) tensor, kept between calls where it is safe to: not from a capture, nor from a tracer."""
    if torch.compiler.is_compiling():
        return (
            torch.ones(1, dtype=dtype, device=device) * scaling
        )  # torch.full would compile anew for every value
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if capturing or transformed() or torch._C._len_torch_dispatch_stack():
        return torch.full((1,), scaling, dtype=dtype, device=device)
    return kept_scale(float(scaling), dtype, device)


def no_delta(k, n, dtype, device):
    """lora_A (0, k) and lora_B (n, 0), in what is legal for x of dtype; kept between calls where it is safe to."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    if torch.compiler.is_compiling() or transformed() or torch._C._len_torch_dispatch_stack():
        return torch.empty(0, k, dtype=wide, device=device), torch.empty(
            n, 0, dtype=wide, device=device
        )
    return kept_empty(k, n, wide, device)


@functools.lru_cache(maxsize=1024)
def kept_empty(k, n, dtype, device):
    with torch.inference_mode(False):
        return torch.empty(0, k, dtype=dtype, device=device), torch.empty(
            n, 0, dtype=dtype, device=device
        )


@functools.lru_cache(maxsize=1024)
def kept_scale(scaling, dtype, device):
    with torch.inference_mode(False):  # else training could not save it for backward
        scale = torch.full((1,), scaling, dtype=dtype, device="cpu")
        return scale.to(device)  # a copy, so it is there for every stream
