"""@op: from a contract, which checks an op's inputs and allocates its outputs, to a torch op."""

import torch
from torch import Tensor, nn

from . import backends

LIBRARY = torch.library.Library("peftops", "FRAGMENT")
CONTRACTS = {}
PLAIN = frozenset({Tensor, nn.Parameter, type(None), str, bool, int, float})


def op(contract):
    """Registers torch.ops.peftops.<contract>: its schema and its fake kernel are the contract itself.

    What is returned calls the body directly where nobody could tell, which saves the dispatcher's 11 µs.
    """
    name = contract.__name__
    CONTRACTS[name] = contract

    def run(*args):
        args = [ready(arg) for arg in args]
        outputs = contract(*args)
        fill = backends.find(name, args[0])
        fill(*outputs, *args) if isinstance(outputs, tuple) else fill(outputs, *args)
        return outputs

    def dispatched(*args):
        with torch._C._AutoDispatchBelowAutograd():  # else out= refuses inputs that require grad
            return run(*args)

    LIBRARY.define(name + torch.library.infer_schema(contract, mutates_args=()))
    LIBRARY.impl(name, dispatched, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftops::{name}", contract, lib=LIBRARY)
    overload = getattr(torch.ops.peftops, name).default

    def call(*args):
        watched = torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state()
        return overload(*args) if torch.compiler.is_compiling() or watched or not plain(args) else run(*args)

    call.overload = overload
    return call


def plain(args):
    """No tensor subclass, so no __torch_dispatch__ waits for the op."""
    kinds = set(map(type, args)) - PLAIN
    return not kinds or (kinds == {list} and all(plain(arg) for arg in args if type(arg) is list))


def ready(arg):
    """What kernels may rely on: every tensor is contiguous and starts at a multiple of 16 bytes."""
    if isinstance(arg, Tensor):
        aligned = arg.is_contiguous() and arg.data_ptr() % 16 == 0
        return arg if aligned else arg.clone(memory_format=torch.contiguous_format)
    return [ready(item) for item in arg] if isinstance(arg, list) else arg


def expect(row, name, tensor, shape, *dtypes):
    """The one check and the one error form; None is always as expected."""
    if tensor is None:
        return
    if tensor.shape != shape:
        raise ValueError(f"{row}: {name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{row}: {name} must be {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {tensor.dtype}")
