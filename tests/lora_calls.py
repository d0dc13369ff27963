"""Calls of lora_linear on the tensors of a case, and its formula."""

import torch

import peftops.functional as F

DROPOUT = 0.3
FORMS = ["dense", "transposed", "given"]
SCALING = 0.7


def weight_of(form, base):
    return {"dense": base, "transposed": base.T, "given": F.Base("given", [base])}[form]


def linear(t, p=0.0, form="dense", **options):
    """lora_linear of a case's tensors; every call draws the same mask."""
    torch.manual_seed(0)
    defaults = {
        "bias": t["bias"],
        "gain": t["gain"],
        "gate": t["gate"],
        "scaling": SCALING,
        "dropout_p": p,
    }
    weight = weight_of(form, t["base"][0])
    return F.lora_linear(t["x"], weight, t["a"], t["b"], **defaults | options)


def names_of_leaves(t):
    """The names of the tensors that may have a gradient, but for the base."""
    return [
        name for name in ("x", "a", "b", "bias", "gain", "gate") if t[name] is not None
    ]


def leaves_of(t, form="dense"):
    """The tensors that may have a gradient; a given product, which is the base, comes last."""
    leaves = [t[name] for name in names_of_leaves(t)]
    if form == "given":
        leaves += t["base"]
    return leaves


def with_leaves(t, leaves, form):
    """The case with these leaves in the place of its own."""
    t = t | dict(zip(names_of_leaves(t), leaves, strict=False))
    if form == "given":
        t["base"] = list(leaves[-1:])
    return t


def double(t):
    def wide(value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.double()
        return [wide(item) for item in value] if isinstance(value, list) else value

    return {name: wide(value) for name, value in t.items()}


def trained(t, p, form):
    """The output and all gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves_of(t, form)]
    y = linear(with_leaves(t, leaves, form), p, form)
    return [y.detach(), *torch.autograd.grad(y, leaves, t["dy"].to(y.dtype))]


def formula(t):
    """The sum over experts, each computed alone, with its gate and the gain written out."""
    x = t["x"]
    gate = t["gate"]
    y = x @ t["base"][0].T
    experts = 1 if gate is None else gate.shape[1]
    adapters = zip(t["a"].chunk(experts), t["b"].chunk(experts, 1), strict=True)
    for e, (a, b) in enumerate(adapters):
        share = 1 if gate is None else gate[:, e : e + 1]
        y = y + SCALING * share * (x @ a.T @ b.T)
    return y if t["gain"] is None else y * t["gain"]
