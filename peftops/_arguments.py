"""@explained: a call of a public function that went wrong says which argument is not what it should be.

Arguments are looked at after a failure alone, so a call that is right pays nothing for it.
"""

import functools
import inspect
import numbers

import torch
from torch import Tensor

LARGEST = 2**31 - 1  # of a size
CLEAR = "lora: ", "dora: ", "nf4: "  # how errors begin that need no explanation


def explained(row, **kinds):
    """kinds: for an argument's name, a function from its value to what it must be, or None where it is that."""

    def wrap(function):
        names = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if str(error).startswith(CLEAR):
                    raise
                given = dict(zip(names, args, strict=False)) | kwargs
                explain(row, kinds, given, error)
                raise

        return call

    return wrap


def explain(row, kinds, given, error):
    """Raises for the first argument that is not of its kind, or not on the device of the first tensor."""
    device = None
    for name, value in given.items():
        wanted = kinds[name](value) if name in kinds else None
        if wanted:
            raise TypeError(f"{row}: {name} must be {wanted}, got {shown(value)}") from error
        if isinstance(value, Tensor):
            device = device or value.device
            if value.device != device:
                raise ValueError(
                    f"{row}: {name} must be on {device}, got {value.device}"
                ) from error


def shown(value):
    """Short, and what a tensor is rather than its values"""
    if isinstance(value, Tensor):
        return f"a {str(value.layout).removeprefix('torch.')} tensor of {tuple(value.shape)}, {value.dtype}"
    text = repr(value)
    return text if len(text) <= 40 else type(value).__name__


def tensor(value):
    return (
        None
        if isinstance(value, Tensor) and value.layout is torch.strided
        else "a dense tensor"
    )


def tensor_or_none(value):
    return None if value is None or tensor(value) is None else "a dense tensor or None"


def number(value):
    real = isinstance(value, numbers.Real)
    return (
        None
        if real or (isinstance(value, Tensor) and value.numel() == 1)
        else "a number or a tensor of one"
    )


def probability(value):
    return None if isinstance(value, numbers.Real) and 0 <= value <= 1 else "a number in [0, 1]"


def size(value):
    whole = type(value) is int and 0 <= value <= LARGEST
    return None if whole else f"an int from 0 to {LARGEST}"


def dtype_or_none(value):
    return None if value is None or isinstance(value, torch.dtype) else "a torch.dtype or None"


def flag(value):
    return None if isinstance(value, bool) else "True or False"


def instance(kind):
    return lambda value: None if isinstance(value, kind) else kind.__name__
