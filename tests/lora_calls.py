"""Calls of lora_linear on the tensors of a case, and its formula."""

import torch

import peftops.functional as F

DROPOUT = 0.3
FORMS = ["dense", "transposed", "given"]
SCALING = 0.7


def weight_of(form, base):
    return {"dense": base, "transposed": base.T, "given": F.Base("given", [base])}[form]


def linear(inputs, p=0.0, form="dense", **options):
    """lora_linear of a case's tensors; every call draws the same mask."""
    torch.manual_seed(0)
    defaults = {
        "bias": inputs["bias"],
        "gain": inputs["gain"],
        "gate": inputs["gate"],
        "scaling": SCALING,
        "dropout_p": p,
    }
    weight = weight_of(form, inputs["base"][0])
    return F.lora_linear(
        inputs["x"], weight, inputs["a"], inputs["b"], **defaults | options
    )


def names_of_leaves(inputs):
    """The names of the tensors that may have a gradient, but for the base."""
    return [
        name
        for name in ("x", "a", "b", "bias", "gain", "gate")
        if inputs[name] is not None
    ]


def leaves_of(inputs, form="dense"):
    """The tensors that may have a gradient; a given product, which is the base, comes last."""
    leaves = [inputs[name] for name in names_of_leaves(inputs)]
    if form == "given":
        leaves += inputs["base"]
    return leaves


def with_leaves(inputs, leaves, form):
    """The case with these leaves in the place of its own."""
    inputs = inputs | dict(zip(names_of_leaves(inputs), leaves, strict=False))
    if form == "given":
        inputs["base"] = list(leaves[-1:])
    return inputs


def double(inputs):
    def wide(value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.double()
        return [wide(item) for item in value] if isinstance(value, list) else value

    return {name: wide(value) for name, value in inputs.items()}


def trained(inputs, p, form):
    """The output and all gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves_of(inputs, form)]
    y = linear(with_leaves(inputs, leaves, form), p, form)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs["dy"].to(y.dtype))]


def formula(inputs):
    """The sum over experts, each computed alone, with its gate and the gain written out."""
    x = inputs["x"]
    gate = inputs["gate"]
    y = x @ inputs["base"][0].T
    experts = 1 if gate is None else gate.shape[1]
    adapters = zip(
        inputs["a"].chunk(experts), inputs["b"].chunk(experts, 1), strict=True
    )
    for e, (a, b) in enumerate(adapters):
        share = 1 if gate is None else gate[:, e : e + 1]
        y = y + SCALING * share * (x @ a.T @ b.T)
    return y if inputs["gain"] is None else y * inputs["gain"]
