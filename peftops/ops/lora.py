"""LoRA: y = g ⊙ (x·Ŵᵀ + s · (gate ⊙ drop(x)·Aᵀ)·Bᵀ) + bias"""

from importlib import import_module

import torch
from torch import Tensor

from .. import backends
from .._arguments import explained, number, probability, size, tensor, tensor_or_none
from .._op import expect, op
from .._replay import unwanted
from .lora_base import (
    DTYPES,
    SHAPES,
    no_delta,
    prepared,
    rows,
    shaped,
    weight_fault,
)
from .lora_formula import applied, by_formula, differentiable, formula, gradients, graph_wanted
from .nf4 import NF4Weight, expect_base

FEW = 64  # rows up to which one pass over the base, written for few rows, wins


@op
def lora_fwd(
    x: Tensor,
    base: list[Tensor],
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    form: str,
    block: int,
    p: float,
    keep_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (m, k) · base · a (r, k) · b (n, r or e·r)  ->  y (m, n) · h (m, r) · bits (m, 4⌈k/32⌉ or 0) · z (m, n or 0)"""
    m, k, n, r = *x.shape, b.shape[0], a.shape[0]
    expect_lora(x, base, a, b, scale, bias, gain, gate, form, block)
    expect("lora", "seed", seed, (1,), torch.int64)
    expect_probability(p)
    if p and seed is None:
        raise ValueError(f"lora: p must come with a seed, got {p} and None")
    bits = (
        x.new_empty(m, 4 * -(-k // 32), dtype=torch.uint8)
        if p
        else unwanted(x, m, 0, dtype=torch.uint8)
    )
    return (
        x.new_empty(m, n),
        x.new_empty(m, r),
        bits,
        x.new_empty(m, n) if keep_z else unwanted(x, m, 0),
    )


@op
def lora_bwd(
    dy: Tensor,
    x: Tensor,
    base: list[Tensor],
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    h: Tensor,
    bits: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    gate: Tensor | None,
    z: Tensor,
    form: str,
    block: int,
    p: float,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, a, b, bias, gain and gate, each in its own dtype, empty where `need` is False."""
    m, k, n, r = *x.shape, b.shape[0], a.shape[0]
    expect_lora(x, base, a, b, scale, bias, gain, gate, form, block, gradient=True)
    expect("lora", "dy", dy, (m, n), x.dtype)
    expect("lora", "h", h, (m, r), x.dtype)
    expect("lora", "bits", bits, (m, 4 * -(-k // 32) if p else 0), torch.uint8)
    expect("lora", "z", z, (m, n if need[4] else 0), x.dtype)
    like, plain = (x, a, b, bias, gain, gate), torch.contiguous_format
    return tuple(
        torch.empty_like(t, memory_format=plain) if wanted else unwanted(x, 0)
        for t, wanted in zip(like, need, strict=True)
    )


@op
def lora_gemv(
    x: Tensor,
    base: list[Tensor],
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    gate: Tensor | None,
    form: str,
    block: int,
) -> Tensor:
    """lora_fwd for few rows and no dropout: y (m, n) alone, in one pass over the base."""
    expect_lora(x, base, a, b, scale, bias, gain, gate, form, block)
    return x.new_empty(x.shape[0], b.shape[0])


@op
def lora_mask(seed: Tensor, m: int, k: int, p: float) -> Tensor:
    """keep (m, k) bool: the dropout that lora_fwd applies for this seed"""
    expect("lora", "seed", seed, (1,), torch.int64)
    expect_probability(p)
    return seed.new_empty(m, k, dtype=torch.bool)


def expect_lora(x, base, a, b, scale, bias, gain, gate, form, block, gradient=False):
    """base may be empty where the product is given and only gradients are asked for; a rank of 0 is no delta."""
    if form != "nf4" and len(base) != 1 and (form != "given" or base or not gradient):
        raise ValueError(f"lora: w must be one tensor, got {len(base)}")
    m, k, n, r, dtype = *x.shape, *b.shape, x.dtype
    experts = 1 if gate is None else gate.shape[1]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    expect("lora", "x", x, (m, k), *DTYPES)
    if form == "nf4":
        expect_base("lora", base, block, n * k, wide)
    elif base:
        expect("lora", "y0" if form == "given" else "w", base[0], SHAPES[form](m, n, k), dtype)
    expect("lora", "a", a, (a.shape[0], k), dtype, wide)
    expect(
        "lora",
        "b",
        b,
        (n, a.shape[0] if r == a.shape[0] else experts * a.shape[0]),
        dtype,
        wide,
    )
    expect("lora", "scale", scale, (1,), wide)
    expect("lora", "bias", bias, (n,), dtype, wide)
    expect("lora", "gain", gain, (n,), wide)
    expect("lora", "gate", gate, (m, experts), wide)
    if not experts or r % experts or (gate is not None and not r):
        raise ValueError(
            f"lora: b must have as many columns for each of {experts} experts, got {r}"
        )


def expect_probability(p):
    if isinstance(p, Tensor):
        raise TypeError(f"lora: p must be a number, got a tensor of {tuple(p.shape)}")
    if not 0 <= p <= 1:
        raise ValueError(f"lora: p must be in [0, 1], got {p}")


ADAPTER = {
    "x": tensor,
    "weight": weight_fault,
    "lora_A": tensor,
    "lora_B": tensor,
    "bias": tensor_or_none,
}
ADAPTER |= {"scaling": number, "dropout_p": probability}


def forward(ctx, given, a, b, bias, gain, gate, scale, seed, constants, *base):
    """y, and what backward needs in ctx where there is one."""
    x, gates, (form, block, p) = rows(given), rows(gate), constants
    weight = [rows(t) for t in base] if form == "given" else list(base)
    keep_z = ctx is not None and gain is not None and ctx.needs_input_grad[4]
    h = bits = z = None
    if (
        not p and not keep_z and x.shape[0] <= FEW
    ):  # a shape that nobody asks for is none that compile guards
        y = lora_gemv(x, weight, a, b, scale, bias, gain, gates, form, block)
    else:
        y, h, bits, z = lora_fwd(
            x, weight, a, b, scale, bias, gain, gates, seed, form, block, p, keep_z
        )
    if ctx is not None:
        kept = base if form != "given" or keep_z else ()
        ctx.save_for_backward(given, a, b, bias, gain, gate, scale, h, bits, z, *kept)
        ctx.constants = constants
    return shaped(y, given.shape)


def backward(ctx, dy):
    """The gradients of forward's arguments, None for what needs none."""
    if graph_wanted():
        return backward_again(ctx, dy)
    given, a, b, bias, gain, gate, scale, h, bits, z, *base = ctx.saved_tensors
    x, need = rows(given), list(ctx.needs_input_grad[:6])
    if h is None:  # few rows: cheaper to make again than to keep
        h = down(x, a, scale)
        bits, z = x.new_empty(x.shape[0], 0, dtype=torch.uint8), x.new_empty(x.shape[0], 0)
    if ctx.constants[0] == "given":
        base = []
    args = x, base, a, b, scale, h, bits, bias, gain, rows(gate), z, *ctx.constants, need
    grads = [
        g if wanted else None for g, wanted in zip(lora_bwd(rows(dy), *args), need, strict=True)
    ]
    for i, like in ((0, given), (5, gate)):
        if need[i] and like.dim() != 2:
            grads[i] = grads[i].view(like.shape)
    dbase = [None] * (len(ctx.needs_input_grad) - 9)
    if dbase and ctx.needs_input_grad[9]:
        dbase[0] = dy if gain is None else (dy * gain).to(dy.dtype)
    return *grads, None, None, None, *dbase


def backward_again(ctx, dy):
    """What backward returns, with a graph of its own."""
    *args, scale, _, bits, _ = ctx.saved_tensors[:10]
    (form, block, p), base, y0 = ctx.constants, ctx.saved_tensors[10:], ()
    if form == "given":
        y0 = base or [
            torch.zeros_like(dy, requires_grad=True)
        ]  # whose values only a gradient of gain asks for

    def function(given, a, b, bias, gain, gate, *y0):
        weight = [rows(t) for t in y0] or base
        y = formula(
            "lora_formula",
            rows(given),
            weight,
            a,
            b,
            scale,
            bias,
            gain,
            rows(gate),
            bits,
            form,
            block,
            p,
        )[0]
        return y.to(given.dtype).view(dy.shape)

    needs = *ctx.needs_input_grad[:6], *ctx.needs_input_grad[9 : 9 + len(y0)]
    grads = gradients(function, (*args, *y0), needs, dy)
    others = [None] * (len(ctx.needs_input_grad) - 9 - len(y0))
    return *grads[:6], None, None, None, *grads[6:], *others


def plain(given, a, b, bias, gain, gate, scale, seed, constants, *base):
    """forward's y by torch's own operations, for those who have to see them"""
    (form, block, p), x, gates = constants, rows(given), rows(gate)
    base = [rows(t) for t in base] if form == "given" else list(base)
    expect_lora(x, base, a, b, scale, bias, gain, gates, form, block)
    y = formula("lora_plain", x, base, a, b, scale, bias, gain, gates, seed, form, block, p)
    return y.to(x.dtype).view(*given.shape[:-1], y.shape[1])


def down(x, a, scale):
    """x·aᵀ, rounded to x's dtype"""
    a = a.to(x.dtype)
    if (
        not x.is_cuda
    ):  # whose 16-bit products torch does slowly, and those of compiled code by other sums
        return lora_gemv(
            x,
            [a],
            *no_delta(*reversed(a.shape), x.dtype, x.device),
            scale,
            *[None] * 3,
            "dense",
            0,
        )
    with torch.autocast("cuda", enabled=False):  # around backward, whatever was around forward
        return torch.mm(x, a.T)


class LoRA(torch.autograd.Function):
    forward, backward = staticmethod(forward), staticmethod(backward)


@explained("lora", **ADAPTER, gain=tensor_or_none, gate=tensor_or_none)
def lora_linear(
    x,
    weight,
    lora_A,
    lora_B,
    bias=None,
    *,
    scaling=1.0,
    dropout_p=0.0,
    training=True,
    gain=None,
    gate=None,
):
    """y = gain ⊙ (x·Wᵀ + scaling · (gate ⊙ drop(x)·Aᵀ)·Bᵀ) + bias, differentiable in all but weight and scaling.

    x (..., k); weight (n, k), or an NF4Weight of that shape, or a Base; lora_A (r, k); lora_B (n, r), or (n, e·r)
    under gate (..., e); bias (n,); gain (n,) and gate fp32; scaling a number or a (1,) fp32 tensor. A rank of 0 is no
    delta. Returns (..., n) in x's dtype.

    lora_A and lora_B are in x's dtype or fp32. They, drop(x)·Aᵀ and the gated product are rounded to x's dtype, sums
    are fp32, and gradients come from fp32 sums in each argument's own dtype. This is what PEFT computes under
    autocast; without autocast it makes an fp32 copy of x and multiplies that by fp32 adapters.
    dropout_p acts on the input of lora_A alone; dropout_mask tells which entries a seed keeps.

    Raises ValueError for shapes and for a weight or scaling that requires grad, TypeError for dtypes.
    Source: Hu et al., LoRA, arXiv 2106.09685.
    """
    return linear(
        x, weight, lora_A, lora_B, bias, scaling, dropout_p if training else 0.0, gain, gate
    )


def linear(x, weight, a, b, bias, scaling, p, gain=None, gate=None):
    """lora_linear for callers that know their arguments"""
    args = arguments(x, weight, a, b, bias, scaling, p, gain, gate)
    if by_formula():
        return plain(*args)
    if differentiable(*args[:6], *args[9:]):
        return applied(LoRA, *args)
    return forward(None, *args)


def arguments(x, weight, lora_A, lora_B, bias, scaling, p, gain=None, gate=None):
    """What forward takes, the seed of dropout drawn."""
    x, base, scale = prepared(x, weight, lora_A, lora_B, scaling)
    seed = torch.randint(2**62, (1,), device=x.device) if p else None
    return (
        x,
        lora_A,
        lora_B,
        bias,
        gain,
        gate,
        scale,
        seed,
        (base.form, base.block, p),
        *base.tensors,
    )


@explained("lora", x=tensor, bias=tensor_or_none)
def nf4_linear(x, weight, bias=None):
    """y = x·Ŵᵀ + bias, differentiable in x and bias: lora_linear without a delta.

    x (..., k); weight an NF4Weight (n, k); bias (n,) in x's dtype or fp32. Returns (..., n) in x's dtype.
    Raises ValueError for shapes, TypeError for dtypes and for a weight that is not an NF4Weight.
    Source: Dettmers et al., QLoRA, arXiv 2305.14314.
    """
    if not isinstance(weight, NF4Weight):
        raise TypeError(f"lora: w must be NF4Weight, got {type(weight).__name__}")
    if len(weight.shape) != 2:
        raise ValueError(f"lora: w must be (n, k), got {tuple(weight.shape)}")
    n, k = weight.shape
    return lora_linear(x, weight, *no_delta(k, n, x.dtype, x.device), bias)


def served_by(x, m, n, k, r, p=0.0, form="dense"):
    """(op, backend, its word for the product) that serve lora_linear for m rows of x's dtype and device."""
    op = "lora_gemv" if m <= FEW and not p else "lora_fwd"
    name = backends.find(op, x).__module__.split(".")[1]
    describe = getattr(import_module(f"peftops.{name}.lora"), "describe", None)
    return op, name, describe(op, x, m, n, k, r, form) if describe else ""


@explained("lora", seed=tensor, m=size, k=size, p=probability)
def dropout_mask(seed, m, k, p):
    """keep (m, k) bool, what lora_linear keeps of x for this (1,) int64 seed; drop(x) is keep ⊙ x / (1 - p)."""
    return lora_mask(seed, m, k, p)
