"""DoRA: y = g ⊙ z + bias with z = x·Ŵᵀ + s · drop(x)·Aᵀ·Bᵀ and g = magnitude / ‖Ŵ + s·B·A‖, a norm for each row"""

import torch
from torch import Tensor

from .._arguments import dtype_or_none, explained, number, tensor, tensor_or_none
from .._op import expect, op
from .lora import ADAPTER, expect_lora, expect_probability, linear, lora_bwd, lora_fwd
from .lora_base import DTYPES, Base, expect_dims, no_delta, prepared, rows, shaped, weight_fault
from .lora_formula import applied, by_formula, differentiable, formula, gradients, graph_wanted


@op
def dora_norm(
    x: Tensor, base: list[Tensor], a: Tensor, b: Tensor, scale: Tensor, form: str, block: int
) -> Tensor:
    """x (any, k), never read · base · a (r, k) · b (n, r)  ->  ‖Ŵ + s·b·a‖ of each row (n,), in scale's dtype

    Ŵ, a and b are rounded to x's dtype, as in the product that the norm is for."""
    expect_delta(x, base, a, b, scale, form, block)
    return scale.new_empty(b.shape[0])


@op
def dora_norm_bwd(
    dn: Tensor,
    n: Tensor,
    x: Tensor,
    base: list[Tensor],
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    form: str,
    block: int,
    need: list[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of a and b, each in its own dtype, empty where `need` is False. Rows whose n is 0 or inf have none.

    c = dn / n; c ⊙ b is rounded to x's dtype where it is multiplied by Ŵ."""
    expect_delta(x, base, a, b, scale, form, block)
    expect("dora", "dn", dn, b.shape[:1], scale.dtype)
    expect("dora", "n", n, b.shape[:1], scale.dtype)
    return tuple(
        torch.empty_like(t) if wanted else x.new_empty(0)
        for t, wanted in zip((a, b), need, strict=True)
    )


@op
def dora_drop(x: Tensor, seed: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """x (m, k)  ->  dropped = drop(x) (m, k) · rest = x - drop(x) (m, k) · bits (m, 4⌈k/32⌉), as lora_fwd draws them"""
    expect("dora", "x", x, x.shape, *DTYPES)
    expect("dora", "seed", seed, (1,), torch.int64)
    expect_probability(p)
    m, k = x.shape
    return (
        torch.empty_like(x),
        torch.empty_like(x),
        x.new_empty(m, 4 * -(-k // 32), dtype=torch.uint8),
    )


@op
def dora_mix(u: Tensor, v: Tensor | None, bits: Tensor, p: float) -> Tensor:
    """drop(u) + v - drop(v) (m, k), of the entries that bits keep; without v, drop(u)"""
    m, k = u.shape
    expect("dora", "u", u, (m, k), *DTYPES)
    expect("dora", "v", v, (m, k), u.dtype)
    expect("dora", "bits", bits, (m, 4 * -(-k // 32)), torch.uint8)
    expect_probability(p)
    return torch.empty_like(u)


def expect_delta(x, base, a, b, scale, form, block):
    if form == "given" or not base:
        raise ValueError("dora: w must be given itself, got a product of it")
    expect_lora(x, base, a, b, scale, None, None, None, form, block)


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, scale, x, form, block, *base):
        n = dora_norm(x, list(base), a, b, scale, form, block)
        ctx.save_for_backward(n, x, a, b, scale, *base)
        ctx.constants = form, block
        return n

    @staticmethod
    def backward(ctx, dn):
        if graph_wanted():
            return Norm.backward_again(ctx, dn)
        n, x, a, b, scale, *base = ctx.saved_tensors
        need = list(ctx.needs_input_grad[:2])
        grads = dora_norm_bwd(dn, n, x, base, a, b, scale, *ctx.constants, need)
        return *(g if wanted else None for g, wanted in zip(grads, need, strict=True)), *[
            None
        ] * (4 + len(base))

    @staticmethod
    def backward_again(ctx, dn):
        """What backward returns, with a graph of its own."""
        _, x, a, b, scale, *base = ctx.saved_tensors

        def function(a, b):
            return formula("dora_norm_formula", x, base, a, b, scale, *ctx.constants)

        return *gradients(function, (a, b), ctx.needs_input_grad[:2], dn), *[None] * (
            4 + len(base)
        )


@explained(
    "dora",
    weight=weight_fault,
    lora_A=tensor,
    lora_B=tensor,
    scaling=number,
    dtype=dtype_or_none,
)
def dora_weight_norm(weight, lora_A, lora_B, *, scaling=1.0, dtype=None):
    """n = ‖Ŵ + scaling · B·A‖ of each row (n,) in fp32, differentiable in lora_A and lora_B.

    weight (n, k), or an NF4Weight of that shape, or a Base of it; lora_A (r, k); lora_B (n, r); scaling a number or a
    (1,) tensor. dtype is what the product is computed in, to which all are rounded: by default the weight's, or
    autocast's. Raises ValueError for shapes and for a weight that requires grad, TypeError for dtypes.
    Source: Liu et al., DoRA, arXiv 2402.09353, whose columns are the rows of PyTorch's weight.
    """
    if not lora_A.dim() == lora_B.dim() == 2:
        expect_dims(lora_A[None], lora_A, lora_B)
    if dtype is None:
        plain = isinstance(weight, Base) and weight.form != "nf4"
        dtype = getattr(weight.tensors[0] if plain else weight, "dtype", lora_A.dtype)
    x, base, scale = prepared(
        lora_A.new_empty(0, lora_A.shape[-1], dtype=dtype), weight, lora_A, lora_B, scaling
    )
    if base.form not in ("nf4", "given"):
        base = base._replace(tensors=[t.to(x.dtype) for t in base.tensors])
    if by_formula():
        return formula(
            "dora_norm_formula", x, base.tensors, lora_A, lora_B, scale, base.form, base.block
        )
    if differentiable(lora_A, lora_B):
        return applied(Norm, lora_A, lora_B, scale, x, base.form, base.block, *base.tensors)
    return dora_norm(x, base.tensors, lora_A, lora_B, scale, base.form, base.block)


def no_zeros(norm):
    """inf where a row is zero, and has no direction: its gain is 0, and its magnitude has no gradient."""
    return norm.masked_fill(norm == 0, float("inf"))


@explained("dora", **ADAPTER, magnitude=tensor, norm=tensor_or_none)
def dora_linear(
    x, weight, lora_A, lora_B, magnitude, bias=None, *, scaling=1.0, dropout_p=0.0, training=True, detach_norm=True,
    dropout_mode="peft", norm=None,
):  # fmt: skip
    """y = g ⊙ z(x) + bias, z(x) = x·Wᵀ + scaling · drop(x)·Aᵀ·Bᵀ, g = magnitude / ‖W + scaling·B·A‖ of each row.

    x, weight, lora_A, lora_B, bias and scaling are those of lora_linear; magnitude (n,) fp32, of any sign. Returns
    (..., n) in x's dtype. g is 0 where a row of W + scaling·B·A is zero; where magnitude is that norm, this is LoRA.
    detach_norm: the norm is a constant to the gradient (section 4.3 of the paper, and PEFT), else differentiated.
    dropout_mode: "lora" drops the input of lora_A alone, as above. "peft" computes what PEFT does, where the base sees
    drop(x) too: y = g ⊙ (drop(x)·Wᵀ + scaling · drop(x)·Aᵀ·Bᵀ) + (x - drop(x))·Wᵀ + bias, at the price of another
    base product each way. Without dropout they are the same.
    norm: what dora_weight_norm returns, where it is known, inf for 0; else it is computed.

    Raises ValueError for shapes, dropout_mode and a weight that requires grad, TypeError for dtypes.
    Source: Liu et al., DoRA, arXiv 2402.09353.
    """
    if dropout_mode not in ("peft", "lora"):
        raise ValueError(f"dora: dropout_mode must be peft or lora, got {dropout_mode!r}")
    n, wide = lora_B.shape[:1], torch.float64 if x.dtype is torch.float64 else torch.float32
    expect("dora", "magnitude", magnitude, n, torch.float32, wide)
    expect("dora", "norm", norm, n, torch.float32, wide)
    if norm is None:
        adapter = (lora_A.detach(), lora_B.detach()) if detach_norm else (lora_A, lora_B)
        norm = no_zeros(dora_weight_norm(weight, *adapter, scaling=scaling, dtype=x.dtype))
    options = {
        "scaling": scaling,
        "dropout_p": dropout_p if training else 0.0,
        "dropout_mode": dropout_mode,
    }
    return linear_of_gain(x, weight, lora_A, lora_B, magnitude / norm, bias, **options)


def linear_of_gain(x, weight, a, b, gain, bias, *, scaling, dropout_p, dropout_mode="peft"):
    """dora_linear where its gain is known"""
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    if gain.dtype is not wide:
        gain = gain.to(wide)
    if not dropout_p or dropout_mode == "lora":
        return linear(x, weight, a, b, bias, scaling, dropout_p, gain)
    x, base, scale = prepared(x, weight, a, b, scaling)
    if base.form == "given":
        raise ValueError(
            "dora: w must be given itself for dropout_mode peft, got a product of it"
        )
    seed = torch.randint(2**62, (1,), device=x.device)
    args = x, a, b, bias, gain, scale, seed, (base.form, base.block, dropout_p), *base.tensors
    if by_formula():
        return plain(*args)
    if differentiable(x, a, b, bias, gain):
        return applied(Dropped, *args)
    return dropped(None, *args)


def dropped(ctx, given, a, b, bias, gain, scale, seed, constants, *base):
    """y of dropout_mode "peft", and what backward needs in ctx where there is one."""
    x, base, (form, block, p) = rows(given), list(base), constants
    kept, rest, bits = dora_drop(x, seed, p)
    keep_z = ctx is not None and ctx.needs_input_grad[4]
    y, h, _, z = lora_fwd(
        kept, base, a, b, scale, bias, gain, None, None, form, block, 0.0, keep_z
    )
    delta = no_delta(x.shape[1], y.shape[1], x.dtype, x.device)
    y = (
        y
        + lora_fwd(rest, base, *delta, scale, None, None, None, None, form, block, 0.0, False)[
            0
        ]
    )  # y may be kept
    if ctx is not None:
        ctx.save_for_backward(given, a, b, bias, gain, scale, h, bits, z, *base)
        ctx.constants = constants
    return shaped(y, given.shape)


class Dropped(torch.autograd.Function):
    forward = staticmethod(dropped)

    @staticmethod
    def backward(ctx, dy):
        if graph_wanted():
            return Dropped.backward_again(ctx, dy)
        given, a, b, bias, gain, scale, h, bits, z, *base = ctx.saved_tensors
        (form, block, p), x, dy, need = (
            ctx.constants,
            rows(given),
            rows(dy),
            [*ctx.needs_input_grad[:5], False],
        )
        none, rest = x.new_empty(x.shape[0], 0, dtype=torch.uint8), (form, block, 0.0)
        kept = dora_mix(x, None, bits, p)  # made again, as x is kept for other layers too
        grads = lora_bwd(dy, kept, base, a, b, scale, h, none, bias, gain, None, z, *rest, need)
        grads = [g if wanted else None for g, wanted in zip(grads, need, strict=True)][:5]
        if need[0]:
            delta, empty = (
                no_delta(x.shape[1], dy.shape[1], x.dtype, x.device),
                x.new_empty(x.shape[0], 0),
            )
            only = [True] + [False] * 5
            other = lora_bwd(
                dy, x, base, *delta, scale, empty, none, None, None, None, empty, *rest, only
            )[0]
            grads[0] = dora_mix(grads[0], other, bits, p).view(given.shape)
        return *grads, *[None] * (len(ctx.needs_input_grad) - 5)

    @staticmethod
    def backward_again(ctx, dy):
        """What backward returns, with a graph of its own."""
        *args, scale, _, bits, _ = ctx.saved_tensors[:9]
        base = ctx.saved_tensors[9:]

        def function(given, a, b, bias, gain):
            y = formula(
                "dora_formula", rows(given), base, a, b, scale, bias, gain, bits, *ctx.constants
            )
            return y.to(given.dtype).view(dy.shape)

        grads = gradients(function, args, ctx.needs_input_grad[:5], dy)
        return *grads, *[None] * (len(ctx.needs_input_grad) - 5)


def plain(given, a, b, bias, gain, scale, seed, constants, *base):
    """dropped's y by torch's own operations, for those who have to see them"""
    x = rows(given)
    y = formula("dora_plain", x, base, a, b, scale, bias, gain, seed, *constants)
    return y.to(x.dtype).view(*given.shape[:-1], y.shape[1])
