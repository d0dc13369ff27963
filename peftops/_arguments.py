"""@explained: when a public function fails, the error names the argument that is wrong.

Arguments are checked only after a failure, so that a correct call pays nothing for it.
"""

import functools
import inspect
import numbers
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

LARGEST = 2**31 - 1  # of a size
Function = TypeVar("Function", bound=Callable)
CLEAR = (
    "lora: ",
    "dora: ",
    "nf4: ",
    "multi: ",
    "merge: ",
)  # how errors begin that need no explanation


def explained(row: str, **checks: Callable) -> Callable[[Function], Function]:
    """Decorates a public function: its errors say which argument is wrong.

    row: the first word of the error messages. checks: for an argument's name, a function of its
    value that returns what the argument must be, or None if the value is right.
    """

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
                explain(row, checks, given, error)
                raise

        return call

    return wrap


def explain(row, checks, given, error):
    """Raises for the first argument that fails its check or is on another device than the first."""
    device = None
    for name, value in given.items():
        wanted = checks[name](value) if name in checks else None
        if wanted:
            raise TypeError(
                f"{row}: {name} must be {wanted}, got {shown(value)}"
            ) from error
        if not isinstance(value, Tensor):
            continue
        device = device or value.device
        if value.device != device:
            raise ValueError(
                f"{row}: {name} must be on {device}, got {value.device}"
            ) from error


def shown(value):
    """A value in a message: in few words, and a tensor by layout, shape and dtype."""
    if isinstance(value, Tensor):
        layout = str(value.layout).removeprefix("torch.")
        return f"a {layout} tensor of {tuple(value.shape)}, {value.dtype}"
    text = repr(value)
    return text if len(text) <= 40 else type(value).__name__


def tensor(value):
    if isinstance(value, Tensor) and value.layout is torch.strided:
        return None
    return "a dense tensor"


def tensor_or_none(value):
    if value is None or tensor(value) is None:
        return None
    return "a dense tensor or None"


def number(value):
    if isinstance(value, numbers.Real):
        return None
    if isinstance(value, Tensor) and value.numel() == 1:
        return None
    return "a number or a tensor of one"


def probability(value):
    if isinstance(value, numbers.Real) and 0 <= value <= 1:
        return None
    return "a number in [0, 1]"


def size(value):
    if type(value) is int and 0 <= value <= LARGEST:
        return None
    return f"an int from 0 to {LARGEST}"


def dtype_or_none(value):
    if value is None or isinstance(value, torch.dtype):
        return None
    return "a torch.dtype or None"


def flag(value):
    return None if isinstance(value, bool) else "True or False"


def instance(cls):
    return lambda value: None if isinstance(value, cls) else cls.__name__


def expect(
    row,
    name,
    tensor,
    shape,
    *dtypes,
):
    """Raises unless a tensor has this shape and one of these dtypes; None is always accepted.

    Every contract checks its tensors here, so that all errors have one form.
    """
    if tensor is None or (tensor.shape == shape and tensor.dtype in dtypes):
        return
    if tensor.shape != shape:
        raise ValueError(
            f"{row}: {name} must be {tuple(shape)}, got {tuple(tensor.shape)}"
        )
    wanted = " or ".join(map(str, dict.fromkeys(dtypes)))
    raise TypeError(f"{row}: {name} must be {wanted}, got {tensor.dtype}")
