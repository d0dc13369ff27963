"""@op: from a contract, which checks an op's inputs and allocates its outputs, to a torch op."""

import torch
from torch import Tensor, nn

from . import backends

LIBRARY, CONTRACTS = torch.library.Library("peftops", "FRAGMENT"), {}
SCALARS = frozenset({type(None), str, bool, int, float, torch.dtype})


def op(contract):
    """Registers torch.ops.peftops.<contract>, whose schema and fake kernel are the contract itself; returns a function
    that runs the body directly where nobody could tell, which saves the dispatcher's 11 µs."""
    name = contract.__name__
    CONTRACTS[name] = contract

    def run(args):
        outputs = contract(*args)
        x, fill = args[0], backends.find(name, args[0])
        every = (*outputs, *args) if isinstance(outputs, tuple) else (outputs, *args)
        if not x.is_cuda or x.get_device() == torch.cuda.current_device():
            fill(*every)
        else:
            with torch.cuda.device(x.device):  # kernels run on the current device
                fill(*every)
        return outputs

    def dispatched(*args):
        with torch._C._AutoDispatchBelowAutograd():  # else out= refuses inputs that require grad
            return run(ready(contract, args, subclasses=True))

    LIBRARY.define(name + torch.library.infer_schema(contract, mutates_args=()))
    LIBRARY.impl(name, dispatched, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftops::{name}", contract, lib=LIBRARY)
    overload = getattr(torch.ops.peftops, name).default

    def call(*args):
        watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
        watched = watched or torch._C._get_tracing_state() or torch._C._are_functorch_transforms_active()
        plain = None if watched else ready(contract, args)
        return overload(*args) if plain is None else run(plain)

    return call


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
            if arg.get_device() != place:
                expect_one_device(contract, whole)
            if not arg.is_contiguous() or arg.data_ptr() % 16 or (kind is Tensor and arg.is_neg()):
                wanted = arg.clone(memory_format=torch.contiguous_format)
        elif kind is list:
            if (wanted := ready(contract, arg, subclasses, whole)) is None:
                return None
        elif kind not in SCALARS:
            return None
        if wanted is not arg:
            out = [*out[:i], wanted, *out[i + 1 :]]
    return out


def expect_one_device(contract, args):
    """Raises for the first that is elsewhere than the first of all."""
    names, device = contract.__code__.co_varnames, args[0].device
    for name, arg in zip(names, args, strict=False):
        for t in arg if isinstance(arg, list) else [arg]:
            if isinstance(t, Tensor) and t.device != device:
                raise ValueError(f"{contract.__name__}: {name} must be on {device}, got {t.device}")


def expect(row, name, tensor, shape, *dtypes):
    """The one check and the one error form; None is always as expected."""
    if tensor is None or (tensor.shape == shape and tensor.dtype in dtypes):
        return
    if tensor.shape != shape:
        raise ValueError(f"{row}: {name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
    raise TypeError(f"{row}: {name} must be {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {tensor.dtype}")
