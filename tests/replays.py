"""Calls of ops and their outputs, for tests of replays."""

import torch

from peftops.testing.cases import CASES
from peftops.testing.law import outputs


def copied(arg):
    """The same argument, or list of arguments, in other memory."""
    if isinstance(arg, list):
        return [copied(item) for item in arg]
    return arg.clone() if torch.is_tensor(arg) else arg


def twice(call, args):
    """The outputs of the second call, which makes a plan; the first call only notes its kind."""
    outputs(call, args)
    return outputs(call, args)


def same(outs, expected):
    return len(outs) == len(expected) and all(
        a.shape == b.shape
        and a.dtype is b.dtype
        and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(outs, expected, strict=True)
    )


def lora_args(m=37, k=96, n=130, r=5, dtype=torch.float32):
    return next(CASES["lora_fwd"]((m, k, n, r), dtype))[1]
