"""patch(model, fuse=("mlp",)): a SwiGLU of three LoRA layers is one operation, which keeps half as much for backward.

Such a module is known by what it computes. Wherever one of its layers would not be lora_linear, it runs by layers.
"""

import copy
import functools
import logging
from itertools import permutations

import torch
from torch import nn
from torch.nn.functional import silu

from ..ops.lora_mlp import lora_mlp
from .peft import FUSED, Fused, plan
from .peft_hooks import hooked
from .peft_report import count, rows_like
from .peft_sharded import gathered

log = logging.getLogger("peftops")


class FusedMLP:
    """A module with another forward. It owns nothing but counts, so it saves and copies as before."""

    def forward(self, *args, **kwargs):
        kind = type(self)  # asked once, since unpatch may take our class away in another thread
        if not issubclass(kind, FusedMLP):
            return kind.forward(self, *args, **kwargs)
        about = kind._peftops
        if torch.compiler.is_compiling():
            return about[0].forward(self, *args, **kwargs)
        found = operands(self, about, *args) if len(args) == 1 and not kwargs else "extra arguments"
        if type(found) is str:
            count(self, found, FusedMLP)
            return about[0].forward(self, *args, **kwargs)
        count(self, FUSED, FusedMLP)
        for layer in layers(self, about):
            count(layer, FUSED, Fused)
        return lora_mlp(*args, *found)

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return blank, type(self)._peftops, *state


@functools.cache
def fused(stock, roles, others):
    """The class of modules of this class whose gate, up and down have these names, beside others of these types."""
    doc, about = f"{stock.__name__}, with our forward.", (stock, roles, others)
    return type(
        f"Fused{stock.__name__}", (FusedMLP, stock), {"__module__": __name__, "__doc__": doc, "_peftops": about}
    )


def blank(*about):
    """A module without content, for pickle and deepcopy to fill."""
    kind = fused(*about)
    return kind.__new__(kind)


def layers(mlp, about):
    """Its gate, up and down."""
    return [vars(mlp)["_modules"].get(name) for name in about[1]]


def beside(module, roles):
    """The name and type of each child that is none of these."""
    return tuple((name, type(child)) for name, child in vars(module)["_modules"].items() if name not in roles)


def operands(mlp, about, x):
    """What lora_mlp takes for gate, up and down, as a list, or, as a string, why this call goes by layers."""
    _, roles, others = about
    if beside(mlp, roles) != others:
        return "its parts have changed"
    if any(map(hooked, filter(None, vars(mlp)["_modules"].values()))):
        return "hooks on a part"
    kind, dtype, found = x.device.type, x.dtype, []
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    for layer in layers(mlp, about):
        if not isinstance(layer, Fused):
            return "a layer is not patched"
        if len(found) == 2 and x.dtype is not dtype:
            x = x.new_empty(0, dtype=dtype)  # what down gets is as what gate and up make
        planned = plan(layer, x)
        if type(planned) is str:
            return planned
        *operand, cast, dora, wide = planned
        if type(operand[0]) is str:
            return "a base's own product"
        if dora is not None:
            return "DoRA"
        if wide or cast not in (None, dtype):
            return "a layer casts its result"
        found.append(operand)
    return found


def fuse(model, strict):
    """Makes each module that computes down(silu(gate(x)) ⊙ up(x)) of three patched layers, and nothing else, one.

    strict: raises ValueError where there is none, or where one would run by layers, and leaves all as they are.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, FusedMLP):
            found[name] = module, type(module)
        elif roles := roles_of(module):
            found[name] = module, fused(type(module), roles, beside(module, roles))
    for name, (module, kind) in found.items() if strict else ():
        with gathered(model):
            why = operands(module, kind._peftops, rows_like(layers(module, kind._peftops)[0]))
        if type(why) is str:
            raise ValueError(f"patch: {name} cannot be fused: {why}")
    if strict and not found:
        raise ValueError("patch: no module computes down(silu(gate(x)) * up(x)) of three LoRA layers")
    for module, kind in found.values():
        module.__class__ = kind
    log.log(logging.INFO if found else logging.WARNING, "%d MLPs fused", len(found))


def unfuse(model):
    found = {name: module for name, module in model.named_modules() if isinstance(module, FusedMLP)}
    for name, module in found.items():
        if "_peftops" not in vars(type(module)):
            raise ValueError(f"unpatch: {name} has been made a {type(module).__name__} since patch")
    for module in found.values():
        module.__class__ = type(module)._peftops[0]
        vars(module).pop("_peftops_calls", None)


def roles_of(module):
    """The names of a module's gate, up and down, or None if it is no SwiGLU."""
    parts = {name: child for name, child in module.named_children() if isinstance(child, Fused)}
    held = sum(len(list(part.parameters())) + len(list(part.buffers())) for part in parts.values())
    if len(parts) != 3 or "forward" in vars(module) or len([*module.parameters(), *module.buffers()]) != held:
        return None
    for roles in permutations(parts):
        (k, n), up, down = ((parts[name].in_features, parts[name].out_features) for name in roles)
        if up == (k, n) and down == (n, k) and computes(module, roles, k, n):
            return roles
    return None


@torch.no_grad()
def computes(module, roles, k, n):
    """Whether the module's own forward, given other layers of the same sizes, is down(silu(gate(x)) ⊙ up(x))."""
    generator = torch.Generator().manual_seed(0)
    gate, up, down = parts = Picked(k, n, generator), Picked(k, n, generator), Picked(n, k, generator)
    x = torch.randn(4, 2, k, generator=generator) * torch.tensor([0.1, 1, 10, 100]).view(4, 1, 1)
    expected = down(silu(gate(x)) * up(x))
    probe, modules = copy.copy(module), vars(module)["_modules"]
    others = {name: copy.deepcopy(child) for name, child in modules.items() if name not in roles}
    vars(probe)["_modules"] = others | dict(zip(roles, parts, strict=True))
    with torch.random.fork_rng(devices=[]):
        for training in (True, False):  # a dropout of its own is seen
            try:
                y = type(module).forward(probe.train(training), x)
            except Exception:  # of somebody else's code, which may raise anything
                return False
            if type(y) is not torch.Tensor or y.shape != expected.shape:
                return False
            if not ((y - expected).abs() <= 1e-5 * expected.abs() + 1e-6).all():
                return False
    return True


class Picked(nn.Module):
    """A linear layer with one entry a row: of any size, it costs next to nothing."""

    def __init__(self, k, n, generator):
        super().__init__()
        self.index = torch.randint(k, (n,), generator=generator)
        self.scale = torch.randn(n, generator=generator)

    def forward(self, x):
        return x[..., self.index] * self.scale
