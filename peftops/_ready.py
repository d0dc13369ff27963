"""What a kernel may rely on: contiguous, aligned tensors of one device, the current one."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch._C._functorch import unwrap_if_dead

SCALARS = frozenset({type(None), str, bool, int, float, torch.dtype})


def elsewhere(x):
    """Whether x is on a GPU that is not the current one. Kernels run on the current one."""
    return x.is_cuda and x.get_device() != torch.cuda.current_device()


def device_of(x):
    return torch.cuda.device(x.device) if elsewhere(x) else nullcontext()


def ready(contract, args, subclasses=False, every_arg=None):
    """args, with copies in the place of tensors that a kernel could not read as they are.

    Each tensor is contiguous, starts at a multiple of 16 bytes and is on the first one's device. A
    view that torch negates lazily, such as the imaginary part of a conjugate, is copied too. If no
    copy is needed, the result is args itself.

    Args:
        contract: names the arguments in errors.
        args: an op's arguments, or the items of one that is a list.
        subclasses: accept subclasses of Tensor. If False, they give None, because their
            __torch_dispatch__ may have to see the op.
        every_arg: all of the op's arguments, where args are the items of one.
    """
    every_arg = every_arg or args
    out = args
    device_index = every_arg[0].get_device()  # -1 on a CPU
    for i, arg in enumerate(args):
        cls = type(arg)
        wanted = arg
        if (
            cls is Tensor
            or cls is nn.Parameter
            or (subclasses and isinstance(arg, Tensor))
        ):
            wanted = arg = unwrap_if_dead(
                arg
            )  # it may have outlived its torch.func transform
            if arg.get_device() != device_index:
                expect_one_device(contract, every_arg)
            if (
                not arg.is_contiguous()
                or arg.data_ptr() % 16
                or (cls is Tensor and arg.is_neg())
            ):
                wanted = arg.clone(memory_format=torch.contiguous_format)
        elif cls is list:
            wanted = ready(contract, arg, subclasses, every_arg)
            if wanted is None:
                return None
        elif cls not in SCALARS:
            return None
        if wanted is not args[i]:
            out = [*out[:i], wanted, *out[i + 1 :]]
    return out


def expect_one_device(contract, args):
    """Raises for the first tensor that is not on the device of the first argument."""
    names = contract.__code__.co_varnames
    device = args[0].device
    for name, arg in zip(names, args, strict=False):
        tensors = arg if isinstance(arg, list) else [arg]
        for t in tensors:
            if isinstance(t, Tensor) and t.device != device:
                raise ValueError(
                    f"{contract.__name__}: {name} must be on {device}, got {t.device}"
                )


def expect_no_grad(name, args):
    """Raises if autograd would have to record an op that changes its first argument."""
    if not torch.is_grad_enabled():
        return
    if any(isinstance(t, Tensor) and t.requires_grad for t in args):
        raise RuntimeError(f"{name} has no gradients; call it in torch.no_grad()")


def watched():
    """Whether a tracer, a mode or a transform has to see calls of ops."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
        or torch._C._are_functorch_transforms_active()
    )
