"""DoRA: y = g ⊙ z + bias with z = x·Ŵᵀ + s · drop(x)·Aᵀ·Bᵀ and g = magnitude / ‖Ŵ + s·B·A‖

The norm is taken of each row.
"""

import torch
from torch import Tensor

from .._arguments import (
    dtype_or_none,
    expect,
    explained,
    number,
    tensor,
    tensor_or_none,
)
from .dora_contract import (  # noqa: F401  testing/law.py gets a row's ops from the row's own file
    dora_drop,
    dora_mix,
    dora_norm,
    dora_norm_bwd,
)
from .dora_dropout import Dropped, dropped, plain
from .lora import ADAPTER, linear
from .lora_base import Base, expect_dims, prepared, weight_fault, wide_dtype
from .lora_formula import (
    applied,
    by_formula,
    differentiable,
    formula,
    gradients,
    graph_wanted,
)
from .nf4 import NF4Weight


class Norm(torch.autograd.Function):
    """dora_norm, with gradients that can be differentiated again."""

    @staticmethod
    def forward(
        ctx,
        a,
        b,
        scale,
        x,
        form,
        block,
        *base,
    ):
        n = dora_norm(x, list(base), a, b, scale, form=form, block=block)
        ctx.save_for_backward(n, x, a, b, scale, *base)
        ctx.constants = form, block
        return n

    @staticmethod
    def backward(ctx, dn):
        if graph_wanted():
            return Norm.backward_again(ctx, dn)
        n, x, a, b, scale, *base = ctx.saved_tensors
        form, block = ctx.constants
        need = list(ctx.needs_input_grad[:2])
        da, db = dora_norm_bwd(
            dn, n, x, base, a, b, scale, need=need, form=form, block=block
        )
        others = [None] * (4 + len(base))
        return da if need[0] else None, db if need[1] else None, *others

    @staticmethod
    def backward_again(ctx, dn):
        """The result of backward, as a graph that autograd can differentiate."""
        _, x, a, b, scale, *base = ctx.saved_tensors

        def function(a, b):
            return formula("dora_norm_formula", x, base, a, b, scale, *ctx.constants)

        grads = gradients(function, (a, b), ctx.needs_input_grad[:2], dn)
        others = [None] * (4 + len(base))
        return *grads, *others


@explained(
    "dora",
    weight=weight_fault,
    lora_A=tensor,
    lora_B=tensor,
    scaling=number,
    dtype=dtype_or_none,
)
def dora_weight_norm(
    weight: Tensor | NF4Weight | Base,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """n = ‖Ŵ + scaling · B·A‖ of each row, differentiable in lora_A and lora_B.

    Args:
        weight: (n, k), frozen: a tensor, an NF4Weight, or a Base.
        lora_A: (r, k).
        lora_B: (n, r).
        scaling: a number or a (1,) tensor.
        dtype: the dtype of the product that the norm is for; weight and adapter are rounded to it.
            By default the weight's, or autocast's.

    Returns:
        n (n,), in fp32.

    Raises:
        ValueError: for shapes, and for a weight that requires grad.
        TypeError: for dtypes.

    Source:
        Liu et al., DoRA, arXiv 2402.09353. The paper's columns are the rows of PyTorch's weight.
    """
    if not lora_A.dim() == lora_B.dim() == 2:
        expect_dims(lora_A[None], lora_A, lora_B)
    if dtype is None:
        dtype = dtype_of(weight, lora_A)
    no_rows = lora_A.new_empty(0, lora_A.shape[-1], dtype=dtype)
    x, base, scale = prepared(no_rows, weight, lora_A, lora_B, scaling)
    if base.form not in ("nf4", "given"):
        base = base._replace(tensors=[t.to(x.dtype) for t in base.tensors])
    tensors = base.tensors
    if by_formula():
        return formula(
            "dora_norm_formula",
            x,
            tensors,
            lora_A,
            lora_B,
            scale,
            base.form,
            base.block,
        )
    if differentiable(lora_A, lora_B):
        return applied(Norm, lora_A, lora_B, scale, x, base.form, base.block, *tensors)
    return dora_norm(
        x, tensors, lora_A, lora_B, scale, form=base.form, block=base.block
    )


def dtype_of(weight, lora_A):
    """The dtype of a weight; lora_A's if the weight has none."""
    if isinstance(weight, Base) and weight.form != "nf4":
        weight = weight.tensors[0]
    return getattr(weight, "dtype", lora_A.dtype)


def no_zeros(norm: Tensor) -> Tensor:
    """norm with inf for 0: a row of zeros gets gain 0, and its magnitude gets no gradient."""
    return norm.masked_fill(norm == 0, float("inf"))


def norm_for(
    x,
    weight,
    a,
    b,
    scaling,
    detach_norm,
):
    """The norm (n,) for a product with x, with inf for 0."""
    if detach_norm:
        a = a.detach()
        b = b.detach()
    return no_zeros(dora_weight_norm(weight, a, b, scaling=scaling, dtype=x.dtype))


@explained("dora", **ADAPTER, magnitude=tensor, norm=tensor_or_none)
def dora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight | Base,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    detach_norm: bool = True,
    dropout_mode: str = "peft",
    norm: Tensor | None = None,
) -> Tensor:
    """y = g ⊙ z + bias with z = x·Wᵀ + scaling · drop(x)·Aᵀ·Bᵀ and g = magnitude / norm

    Where magnitude equals the norm ‖W + scaling·B·A‖ of each row, this is LoRA.

    Args:
        x: as in lora_linear, like all arguments that are not listed here.
        magnitude: (n,) fp32, of any sign.
        detach_norm: the gradient treats the norm as a constant, as section 4.3 of the paper and
            PEFT do. If False, the norm is differentiated.
        dropout_mode: "lora" drops only the input of lora_A, as above. "peft" computes what PEFT
            does, where the base sees drop(x) too:
            y = g ⊙ (drop(x)·Wᵀ + scaling · drop(x)·Aᵀ·Bᵀ) + (x - drop(x))·Wᵀ + bias.
            It costs another base product each way. Without dropout both modes are the same.
        norm: (n,), the result of dora_weight_norm if it is known, with inf for 0; g is 0 there.

    Returns:
        y (..., n), in x's dtype.

    Raises:
        ValueError: for shapes, dropout_mode, and a weight that requires grad.
        TypeError: for dtypes.

    Source: Liu et al., DoRA, arXiv 2402.09353.
    """
    if dropout_mode not in ("peft", "lora"):
        raise ValueError(
            f"dora: dropout_mode must be peft or lora, got {dropout_mode!r}"
        )
    n = lora_B.shape[:1]
    wide = wide_dtype(x.dtype)
    expect("dora", "magnitude", magnitude, n, torch.float32, wide)
    expect("dora", "norm", norm, n, torch.float32, wide)
    if norm is None:
        norm = norm_for(x, weight, lora_A, lora_B, scaling, detach_norm)
    return linear_of_gain(
        x,
        weight,
        lora_A,
        lora_B,
        magnitude / norm,
        bias,
        scaling=scaling,
        dropout_p=dropout_p if training else 0.0,
        dropout_mode=dropout_mode,
    )


def linear_of_gain(
    x,
    weight,
    a,
    b,
    gain,
    bias,
    *,
    scaling,
    dropout_p,
    dropout_mode="peft",
):
    """dora_linear for callers that know the gain magnitude / norm."""
    wide = wide_dtype(x.dtype)
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
    args = (
        x,
        a,
        b,
        bias,
        gain,
        scale,
        seed,
        (base.form, base.block, dropout_p),
        *base.tensors,
    )
    if by_formula():
        return plain(*args)
    if differentiable(x, a, b, bias, gain):
        return applied(Dropped, *args)
    return dropped(None, *args)
