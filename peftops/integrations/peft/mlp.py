"""fuse(model), experimental: a SwiGLU of three LoRA layers becomes one operation.

It keeps half as much for backward and gives the same bits. Such a module is recognized by what it
computes. A call for which one of its layers would not run lora_linear goes layer by layer.
"""

import copy
import functools
import logging
from collections import Counter
from itertools import permutations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ...nn.base_layer import hooked
from ...ops.lora_mlp import lora_mlp
from .call import EXTRA
from .foundation import Fallback, rows_like
from .layer import FUSED, Fused, Patched, count
from .plan import plan
from .sharded import gathered

Roles = tuple[str, ...]  # the names of gate, up and down
Others = tuple[tuple[str, type], ...]  # the name and type of each other child
Recipe = tuple[type[Any], Roles, Others]  # the class before, and the above
# name -> (module, its class from now on)
Targets = dict[str, tuple[Any, type["FusedMLP"]]]
log = logging.getLogger("peftops")


def fuse(
    model: nn.Module,
    *,
    strict: bool = False,
) -> nn.Module:
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
    targets: Targets = {}
    for name, module in model.named_modules():
        if isinstance(module, FusedMLP):
            targets[name] = module, type(module)
        elif roles := roles_of(module):
            stock: type = type(module)
            targets[name] = module, fused_class(stock, roles, beside(module, roles))
    if strict:
        expect_fused(model, targets)
    for module, fused in targets.values():
        module.__class__ = fused
    log.log(logging.INFO if targets else logging.WARNING, "%d MLPs fused", len(targets))
    return model


def calls(model: nn.Module) -> Counter:
    """How the modules that `fuse` made have run: Counter of "fused" or the reason -> calls."""
    total: Counter = Counter()
    for module in model.modules():
        if isinstance(module, FusedMLP):
            total.update(vars(module).get("_peftops_calls", {}))
    return total


def expect_fused(model: nn.Module, targets: Targets) -> None:
    """Raises ValueError where there is no target, or one would run layer by layer now."""
    for name, (module, fused) in targets.items():
        with gathered(model):
            x = rows_like(layers_of(module, fused._peftops)[0])
            call = operands(module, fused._peftops, x)
        if type(call) is Fallback:
            raise ValueError(f"fuse: {name} cannot be fused: {call.reason}")
    if not targets:
        raise ValueError(
            "fuse: no module computes down(silu(gate(x)) * up(x)) of three LoRA layers"
        )


class FusedMLP(Patched):
    """A module with another forward. It owns only counts, so it saves and copies as before."""

    if TYPE_CHECKING:
        _peftops: Recipe

    def forward(
        self,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # The class is read once: another thread may restore the module during this call.
        mlp_class = type(self)
        if not issubclass(mlp_class, FusedMLP):
            return mlp_class.forward(self, *args, **kwargs)
        stock = mlp_class._peftops[0]
        if torch.compiler.is_compiling():
            return stock.forward(self, *args, **kwargs)
        call: Any = EXTRA
        if len(args) == 1 and not kwargs:
            call = operands(self, mlp_class._peftops, *args)
        if type(call) is Fallback:
            count(self, call.reason, FusedMLP)
            return stock.forward(self, *args, **kwargs)
        count(self, FUSED, FusedMLP)
        for layer in layers_of(self, mlp_class._peftops):
            count(layer, FUSED, Fused)
        return lora_mlp(*args, *call)

    def refusal(self) -> str | None:
        if "_peftops" not in vars(type(self)):
            return f"has been made a {type(self).__name__} since patch"
        return None

    def restore(self) -> None:
        self.__class__ = type(self)._peftops[0]
        vars(self).pop("_peftops_calls", None)

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return blank, type(self)._peftops, *state


@functools.cache
def fused_class(
    stock: type,
    roles: Roles,
    others: Others,
) -> type[FusedMLP]:
    """The fused class for modules of class `stock`.

    roles: the names of their gate, up and down. others: the names and types of other children.
    """
    body = {
        "__module__": __name__,
        "__doc__": f"{stock.__name__}, with our forward.",
        "_peftops": (stock, roles, others),
    }
    return type(f"Fused{stock.__name__}", (FusedMLP, stock), body)


def blank(
    stock: type,
    roles: Roles,
    others: Others,
) -> FusedMLP:
    """A module without content, for pickle and deepcopy to fill."""
    cls = fused_class(stock, roles, others)
    return cls.__new__(cls)


def layers_of(module: object, recipe: Recipe) -> list[Any]:
    """Its gate, up and down. recipe: (stock, roles, others) as fused_class takes them."""
    _, roles, _ = recipe
    return [vars(module)["_modules"].get(name) for name in roles]


def beside(module: object, roles: Roles) -> Others:
    """The name and type of each child that has none of these roles."""
    children = vars(module)["_modules"].items()
    return tuple((name, type(child)) for name, child in children if name not in roles)


def operands(
    module: object,
    recipe: Recipe,
    x: Tensor,
) -> list[tuple] | Fallback:
    """[what lora_mlp takes for gate, for up, for down], or why it goes layer by layer."""
    _, roles, others = recipe
    if beside(module, roles) != others:
        return Fallback("its parts have changed")
    if any(map(hooked, filter(None, vars(module)["_modules"].values()))):
        return Fallback("hooks on a part")
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    result: list[tuple] = []
    for layer in layers_of(module, recipe):
        if not isinstance(layer, Fused):
            return Fallback("a layer is not patched")
        if len(result) == 2 and x.dtype is not dtype:
            # down's input has the dtype that gate and up return.
            x = x.new_empty(0, dtype=dtype)
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


def roles_of(module: nn.Module) -> Roles | None:
    """The names of a module's gate, up and down, or None if it is no SwiGLU of patched layers."""
    layers = {}
    for name, child in module.named_children():
        if isinstance(child, Fused):
            layers[name] = child
    if len(layers) != 3 or "forward" in vars(module):
        return None
    if tensors_of(module) != sum(map(tensors_of, layers.values())):
        return None
    sizes = {
        name: (layer.in_features, layer.out_features) for name, layer in layers.items()
    }
    for roles in permutations(layers):
        gate, up, down = (sizes[name] for name in roles)
        k, n = gate
        if up == (k, n) and down == (n, k) and is_swiglu(module, roles, k, n):
            return roles
    return None


def tensors_of(module: nn.Module) -> int:
    """How many parameters and buffers it has."""
    return sum(1 for _ in module.parameters()) + sum(1 for _ in module.buffers())


@torch.no_grad()
def is_swiglu(
    module: nn.Module,
    roles: Roles,
    k: int,
    n: int,
) -> bool:
    """Whether the module's own forward computes down(silu(gate(x)) ⊙ up(x)).

    A copy with other layers of sizes k and n in these roles is run, and its result compared.
    """
    generator = torch.Generator().manual_seed(0)
    gate = Picked(k, n, generator)
    up = Picked(k, n, generator)
    down = Picked(n, k, generator)
    magnitudes = torch.tensor([0.1, 1, 10, 100]).view(4, 1, 1)
    x = torch.randn(4, 2, k, generator=generator) * magnitudes
    expected = down(silu(gate(x)) * up(x))
    probe = copy.copy(module)
    children = vars(module)["_modules"].items()
    others = {
        name: copy.deepcopy(child) for name, child in children if name not in roles
    }
    vars(probe)["_modules"] = others | dict(zip(roles, (gate, up, down), strict=True))
    with torch.random.fork_rng(devices=[]):
        for training in (True, False):  # both, to notice dropout of the module's own
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
    """A linear layer whose weight has one entry a row: cheap at any size."""

    def __init__(
        self,
        k: int,
        n: int,
        generator: torch.Generator,
    ):
        super().__init__()
        self.index = torch.randint(k, (n,), generator=generator)
        self.scale = torch.randn(n, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.index] * self.scale
