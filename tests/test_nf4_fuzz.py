"""Damaged states of a 4-bit weight: each loads as bitsandbytes reads it, or is refused by its key.

A refused state changes nothing. bitsandbytes' formula is written out here, from a state's tensors.
"""

import json
import random
import re

import pytest
import torch

from peftops import NF4Weight
from peftops.nn import LinearNF4
from peftops.ops.nf4_tables import FOUR_BITS

pytestmark = pytest.mark.usefixtures("one_thread")
N, K = 24, 42
STATE = "weight.quant_state.bitsandbytes__"
CASTS = (
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
VALUES = (
    None,
    True,
    -1,
    0,
    1,
    63,
    64,
    128,
    1 << 48,
    1 << 70,
    10**300,
    0.5,
    1e999,
    float("nan"),
    "",
    "nf4",
    "fp4",
    "float32",
    "float64",
    "bfloat16",
    "\n\ud800",
    [],
    [N, K],
    [K, N],
    [N * K],
    [N, K, 1],
    [N, -K],
    [N, 0],
    [float(N), K],
    [1 << 40] * 9,
    [1 << 24, 1 << 24],
    [2] * 3000,
    [[N], K],
    {},
    {"a": 1},
)
TEXTS = "", "[", "[" * 5000, "1" * 5000, "null", '{"shape": [1e5]}', " " * (1 << 17)


def saved(double, quant_type="nf4"):
    torch.manual_seed(0)
    return NF4Weight.quantize(torch.randn(N, K), 64, double, quant_type).state_dict()


def state_key(tensors):
    return next((key for key in tensors if key.startswith(STATE)), None)


def packed(text):
    return torch.tensor(list(text.encode("utf-8", "surrogatepass")), dtype=torch.uint8)


def change_byte(tensor, chance):
    tensor = tensor.clone()
    if tensor.numel():
        tensor.flatten().view(torch.uint8)[chance.randrange(tensor.nbytes)] = (
            chance.randrange(256)
        )
    return tensor


def change_size(tensor, chance):
    choice = chance.randrange(6)
    if choice == 0 or not tensor.dim():
        return tensor[None]
    if choice == 1:
        return tensor[: chance.randrange(len(tensor) + 1)]
    if choice == 2:
        return torch.cat([tensor, tensor[: chance.randrange(1, 9)]])
    if choice == 3:
        return tensor.flatten()[:1].reshape(())
    return tensor.flatten() if choice == 4 else tensor.reshape(1, -1)


def change_layout(tensor, chance):
    choice = chance.randrange(5)
    if choice == 0:
        return torch.stack([tensor, tensor], -1)[..., 0]  # strides
    if choice == 1:
        return tensor.to("meta")
    if choice == 2:
        return tensor.to_sparse()
    if choice == 3:
        return tensor.double().requires_grad_()
    return tensor.float() * float("nan")


def change_state(tensor, chance):
    """Changes a member of the JSON object, or the whole text."""
    try:
        state = json.loads(bytes(tensor.tolist()))
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        return tensor
    if not isinstance(state, dict) or not state:
        return tensor
    choice = chance.randrange(6)
    key = chance.choice(list(state))
    if choice == 0:
        del state[key]
    elif choice == 1:
        return packed(chance.choice(TEXTS))
    else:
        state[key if choice < 5 else "more"] = chance.choice(VALUES)
    return packed(json.dumps(state))


def mutate(tensors, chance):
    """Changes one tensor or key."""
    key = chance.choice(list(tensors))
    if chance.random() < 0.3:
        key = state_key(tensors) or key
    tensor = tensors[key]
    choice = chance.randrange(8)
    if choice == 0 or not isinstance(tensor, torch.Tensor):
        return {other: value for other, value in tensors.items() if other != key}
    if choice == 1:
        return tensors | {chance.choice(list(tensors)): tensor}
    if choice == 2:
        numbers = [] if tensor.is_meta else tensor.tolist()
        return tensors | {key: chance.choice([None, 1.0, "text", numbers])}
    if choice == 3:
        new = f"{key}{chance.choice(['2', '.x', ''])}"
        return {
            other if other != key else new: value for other, value in tensors.items()
        }
    if tensor.is_meta or tensor.layout is not torch.strided:
        return tensors
    if choice == 4:
        return tensors | {key: tensor.to(chance.choice(CASTS))}
    change = change_state
    if not key.startswith(STATE):
        change = chance.choice([change_byte, change_size, change_layout])
    return tensors | {key: change(tensor, chance)}


def mutations(count, seed, more=None):
    """States with one to three changes."""
    chance = random.Random(seed)
    for i in range(count):
        quant_type = ("nf4", "fp4")[i // 2 % 2]
        tensors = saved(i % 2 == 0, quant_type) | (more or {})
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            tensors = mutate(tensors, chance) or tensors
        yield tensors


def formula(tensors):
    """The weight that bitsandbytes computes from a state; every step is rounded to float32."""
    key = state_key(tensors)
    state = json.loads(bytes(tensors[key].tolist()))
    size = torch.Size(state["shape"]).numel()
    pairs = tensors["weight"].detach().contiguous().flatten().view(torch.uint8).long()
    codes = torch.stack([pairs >> 4, pairs & 15], 1).flatten()[:size]
    absmax = tensors["weight.absmax"].detach()
    if "nested_offset" in state:
        nested_absmax = tensors["weight.nested_absmax"].detach().float()
        nested = nested_absmax.repeat_interleave(256)[: len(absmax)]
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
        nested_map = tensors["weight.nested_quant_map"].detach().float()
        absmax = nested_map[absmax.long()] * nested + offset
    scale = absmax.float().repeat_interleave(state["blocksize"])[:size]
    dtype = getattr(torch, state["dtype"])
    table = torch.tensor(FOUR_BITS[key.removeprefix(STATE)], dtype=torch.float32)
    return (table[codes] * scale).view(state["shape"]).to(dtype)


def same(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    )


def test_weights():
    counts = {"loaded": 0, "refused": 0}
    for tensors in mutations(1000, seed=11):
        try:
            weight = NF4Weight.load(tensors)
        except (ValueError, TypeError) as error:
            assert re.match(r"nf4: .*weight", str(error)) and len(str(error)) < 1000, (
                str(error)
            )
            counts["refused"] += 1
        else:
            assert same(weight.dequantize(), formula(tensors)), tensors
            counts["loaded"] += 1
    assert min(counts.values()) > 100, counts


def contents(layer):
    """Copies of a layer's tensors, and its format."""
    named = (*layer.named_parameters(), *layer.named_buffers())
    tensors = {name: tensor.clone() for name, tensor in named}
    settings = (
        layer.weight_dtype,
        layer.blocksize,
        layer.quant_type,
        layer.quant_storage,
        layer.double_quant,
    )
    return tensors, settings


def unchanged(layer, before):
    tensors, settings = contents(layer)
    old_tensors, old_settings = before
    return (
        settings == old_settings
        and list(tensors) == list(old_tensors)
        and all(same(tensors[name], tensor) for name, tensor in old_tensors.items())
    )


@pytest.mark.parametrize("assign", [False, True])
def test_layers(assign):
    """A bias may be damaged as well. Some layers hold another format than the state has."""
    bias = torch.linspace(-1, 1, N)
    counts = {"loaded": 0, "refused": 0}
    for i, tensors in enumerate(mutations(1000, seed=12, more={"bias": bias})):
        torch.manual_seed(1)
        layer = LinearNF4(K, N, double_quant=i % 3 > 0)
        before = contents(layer)
        try:
            layer.load_state_dict(tensors, assign=assign)
        except RuntimeError as error:
            assert re.search(r"weight|bias", str(error).partition("\n")[2]), str(error)
            assert unchanged(layer, before), str(error)
            counts["refused"] += 1
        else:
            assert same(layer.dequantize(), formula(tensors)), tensors
            assert same(layer.bias.detach().float(), tensors["bias"].detach().float())
            counts["loaded"] += 1
    assert min(counts.values()) > 100, counts


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_a_refusal_counts_what_is_not_finite(value, dtype):
    layer = LinearNF4(K, N)
    w = torch.randn(N, K).to(dtype)
    w[3, 4:7] = value
    nans, infs = (3, 0) if value != value else (0, 3)
    message = (
        f"nf4: w must be finite, got {nans} NaN and {infs} infinite of {N * K} elements"
    )
    before = contents(layer)
    for call in quantizing_calls(layer, w):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(RuntimeError, match=f"LinearNF4: {message}, in weight"):
        layer.load_state_dict({"weight": w, "bias": layer.bias.detach().clone()})
    assert unchanged(layer, before)


def quantizing_calls(layer, w):
    return [
        lambda: NF4Weight.quantize(w),
        lambda: layer.quantize(w),
        lambda: layer.load({"weight": w}),
    ]


def test_large_numbers_are_finite():
    """Also where their sum and their range are infinite."""
    w = torch.full((N, K), 3e38)
    w[0] = -3e38
    assert torch.equal(NF4Weight.quantize(w, double_quant=False).dequantize(), w)
    half = torch.full((N, K), 65504.0, dtype=torch.float16)
    assert torch.equal(NF4Weight.quantize(half, double_quant=False).dequantize(), half)


def test_float64_is_refused():
    layer = LinearNF4(K, N)
    w = torch.randn(N, K, dtype=torch.float64)
    before = contents(layer)
    message = (
        "w must be torch.float32 or torch.float16 or torch.bfloat16, got torch.float64"
    )
    for call in quantizing_calls(layer, w):
        with pytest.raises(TypeError, match=message):
            call()
    assert unchanged(layer, before)


def test_a_strict_load_of_too_little_or_too_much_changes_nothing():
    state = LinearNF4(K, N).state_dict()
    for change in ({"weight2": torch.ones(1)}, {"bias": None}):
        layer = LinearNF4(K, N)
        before = contents(layer)
        tensors = {
            key: tensor
            for key, tensor in (state | change).items()
            if tensor is not None
        }
        with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
            layer.load_state_dict(tensors)
        assert unchanged(layer, before)
        layer.load_state_dict(tensors, strict=False)
        assert torch.equal(layer.weight, state["weight"])
