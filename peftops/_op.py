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
            return run(ready(args, subclasses=True))

    LIBRARY.define(name + torch.library.infer_schema(contract, mutates_args=()))
    LIBRARY.impl(name, dispatched, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftops::{name}", contract, lib=LIBRARY)
    overload = getattr(torch.ops.peftops, name).default

    def call(*args):
        watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
        watched = watched or torch._C._get_tracing_state() or torch._C._are_functorch_transforms_active()
        plain = None if watched else ready(args)
        return overload(*args) if plain is None else run(plain)

    return call


def ready(args, subclasses=False):
    """What kernels may rely on: every tensor is contiguous and starts at a multiple of 16 bytes.

    None where a tensor is of a subclass, whose __torch_dispatch__ may wait for the op.
    """
    out = []
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is nn.Parameter or (subclasses and isinstance(arg, Tensor)):
            if not arg.is_contiguous() or arg.data_ptr() % 16:
                arg = arg.clone(memory_format=torch.contiguous_format)
        elif kind is list:
            if (arg := ready(arg, subclasses)) is None:
                return None
        elif kind not in SCALARS:
            return None
        out.append(arg)
    return out


def expect(row, name, tensor, shape, *dtypes):
    """The one check and the one error form; None is always as expected."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{row}: {name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor is not None and tensor.dtype not in dtypes:
        raise TypeError(f"{row}: {name} must be {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {tensor.dtype}")
