"""What kernels have no derivative for: second derivatives, forward-mode AD and transforms of torch.func.

There the specification is computed instead, whose operations are torch's own.
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
)
FORMULAS = {
    name: backends.cell("reference", name) for name in NAMES
}  # looked up here, where no compiler traces it


def transformed():
    """Whether forward-mode AD or a transform of torch.func has to see every operation."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def by_formula():
    """Whether torch has to see operations of its own: also in torch.export, whose graphs run where we are not."""
    return transformed() or torch.compiler.is_exporting()


def applied(function, *args):
    """function.apply(*args) where nothing is transformed, so without the look for that which apply begins with."""
    if torch.compiler.is_compiling():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)


def differentiable(*args):
    """Whether autograd has to see what is made of these tensors."""
    return torch.is_grad_enabled() and any(
        [t is not None and t.requires_grad for t in args]
    )  # a generator costs more


def graph_wanted():
    """Whether gradients shall have a graph themselves, as create_graph asks of a backward outside of a compiler."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def formula(name, *args):
    """What the specification's function of this name makes of args."""
    return FORMULAS[name](*args)


def gradients(function, args, needs, dy):
    """dy's product with the derivative of function(*args), for each of args that needs it; torch can differentiate it.

    Each argument gets a name of its own, so that no gradient runs through another argument.
    """
    with torch.enable_grad():
        args = [
            arg.view_as(arg) if need else arg for arg, need in zip(args, needs, strict=True)
        ]
        y = function(*args)
        wanted = [arg for arg, need in zip(args, needs, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(found) if need else None for need in needs]
