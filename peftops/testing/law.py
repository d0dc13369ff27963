"""The one law: what a backend makes of an op's cases, against the fp64 reference.

error = max|out − exact| / max|exact| must be at most twice the same-dtype reference's own error,
plus one eps of the output.
"""

from importlib import import_module

import torch

from peftops import backends

from .cases import CASES


def check(op, backend, shape, dtype, device="cpu"):
    """(label, error, bound) of each case's worst output; error <= bound is right."""
    for label, args in CASES[op](shape, dtype, device):
        yield label, *check_case(op, backend, args)


def check_case(op, backend, args):
    """(error, bound) of the worst output of one case."""
    exact = call(op, "reference", double(args))
    same = call(op, "reference", args)
    outs = call(op, backend, args)
    errors = [
        (error(out, exact[i]), bound(out, same[i], exact[i])) for i, out in enumerate(outs)
    ]
    wrong = [pair for pair in errors if not pair[0] <= pair[1]]  # NaN is wrong too
    return (wrong or [max(errors)])[0]


def call(op, backend, args):
    with backends.backend(backend):
        return every(getattr(torch.ops.peftops, op)(*args))


def every(outputs):
    """The outputs of an op as a tuple, also where it has one alone."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def function(op):
    """The op's function in Python, which replays, where torch.ops has its dispatched one."""
    return getattr(import_module(f"peftops.ops.{op.partition('_')[0]}"), op)


def double(arg):
    """An argument whose floating-point tensors are fp64."""
    if isinstance(arg, list):
        return [double(item) for item in arg]
    return arg.double() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg


def error(out, exact):
    """max|out − exact| / max|exact|; of whole numbers, how many differ."""
    if out.shape != exact.shape:
        return float("inf")
    if not exact.is_floating_point():
        return float((out != exact).sum())
    return (
        ((out.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()
        if exact.numel()
        else 0.0
    )


def bound(out, same, exact):
    """The largest error that the law allows; same: the reference's output in the dtype of `out`."""
    return 2 * error(same, exact) + (
        torch.finfo(out.dtype).eps if out.is_floating_point() else 0.0
    )
