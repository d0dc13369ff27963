"""multi_lora_linear's errors for bad input: one sentence each."""

import pytest
import torch
from test_multi import RANKS, ROUTES, K, N, tensors

import peftops.functional as F


def call(**changed):
    t = tensors()
    arguments = {
        "x": t["x"],
        "weight": t["w"],
        "lora_A": t["a"],
        "lora_B": t["b"],
        "slots": torch.tensor(ROUTES["mixed"]),
    }
    return F.multi_lora_linear(**arguments | changed)


BAD = {
    "no adapters": (
        {"lora_A": [], "lora_B": []},
        "lora_A must be a list of tensors, one for each adapter",
    ),
    "not a list": ({"lora_A": torch.ones(3, K)}, "lora_A must be a list of tensors"),
    "too few": ({"lora_B": [torch.ones(N, 3)]}, "lora_B must be 4 tensors, got 1"),
    "rank": (
        {"lora_B": [torch.ones(N, 3)] * 4},
        r"lora_B\[1\] must be \(24, 8\), got \(24, 3\)",
    ),
    "k": (
        {"lora_A": [torch.ones(r, K + (r == 8)) for r in RANKS]},
        r"lora_A\[1\] must be \(r, 40\), got \(8, 41\)",
    ),
    "another k": ({"x": torch.ones(12, 41)}, r"w must be \(24, 41\), got \(24, 40\)"),
    "slots": (
        {"slots": torch.zeros(11).int()},
        r"slots must be \(12,\), got \(11,\)",
    ),
    "slots' dtype": ({"slots": torch.zeros(12)}, "slots must be integers"),
    "a slot": ({"slots": torch.full((12,), 4)}, r"slots must be in \[-1, 4\), got 4"),
    "another slot": (
        {"slots": torch.full((12,), -2)},
        r"slots must be in \[-1, 4\), got -2",
    ),
    "scaling": ({"scaling": [1.0]}, "scaling must be a number or 4 numbers, got 1"),
    "scaling's type": ({"scaling": "much"}, "scaling must be a number, or a list"),
    "p": ({"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\], got 1.5"),
    "a p": (
        {"dropout_p": [0, 0, -0.1, 0]},
        r"dropout_p must be in \[0, 1\], got -0.1",
    ),
    "gains": ({"gain": [torch.ones(N)]}, "gain must be 4 tensors, got 1"),
    "gain": ({"gain": torch.ones(3, N)}, r"gain must be \(4, 24\), got \(3, 24\)"),
    "bias": ({"bias": torch.ones(5)}, r"bias must be \(24,\), got \(5,\)"),
    "weight": (
        {"weight": torch.ones(N, K, requires_grad=True)},
        "w must be frozen, got one that requires grad",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changed, text = BAD[case]
    with pytest.raises((ValueError, TypeError), match=f"(multi|lora): {text}"):
        call(**changed)
