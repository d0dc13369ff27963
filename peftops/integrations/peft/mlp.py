"""fuse(model), experimental: a SwiGLU of three LoRA layers becomes one operation.

It keeps half as much for backward and gives the same bits. Such a module is recognized by what it
computes. A call for which one of its layers would not run lora_linear goes layer by layer.
"""

import copy
import functools
import logging
from collections import Counter
from itertools import permutations

import torch
from torch import nn
from torch.nn.functional import silu

from ...ops.lora_mlp import lora_mlp
from .layer import EXTRA, FUSED, Fused, Patched, count
from .plan import Fallback, hooked, plan, rows_like
from .sharded import gathered

log = logging.getLogger("peftops")


def fuse(model, *, strict=False):
    """Makes each module that computes down(silu(gate(x)) ⊙ up(x)) with three patched layers one.

    Experimental: no GPU has shown yet that it pays. Call it after `patch`, and again after patching
    more layers; `unpatch` restores these modules too.

    Args:
        model: a model that `patch` has run on, changed in place.
        strict: raise where no such module is found, or where one would run layer by layer.

    Returns:
        The model.

    Raises:
        ValueError: with strict, as above; the model is left as it is.
    """
    targets = {}  # name -> (module, its class from now on)
    for name, module in model.named_modules():
        if isinstance(module, FusedMLP):
            targets[name] = module, type(module)
        elif roles := roles_of(module):
            targets[name] = module, fused_class(type(module), roles, beside(module, roles))
    if strict:
        expect_fused(model, targets)
    for module, kind in targets.values():
        module.__class__ = kind
    log.log(logging.INFO if targets else logging.WARNING, "%d MLPs fused", len(targets))
    return model


def calls(model):
    """How the modules that `fuse` found have run: Counter of "fused" or the reason -> calls."""
    total = Counter()
    for module in model.modules():
        if isinstance(module, FusedMLP):
            total.update(vars(module).get("_peftops_calls", {}))
    return total


def expect_fused(model, targets):
    """Raises ValueError where there is no target, or one would run layer by layer now."""
    for name, (module, kind) in targets.items():
        with gathered(model):
            x = rows_like(layers_of(module, kind._peftops)[0])
            call = operands(module, kind._peftops, x)
        if type(call) is Fallback:
            raise ValueError(f"fuse: {name} cannot be fused: {call.reason}")
    if not targets:
        raise ValueError(
            "fuse: no module computes down(silu(gate(x)) * up(x)) of three LoRA layers"
        )


class FusedMLP(Patched):
    """A module with another forward. It owns nothing but counts, so it saves and copies as before."""

    def forward(self, *args, **kwargs):
        kind = type(self)  # read once: another thread may restore the module during this call
        if not issubclass(kind, FusedMLP):
            return kind.forward(self, *args, **kwargs)
        stock = kind._peftops[0]
        if torch.compiler.is_compiling():
            return stock.forward(self, *args, **kwargs)
        call = EXTRA
        if len(args) == 1 and not kwargs:
            call = operands(self, kind._peftops, *args)
        if type(call) is Fallback:
            count(self, call.reason, FusedMLP)
            return stock.forward(self, *args, **kwargs)
        count(self, FUSED, FusedMLP)
        for layer in layers_of(self, kind._peftops):
            count(layer, FUSED, Fused)
        return lora_mlp(*args, *call)

    def refusal(self):
        if "_peftops" not in vars(type(self)):
            return f"has been made a {type(self).__name__} since patch"
        return None

    def restore(self):
        self.__class__ = type(self)._peftops[0]
        vars(self).pop("_peftops_calls", None)

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return blank, type(self)._peftops, *state


@functools.cache
def fused_class(stock, roles, others):
    """The fused class for modules of class `stock`.

    roles: the names of their gate, up and down. others: the names and types of other children.
    """
    body = {
        "__module__": __name__,
        "__doc__": f"{stock.__name__}, with our forward.",
        "_peftops": (stock, roles, others),
    }
    return type(f"Fused{stock.__name__}", (FusedMLP, stock), body)


def blank(*about):
    """A module without content, for pickle and deepcopy to fill."""
    kind = fused_class(*about)
    return kind.__new__(kind)


def layers_of(module, about):
    """Its gate, up and down."""
    _, roles, _ = about
    return [vars(module)["_modules"].get(name) for name in roles]


def beside(module, roles):
    """The name and type of each child that has none of these roles."""
    children = vars(module)["_modules"].items()
    return tuple((name, type(child)) for name, child in children if name not in roles)


def operands(module, about, x):
    """What lora_mlp takes for gate, up and down, as a list, or the Fallback that runs layers."""
    _, roles, others = about
    if beside(module, roles) != others:
        return Fallback("its parts have changed")
    if any(map(hooked, filter(None, vars(module)["_modules"].values()))):
        return Fallback("hooks on a part")
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    result = []
    for layer in layers_of(module, about):
        if not isinstance(layer, Fused):
            return Fallback("a layer is not patched")
        if len(result) == 2 and x.dtype is not dtype:
            x = x.new_empty(
                0, dtype=dtype
            )  # down's input has the dtype that gate and up return
        call = plan(layer, x)
        if type(call) is Fallback:
            return call
        if call.own is not None:
            return Fallback("a base's own product")
        if call.dora is not None:
            return Fallback("DoRA")
        if call.widen or call.cast not in (None, dtype):
            return Fallback("a layer casts its result")
        result.append(call.operand())
    return result


def roles_of(module):
    """The names of a module's gate, up and down, or None if it is no SwiGLU of patched layers."""
    parts = {name: child for name, child in module.named_children() if isinstance(child, Fused)}
    if len(parts) != 3 or "forward" in vars(module):
        return None
    held = sum(tensors_of(part) for part in parts.values())
    if tensors_of(module) != held:
        return None
    for roles in permutations(parts):
        gate, up, down = ((parts[name].in_features, parts[name].out_features) for name in roles)
        k, n = gate
        if up == (k, n) and down == (n, k) and is_swiglu(module, roles, k, n):
            return roles
    return None


def tensors_of(module):
    """How many parameters and buffers it has."""
    return sum(1 for _ in module.parameters()) + sum(1 for _ in module.buffers())


@torch.no_grad()
def is_swiglu(module, roles, k, n):
    """Whether its own forward, given other layers of these sizes, is down(silu(gate(x)) ⊙ up(x))."""
    generator = torch.Generator().manual_seed(0)
    gate = Picked(k, n, generator)
    up = Picked(k, n, generator)
    down = Picked(n, k, generator)
    magnitudes = torch.tensor([0.1, 1, 10, 100]).view(4, 1, 1)
    x = torch.randn(4, 2, k, generator=generator) * magnitudes
    expected = down(silu(gate(x)) * up(x))
    probe = copy.copy(module)
    children = vars(module)["_modules"].items()
    others = {name: copy.deepcopy(child) for name, child in children if name not in roles}
    vars(probe)["_modules"] = others | dict(zip(roles, (gate, up, down), strict=True))
    with torch.random.fork_rng(devices=[]):
        for training in (True, False):  # in both, so that a dropout of its own is noticed
            try:
                y = type(module).forward(probe.train(training), x)
            except Exception:  # somebody else's code may raise anything
                return False
            if type(y) is not torch.Tensor or y.shape != expected.shape:
                return False
            if not ((y - expected).abs() <= 1e-5 * expected.abs() + 1e-6).all():
                return False
    return True


class Picked(nn.Module):
    """A linear layer with one entry a row, which costs next to nothing at any size."""

    def __init__(self, k, n, generator):
        super().__init__()
        self.index = torch.randint(k, (n,), generator=generator)
        self.scale = torch.randn(n, generator=generator)

    def forward(self, x):
        return x[..., self.index] * self.scale
