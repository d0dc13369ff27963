"""Layers whose batches mix adapters, as peers.

Each function takes a problem, a weight W and the factors A and B of all adapters. It returns a
layer(x) and the list of tensors that the layer trains.
"""

import warnings

import torch
from torch import nn
from torch.nn import functional

import peftops
from peftops.functional import lora_linear

from .problem import SCALING, Absent, Problem, frozen


def several(t: Problem, w, a, b):
    """PEFT's own layer with every adapter, in fp32 by its default. Only the first is active."""
    from peft import LoraConfig, get_peft_model

    model = nn.Module()
    model.linear, _ = frozen(t, w, a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for adapter, rank in enumerate(t.ranks):
            config = LoraConfig(
                r=rank,
                lora_alpha=SCALING * rank,
                lora_dropout=t.p,
                target_modules=["linear"],
            )
            if adapter:
                model.add_adapter(str(adapter), config)
            else:
                model = get_peft_model(model, config, "0")
    layer = model.base_model.model.linear
    with torch.no_grad():
        for adapter, rank in enumerate(t.ranks):
            layer.lora_A[str(adapter)].weight.copy_(a[adapter, :rank])
            layer.lora_B[str(adapter)].weight.copy_(b[adapter, :, :rank])
    layer.train(not t.few)
    return layer


def every_name(t):
    return [str(adapter) for adapter in range(t.adapters)]


def trained(layer, t):
    """Activates all adapters. Returns their tensors."""
    layer.set_adapter(every_name(t))
    return [p for p in layer.parameters() if p.requires_grad]


def named(layer, t):
    """The layer with the adapter of each sample."""
    names = [str(slot) for slot in t.slots]
    return lambda x: layer(x, adapter_names=names)


def peft(t: Problem, w, a, b):
    """PEFT mixes adapters in evaluation only. In training its users call it for each of them."""
    layer = several(t, w, a, b)
    if t.few:
        return named(layer, t), trained(layer, t)
    names = every_name(t)

    def one_by_one(x):
        parts = []
        batches = x.unflatten(0, (-1, t.adapters)).unbind(1)
        for name, batch in zip(names, batches, strict=True):
            layer.set_adapter(name)
            parts.append(layer(batch))
        # An adapter that is not set has no gradient.
        layer.set_adapter(names)
        return torch.stack(parts, 1).flatten(0, 1)

    return one_by_one, trained(layer, t)


def bmm(t: Problem, w, a, b):
    """The factors of each sample's adapter, gathered and multiplied in a batch."""
    a = a.clone().requires_grad_()
    b = b.clone().requires_grad_()
    slots = torch.tensor(t.slots, device=t.device)

    def layer(x):
        h = torch.bmm(dropped(x, t), a[slots].mT)
        return functional.linear(x, w) + SCALING * torch.bmm(h, b[slots].mT)

    return layer, [a, b]


def grouped_mm(t: Problem, w, a, b):
    """The rows of each adapter are a group. Rows are sorted by adapter unless they lie in runs."""
    if not hasattr(functional, "grouped_mm"):
        raise Absent("this torch has none")
    a = a.clone().requires_grad_()
    b = b.clone().requires_grad_()
    tokens = t.shape[0] // t.samples
    slots = torch.tensor(t.slots, device=t.device).repeat_interleave(tokens)
    ends = slots.bincount().cumsum(0).to(torch.int32)
    order = slots.argsort(stable=True)
    back = order.argsort()
    in_runs = t.samples == t.adapters

    def layer(x):
        rows = dropped(x, t).flatten(0, 1)
        if not in_runs:
            rows = rows[order]
        h = functional.grouped_mm(rows, a.mT, offs=ends)
        delta = functional.grouped_mm(h, b.mT, offs=ends)
        if not in_runs:
            delta = delta[back]
        y = functional.linear(x, w)
        return y + SCALING * delta.view_as(y)

    return layer, [a, b]


def dropped(x, t):
    return functional.dropout(x, t.p, training=True) if t.p else x


def gate(t: Problem, w, a, b):
    """One adapter of all ranks, of which a gate leaves each row its own."""
    a = a.flatten(0, 1).float().requires_grad_()
    b = b.transpose(0, 1).flatten(1).float().requires_grad_()
    slots = torch.tensor(t.slots, device=t.device)
    tokens = t.shape[0] // t.samples
    chosen = functional.one_hot(slots, t.adapters).float()
    chosen = chosen[:, None].repeat(1, tokens, 1)

    def layer(x):
        return lora_linear(x, w, a, b, scaling=SCALING, dropout_p=t.p, gate=chosen)

    return layer, [a, b]


def ours(t: Problem, w, a, b):
    """PEFT's layer, patched. All adapters are active after that: patch() names what it leaves to
    PEFT of calls without adapter_names.
    """
    (layer,) = peftops.patch(nn.ModuleList([several(t, w, a, b)]))
    return named(layer, t), trained(layer, t)


MULTI = {
    "PEFT": peft,
    "torch, bmm": bmm,
    "torch, grouped_mm": grouped_mm,
    "peftops, gate": gate,
    "peftops": ours,
}
