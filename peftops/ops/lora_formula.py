"""Derivatives that kernels do not have: second ones, forward-mode AD and torch.func's.

For these the specification is computed instead, because its operations are torch's own.
"""

import torch
from torch.autograd import forward_ad

from .. import backends

NAMES = (
    "lora_formula",
    "lora_plain",
    "dora_norm_formula",
    "dora_formula",
    "dora_plain",
    "nf4_plain",
    "multi_formula",
    "multi_plain",
)
HAS_FLAG = hasattr(torch.compiler, "_is_exporting_flag")
# looked up on import, because a compiler cannot trace the look-up
FORMULAS = {name: backends.cell("reference", name) for name in NAMES}


def transformed() -> bool:
    """Whether forward-mode AD or a transform of torch.func has to see every operation."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def exporting() -> bool:
    """Whether torch.export traces this call.

    Inside torch.compile, torch 2.10 and 2.11 answer is_exporting() with True as well.
    """
    if HAS_FLAG:
        return torch.compiler._is_exporting_flag
    return torch.compiler.is_exporting()


def by_formula() -> bool:
    """Whether the specification is computed instead of an op.

    torch.export counts too: its graphs also run where peftops is not installed.
    """
    return transformed() or exporting()


def applied(function, *args):
    """function.apply(*args) where `transformed` is False.

    It skips the search for transforms of torch.func with which apply begins.
    """
    if torch.compiler.is_compiling():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)


def differentiable(*args) -> bool:
    """Whether autograd has to record what is computed from these tensors."""
    # a list, because a generator costs more
    return torch.is_grad_enabled() and any(
        [t is not None and t.requires_grad for t in args]
    )


def graph_wanted() -> bool:
    """Whether gradients need a graph of their own: a backward with create_graph, not compiled."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def formula(name, *args, **named):
    """The result of the specification's function `name`."""
    return FORMULAS[name](*args, **named)


def gradients(function, args, needs, dy):
    """The gradients of function(*args) for dy, which autograd can differentiate again.

    A gradient is None where `needs` is False. Each argument is replaced by an alias, so that no
    gradient flows from one argument to another.
    """
    with torch.enable_grad():
        args = [
            arg.view_as(arg) if need else arg
            for arg, need in zip(args, needs, strict=True)
        ]
        y = function(*args)
        wanted = [arg for arg, need in zip(args, needs, strict=True) if need]
        grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(grads) if need else None for need in needs]
