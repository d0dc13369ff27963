"""@op: from a contract, which checks an op's inputs and allocates its outputs, to a torch op."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch._C._functorch import unwrap_if_dead

from . import backends
from ._replay import Replay, replayed

LIBRARY, CONTRACTS = torch.library.Library("peftops", "FRAGMENT"), {}
MOST = 2048  # plans of an op that are kept
SCALARS = frozenset({type(None), str, bool, int, float, torch.dtype})


def op(contract):
    """Registers torch.ops.peftops.<contract>, whose schema and fake kernel are the contract itself; returns a function
    that runs the body directly where nobody could tell, which saves the dispatcher's 11 µs, and replays what it can."""
    name = contract.__name__
    CONTRACTS[name] = contract

    def run(args, plan=False):
        """The outputs, and a plan of how they were filled, where one is wanted and can be had."""
        outputs, fill = contract(*args), backends.find(name, args[0])
        single = not isinstance(outputs, tuple)
        every = (outputs, *args) if single else (*outputs, *args)
        if plan and backends.replayed(fill):
            return outputs, replayed(lambda: fill(*every), single, args, outputs)
        fill(*every)
        return outputs, None

    def below(plan, *args):
        """What the dispatcher calls, where there is no plan."""
        plain = ready(contract, args, subclasses=True)
        with device_of(args[0]):
            return run(plain, plan and plain is args)

    def dispatched(*args):
        with (
            torch._C._AutoDispatchBelowAutograd()
        ):  # else out= refuses inputs that require grad
            return planned_below(*args)

    LIBRARY.define(name + torch.library.infer_schema(contract, mutates_args=()))
    LIBRARY.impl(name, dispatched, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftops::{name}", contract, lib=LIBRARY)
    overload = getattr(torch.ops.peftops, name).default

    def first(plan, *args):
        """What a call does for which there is no plan."""
        plain = ready(contract, args)
        if plain is None:
            return overload(*args), None
        if elsewhere(args[0]):
            with torch.cuda.device(args[0].device):
                return direct(*plain), None
        return run(args, plan) if plain is args else (direct(*plain), None)

    direct, planned_below = planned(first), planned(below)

    def call(*args):
        watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
        watched = (
            watched
            or torch._C._get_tracing_state()
            or torch._C._are_functorch_transforms_active()
        )
        return overload(*args) if watched else direct(*args)

    call.direct = direct
    return call


def planned(first):
    """The outputs that first(whether to plan, *args) gives besides a plan, or that its plan makes."""
    if Replay:
        return Replay(first, backends.FORCED, backends.forced, MOST)
    return lambda *args: first(False, *args)[0]


def elsewhere(x):
    """Whether x is on a GPU that is not the current one, on which kernels run."""
    return x.is_cuda and x.get_device() != torch.cuda.current_device()


def device_of(x):
    return torch.cuda.device(x.device) if elsewhere(x) else nullcontext()


def ready(contract, args, subclasses=False, whole=None):
    """What kernels may rely on: every tensor is contiguous, starts at a multiple of 16 bytes and is where the first is.

    A view that torch negates when it is read, as of an imaginary part, is negated. None where a tensor is of a
    subclass, whose __torch_dispatch__ may wait for the op. whole: all args, where these are the items of one.
    """
    whole, out = whole or args, args
    place = whole[0].get_device()  # -1 on a CPU
    for i, arg in enumerate(args):
        kind, wanted = type(arg), arg
        if kind is Tensor or kind is nn.Parameter or (subclasses and isinstance(arg, Tensor)):
            wanted = arg = unwrap_if_dead(arg)  # what outlived its transform of torch.func
            if arg.get_device() != place:
                expect_one_device(contract, whole)
            if (
                not arg.is_contiguous()
                or arg.data_ptr() % 16
                or (kind is Tensor and arg.is_neg())
            ):
                wanted = arg.clone(memory_format=torch.contiguous_format)
        elif kind is list:
            if (wanted := ready(contract, arg, subclasses, whole)) is None:
                return None
        elif kind not in SCALARS:
            return None
        if wanted is not args[i]:
            out = [*out[:i], wanted, *out[i + 1 :]]
    return out


def expect_one_device(contract, args):
    """Raises for the first that is elsewhere than the first of all."""
    names, device = contract.__code__.co_varnames, args[0].device
    for name, arg in zip(names, args, strict=False):
        for t in arg if isinstance(arg, list) else [arg]:
            if isinstance(t, Tensor) and t.device != device:
                raise ValueError(
                    f"{contract.__name__}: {name} must be on {device}, got {t.device}"
                )


def expect(row, name, tensor, shape, *dtypes):
    """The one check and the one error form; None is always as expected."""
    if tensor is None or (tensor.shape == shape and tensor.dtype in dtypes):
        return
    if tensor.shape != shape:
        raise ValueError(f"{row}: {name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
    raise TypeError(
        f"{row}: {name} must be {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {tensor.dtype}"
    )
