"""Calls of the public functions with wrong arguments: a right answer, or one clear error that names the argument."""

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
    """Right ones, by name"""
    x, w, a, b = torch.randn(M, K), torch.randn(N, K), torch.randn(R, K), torch.randn(N, R)
    adapter = {"lora_A": a, "lora_B": b}
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
    F.lora_linear, F.dora_linear, F.dora_weight_norm, F.nf4_linear, F.quantize_nf4, F.dequantize_nf4, F.dropout_mask,
]  # fmt: skip
CHANGES = {  # of a tensor
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
    "a gradient wanted": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand_as(t) if t.dim() else t,
    "shifted": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "negated view": lambda t: torch._neg_view(t) if t.is_floating_point() else t,
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "numpy": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
}
THINGS = [
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


def changed(name, value, chance):
    """What, and the value in the place of a right one"""
    if isinstance(value, torch.Tensor) and chance.random() < 0.7:
        what = chance.choice(list(CHANGES))
        try:
            return f"{name}: {what}", CHANGES[what](value)
        except (RuntimeError, IndexError):  # torch has no such tensor
            return f"{name}: None", None
    thing = chance.choice(THINGS)
    return f"{name}: {thing!r}", thing


def wide(value):
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, F.Base):
        return value._replace(tensors=[wide(t) for t in value.tensors])
    return value


def truth(function, args):
    """The specification's answer in the same dtype and in float64, or None where it has none in float64"""
    with backend("reference"):
        torch.manual_seed(0)
        same = function(**args)
        try:
            torch.manual_seed(0)
            return same, function(**{name: wide(value) for name, value in args.items()})
        except (TypeError, ValueError):
            return same, None


def unclear(error):
    return not (
        type(error) in (ValueError, TypeError)
        and CLEAR.match(str(error))
        and len(str(error)) < 300
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_wrong_calls(function):
    chance, bad, ended = random.Random(function.__name__), [], Counter()
    for seed in range(450):
        torch.manual_seed(seed)
        args = arguments(function)
        names = chance.sample(list(args), chance.choice([1, 1, 2]) if len(args) > 1 else 1)
        what = []
        for name in names:
            said, args[name] = changed(name, args[name], chance)
            what.append(said)
        try:
            torch.manual_seed(0)
            y = function(**args)
        except Exception as error:  # of any kind: which ones are right is the question
            ended["refused"] += 1
            if unclear(error):
                bad.append(f"{'; '.join(what)}: {type(error).__name__}: {error}"[:250])
            continue
        ended["answered"] += 1
        if isinstance(y, torch.Tensor) and y.is_floating_point() and not y.is_meta:
            same, exact = truth(function, args)
            if (
                exact is not None
                and exact.isfinite().all()
                and not error_within(y, same, exact)
            ):
                bad.append(f"{'; '.join(what)}: a wrong answer")
    assert bad == [] and min(ended["refused"], ended["answered"]) > 20, f"{len(bad)} of 450"


def error_within(y, same, exact):
    return y.shape == exact.shape and error(y, exact) <= bound(same, exact)
