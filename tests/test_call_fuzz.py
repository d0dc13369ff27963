"""Calls of the public functions with wrong arguments.

Each gives a right answer, or one clear error that names the argument.
"""

import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from law import bound, error

import peftops.functional as F
from peftops import backend

M, K, N, R = 5, 16, 24, 4
CLEAR = re.compile(r"^(lora|dora|nf4): \w+ must (be|have|come) .+, got .+", re.DOTALL)


def arguments(function):
    """Right arguments of a function, by name."""
    x = torch.randn(M, K)
    w = torch.randn(N, K)
    adapter = {"lora_A": torch.randn(R, K), "lora_B": torch.randn(N, R)}
    if function is F.lora_linear:
        more = {
            "bias": torch.randn(N),
            "scaling": 0.5,
            "dropout_p": 0.0,
            "gain": torch.randn(N),
            "gate": torch.rand(M, 1),
        }
        return {"x": x, "weight": w} | adapter | more
    if function is F.dora_linear:
        more = {
            "magnitude": torch.rand(N) + 1,
            "bias": torch.randn(N),
            "scaling": 0.5,
            "dropout_p": 0.0,
            "norm": None,
        }
        return {"x": x, "weight": w} | adapter | more
    if function is F.dora_weight_norm:
        return {"weight": w} | adapter | {"scaling": 0.5, "dtype": None}
    if function is F.nf4_linear:
        return {"x": x, "weight": F.quantize_nf4(w), "bias": torch.randn(N)}
    if function is F.quantize_nf4:
        return {"w": w, "blocksize": 64, "double_quant": True}
    if function is F.dequantize_nf4:
        return {"q": F.quantize_nf4(w), "dtype": torch.float32}
    return {"seed": torch.tensor([3]), "m": M, "k": K, "p": 0.3}


FUNCTIONS = [
    F.lora_linear,
    F.dora_linear,
    F.dora_weight_norm,
    F.nf4_linear,
    F.quantize_nf4,
    F.dequantize_nf4,
    F.dropout_mask,
]
CHANGES = {  # what is done to a right tensor
    "one row less": lambda t: t[:-1] if t.dim() else t,
    "one column less": lambda t: t[..., :-1] if t.dim() else t,
    "transposed": lambda t: t.mT if t.dim() > 1 else t[None],
    "one dimension more": lambda t: t[None],
    "one dimension less": lambda t: t[0] if t.dim() else t,
    "no elements": lambda t: t[:0] if t.dim() else t,
    "a number": lambda t: t.sum(),
    "int64": lambda t: t.long(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "a gradient wanted": lambda t: (
        t.clone().requires_grad_() if t.is_floating_point() else t
    ),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand_as(t) if t.dim() else t,
    "shifted": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "negated view": lambda t: torch._neg_view(t) if t.is_floating_point() else t,
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "numpy": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
}
THINGS = [  # what takes the place of a right argument
    None,
    "x",
    b"x",
    0,
    1,
    -1,
    2,
    0.5,
    1.5,
    -0.1,
    float("nan"),
    float("inf"),
    1j,
    10**30,
    True,
    [],
    {},
    (),
    object(),
    torch.float16,
    torch.tensor([0.5]),
    torch.tensor(0.5),
    torch.tensor([0.5, 0.5]),
    torch.tensor([1]),
    torch.ones(1, requires_grad=True),
    np.float32(0.5),
    F.Base("dense", []),
    F.Base("nf4", []),
    F.Base("given", [torch.ones(2)]),
    F.Base("dense", [None]),
    F.Base("odd", []),
    F.Base("dense", None),
    F.Base(None, None),
]


def wrong_value(name, value, chance):
    """(a description, a value) to take the place of a right value."""
    if isinstance(value, torch.Tensor) and chance.random() < 0.7:
        change = chance.choice(list(CHANGES))
        try:
            return f"{name}: {change}", CHANGES[change](value)
        except (RuntimeError, IndexError):  # torch has no such tensor
            return f"{name}: None", None
    thing = chance.choice(THINGS)
    return f"{name}: {thing!r}", thing


def to_float64(value):
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, F.Base):
        return value._replace(tensors=[to_float64(t) for t in value.tensors])
    return value


def reference_answers(function, args):
    """The reference's answers in the same dtype and in float64; None where float64 is refused."""
    with backend("reference"):
        torch.manual_seed(0)
        same = function(**args)
        try:
            wide_args = {name: to_float64(value) for name, value in args.items()}
            torch.manual_seed(0)
            return same, function(**wide_args)
        except (TypeError, ValueError):
            return same, None


def is_clear(error):
    if type(error) not in (ValueError, TypeError) or len(str(error)) >= 300:
        return False
    return CLEAR.match(str(error)) is not None


def is_right(function, args, y):
    """Whether y is within the tolerance of the reference, where that is finite."""
    same, exact = reference_answers(function, args)
    if exact is None or not exact.isfinite().all():
        return True
    return y.shape == exact.shape and error(y, exact) <= bound(same, exact)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_wrong_calls_are_answered_right_or_refused_clearly(function):
    chance = random.Random(function.__name__)
    faults = []
    outcomes = Counter()
    for seed in range(450):
        torch.manual_seed(seed)
        args = arguments(function)
        count = chance.choice([1, 1, 2]) if len(args) > 1 else 1
        descriptions = []
        for name in chance.sample(list(args), count):
            description, args[name] = wrong_value(name, args[name], chance)
            descriptions.append(description)
        case = "; ".join(descriptions)
        try:
            torch.manual_seed(0)
            y = function(**args)
        except Exception as error:  # of any class: is_clear says which are right
            outcomes["refused"] += 1
            if not is_clear(error):
                faults.append(f"{case}: {type(error).__name__}: {error}"[:250])
            continue
        outcomes["answered"] += 1
        has_numbers = (
            isinstance(y, torch.Tensor) and y.is_floating_point() and not y.is_meta
        )
        if has_numbers and not is_right(function, args, y):
            faults.append(f"{case}: a wrong answer")
    assert faults == [], f"{len(faults)} of 450"
    assert min(outcomes["refused"], outcomes["answered"]) > 20
