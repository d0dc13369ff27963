"""The law: how close a backend's outputs have to be to the exact ones.

error = max|out − exact| / max|exact| must be at most twice the error of the reference in the same
dtype, plus one eps of the output. `exact` is what the reference makes in fp64.
"""

from collections.abc import Callable, Iterator
from importlib import import_module

import torch

from peftops import backends

from .cases import CASES


def check(
    op: str,
    backend: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[str, float, float]]:
    """Judges a backend by all cases of an op.

    Args:
        op: the name of an op, such as "lora_fwd".
        backend: one of backends.NAMES.
        shape: (m, k, n, r)

    Yields:
        (label, error, bound) of the worst output of each case, which is right where
        error <= bound.
    """
    for label, args in CASES[op](shape, dtype, device):
        yield label, *check_case(op, backend, args)


def check_case(
    op: str,
    backend: str,
    args: list,
) -> tuple[float, float]:
    """(error, bound) of the worst output of one case."""
    exact = call(op, "reference", double(args))
    same = call(op, "reference", args)
    outs = call(op, backend, args)
    errors = [
        (error(out, exact[i]), bound(out, same[i], exact[i]))
        for i, out in enumerate(outs)
    ]
    wrong = [pair for pair in errors if not pair[0] <= pair[1]]  # NaN is wrong too
    return wrong[0] if wrong else max(errors)


def call(
    op: str,
    backend: str,
    args: list,
) -> tuple[torch.Tensor, ...]:
    """The outputs of an op that runs on this backend."""
    with backends.backend(backend):
        return outputs(getattr(torch.ops.peftops, op), args)


def outputs(op: Callable, args: list) -> tuple[torch.Tensor, ...]:
    """The outputs of an op as a tuple. Of one that works in place it is a changed copy."""
    if op.__name__.endswith("_"):
        changed = args[0].clone()
        op(changed, *args[1:])
        return (changed,)
    return every(op(*args))


def every(outputs) -> tuple[torch.Tensor, ...]:
    """What an op returns as a tuple, also where it is a single tensor or nothing."""
    return (outputs,) if isinstance(outputs, torch.Tensor) else outputs or ()


def function(op: str) -> Callable:
    """The Python function of an op, which replays. torch.ops has the dispatched one."""
    return getattr(import_module(f"peftops.ops.{op.partition('_')[0]}"), op)


def double(arg):
    """An argument with its floating-point tensors in fp64, also those in lists."""
    if isinstance(arg, list):
        return [double(item) for item in arg]
    if isinstance(arg, torch.Tensor) and arg.is_floating_point():
        return arg.double()
    return arg


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """max|out − exact| / max|exact|. For whole numbers, how many differ."""
    if out.shape != exact.shape:
        return float("inf")
    if not exact.is_floating_point():
        return float((out != exact).sum())
    if not exact.numel():
        return 0.0
    difference = (out.double() - exact).abs().max()
    return (difference / exact.abs().max().clamp_min(1e-30)).item()


def bound(
    out: torch.Tensor,
    same: torch.Tensor,
    exact: torch.Tensor,
) -> float:
    """The largest error that the law allows.

    Args:
        same: the reference's output in the dtype of `out`.
    """
    eps = torch.finfo(out.dtype).eps if out.is_floating_point() else 0.0
    return 2 * error(same, exact) + eps
