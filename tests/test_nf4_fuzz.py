"""Damaged states of a 4-bit weight: what loads is bitsandbytes' formula, what is refused is named and changes nothing.

The formula is written out here once more, from the tensors of the state.
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
    None, True, -1, 0, 1, 63, 64, 128, 1 << 48, 1 << 70, 10**300, 0.5, 1e999, float("nan"), "", "nf4", "fp4", "float32",
    "float64", "bfloat16", "\n\ud800", [], [N, K], [K, N], [N * K], [N, K, 1], [N, -K], [N, 0], [float(N), K],
    [1 << 40] * 9, [1 << 24, 1 << 24], [2] * 3000, [[N], K], {}, {"a": 1},
)  # fmt: skip


def saved(double, kind="nf4"):
    torch.manual_seed(0)
    return NF4Weight.quantize(torch.randn(N, K), 64, double, kind).state_dict()


def state_key(tensors):
    return next((key for key in tensors if key.startswith(STATE)), None)


def packed(text):
    return torch.tensor(list(text.encode("utf-8", "surrogatepass")), dtype=torch.uint8)


def change_byte(t, chance):
    t = t.clone()
    if t.numel():
        t.flatten().view(torch.uint8)[chance.randrange(t.nbytes)] = chance.randrange(256)
    return t


def change_size(t, chance):
    kind = chance.randrange(6)
    if kind == 0 or not t.dim():
        return t[None]
    if kind == 1:
        return t[: chance.randrange(len(t) + 1)]
    if kind == 2:
        return torch.cat([t, t[: chance.randrange(1, 9)]])
    if kind == 3:
        return t.flatten()[:1].reshape(())
    return t.flatten() if kind == 4 else t.reshape(1, -1)


def change_layout(t, chance):
    kind = chance.randrange(5)
    if kind == 0:
        return torch.stack([t, t], -1)[..., 0]  # strides
    if kind == 1:
        return t.to("meta")
    if kind == 2:
        return t.to_sparse()
    if kind == 3:
        return t.double().requires_grad_()
    return t.float() * float("nan")


def change_state(t, chance):
    """Another member of the JSON object, or another text."""
    try:
        state = json.loads(bytes(t.tolist()))
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        return t
    if not isinstance(state, dict) or not state:
        return t
    kind, key = chance.randrange(6), chance.choice(list(state))
    if kind == 0:
        del state[key]
    elif kind == 1:
        return packed(
            chance.choice(
                ["", "[", "[" * 5000, "1" * 5000, "null", '{"shape": [1e5]}', " " * (1 << 17)]
            )
        )
    else:
        state[key if kind < 5 else "more"] = chance.choice(VALUES)
    return packed(json.dumps(state))


def mutate(tensors, chance):
    """One thing that is not as it was."""
    key = chance.choice(list(tensors))
    if chance.random() < 0.3:
        key = state_key(tensors) or key
    t, kind = tensors[key], chance.randrange(8)
    if kind == 0 or not isinstance(t, torch.Tensor):
        return {other: v for other, v in tensors.items() if other != key}
    if kind == 1:
        return tensors | {chance.choice(list(tensors)): t}
    if kind == 2:
        return tensors | {
            key: chance.choice([None, 1.0, "text", t.tolist() if not t.is_meta else []])
        }
    if kind == 3:
        return {
            other if other != key else f"{key}{chance.choice(['2', '.x', ''])}": v
            for other, v in tensors.items()
        }
    if kind == 4 and not t.is_meta:
        return tensors | {key: t.to(chance.choice(CASTS)) if t.layout is torch.strided else t}
    if t.is_meta or t.layout is not torch.strided:
        return tensors
    change = (
        change_state
        if key.startswith(STATE)
        else chance.choice([change_byte, change_size, change_layout])
    )
    return tensors | {key: change(t, chance)}


def mutations(count, seed, more=None):
    """States of which one to three things are damaged."""
    chance = random.Random(seed)
    for i in range(count):
        tensors = saved(i % 2 == 0, ("nf4", "fp4")[i // 2 % 2]) | (more or {})
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            tensors = mutate(tensors, chance) or tensors
        yield tensors


def formula(tensors):
    """What bitsandbytes computes from a state, in torch: every step is rounded to float32."""
    key = state_key(tensors)
    state = json.loads(bytes(tensors[key].tolist()))
    block, size = state["blocksize"], torch.Size(state["shape"]).numel()
    bytes_ = tensors["weight"].detach().contiguous().flatten().view(torch.uint8).long()
    codes = torch.stack([bytes_ >> 4, bytes_ & 15], 1).flatten()[:size]
    absmax = tensors["weight.absmax"].detach()
    if "nested_offset" in state:
        nested = (
            tensors["weight.nested_absmax"]
            .detach()
            .float()
            .repeat_interleave(256)[: len(absmax)]
        )
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
        absmax = (
            tensors["weight.nested_quant_map"].detach().float()[absmax.long()] * nested + offset
        )
    scale = absmax.float().repeat_interleave(block)[:size]
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
    seen = {"loaded": 0, "refused": 0}
    for tensors in mutations(1000, seed=11):
        try:
            weight = NF4Weight.load(tensors)
        except (ValueError, TypeError) as error:
            assert re.match(r"nf4: .*weight", str(error)) and len(str(error)) < 1000, str(error)
            seen["refused"] += 1
        else:
            assert same(weight.dequantize(), formula(tensors)), tensors
            seen["loaded"] += 1
    assert min(seen.values()) > 100, seen


def contents(layer):
    """All that a layer is."""
    held = {name: t.clone() for name, t in (*layer.named_parameters(), *layer.named_buffers())}
    about = (
        layer.weight_dtype,
        layer.blocksize,
        layer.quant_type,
        layer.quant_storage,
        layer.double_quant,
    )
    return held, about


def unchanged(layer, before):
    held, about = contents(layer)
    return (
        about == before[1]
        and list(held) == list(before[0])
        and all(same(held[k], t) for k, t in before[0].items())
    )


@pytest.mark.parametrize("assign", [False, True])
def test_layers(assign):
    """A bias may be damaged as well. Some layers hold another format than the state has."""
    bias, seen = torch.linspace(-1, 1, N), {"loaded": 0, "refused": 0}
    for i, tensors in enumerate(mutations(1000, seed=12, more={"bias": bias})):
        torch.manual_seed(1)
        layer = LinearNF4(K, N, double_quant=i % 3 > 0)
        before = contents(layer)
        try:
            layer.load_state_dict(tensors, assign=assign)
        except RuntimeError as error:
            assert re.search(r"weight|bias", str(error).partition("\n")[2]), str(error)
            assert unchanged(layer, before), str(error)
            seen["refused"] += 1
        else:
            assert same(layer.dequantize(), formula(tensors)), tensors
            assert same(layer.bias.detach().float(), tensors["bias"].detach().float())
            seen["loaded"] += 1
    assert min(seen.values()) > 100, seen


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_not_finite_is_refused_with_its_number(value, dtype):
    layer, w = LinearNF4(K, N), torch.randn(N, K).to(dtype)
    w[3, 4:7] = value
    nans, infs = (3, 0) if value != value else (0, 3)
    message = f"nf4: w must be finite, got {nans} NaN and {infs} infinite of {N * K} elements"
    before = contents(layer)
    for refused in (
        lambda: NF4Weight.quantize(w),
        lambda: layer.quantize(w),
        lambda: layer.load({"weight": w}),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    with pytest.raises(RuntimeError, match=f"LinearNF4: {message}, in weight"):
        layer.load_state_dict({"weight": w, "bias": layer.bias.detach().clone()})
    assert unchanged(layer, before)


def test_large_numbers_are_finite():
    """Whose sum and whose range are not."""
    w = torch.full((N, K), 3e38)
    w[0] = -3e38
    assert torch.equal(NF4Weight.quantize(w, double_quant=False).dequantize(), w)
    half = torch.full((N, K), 65504.0, dtype=torch.float16)
    assert torch.equal(NF4Weight.quantize(half, double_quant=False).dequantize(), half)


def test_float64_is_refused():
    layer, w = LinearNF4(K, N), torch.randn(N, K, dtype=torch.float64)
    before, wanted = (
        contents(layer),
        "w must be torch.float32 or torch.float16 or torch.bfloat16, got torch.float64",
    )
    for refused in (
        lambda: NF4Weight.quantize(w),
        lambda: layer.quantize(w),
        lambda: layer.load({"weight": w}),
    ):
        with pytest.raises(TypeError, match=wanted):
            refused()
    assert unchanged(layer, before)


def test_a_strict_load_of_too_little_or_too_much_changes_nothing():
    state = LinearNF4(K, N).state_dict()
    for change in ({"weight2": torch.ones(1)}, {"bias": None}):
        layer = LinearNF4(K, N)
        before = contents(layer)
        tensors = {key: t for key, t in (state | change).items() if t is not None}
        with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
            layer.load_state_dict(tensors)
        assert unchanged(layer, before)
        layer.load_state_dict(tensors, strict=False)
        assert torch.equal(layer.weight, state["weight"])
