"""The parts of the plugin of vLLM that need no vLLM: layers' pools, slots of rows, staged files.

test_vllm.py runs them in vLLM.
"""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from law import bound, error

from peftops.integrations.vllm import layers as plugin
from peftops.integrations.vllm.staged import Staged

SLOTS = 4
MOST = 12  # the largest rank, which fills no page
K = 40
WIDTHS = 24, 8, 16
CONFIG = SimpleNamespace(max_loras=SLOTS, max_lora_rank=MOST, fully_sharded_loras=False)


class Theirs:
    """What is used of vLLM's punica wrapper."""

    def __init__(
        self,
        tokens,
        batches,
        device,
        **kwargs,
    ):
        self.asked = []

    def update_metadata(
        self,
        mapping,
        names,
        *args,
    ):
        slots = [names.index(i) if i > 0 else -1 for i in mapping.index_mapping]
        self.token_lora_indices = torch.tensor(slots)
        self.sampler_indices = torch.tensor(slots[::-1])

    def add_lora_embedding(
        self,
        y,
        x,
        b,
    ):
        self.asked.append(x)


class Layer:
    """What is used of vLLM's linear layers: stacks, and how they are filled."""

    def __init__(self, dtype=torch.float32):
        self.output_slices = WIDTHS
        self.lora_config = CONFIG
        self.lora_a_stacked = tuple(
            torch.zeros(SLOTS, 1, MOST, K, dtype=dtype) for _ in WIDTHS
        )
        self.lora_b_stacked = tuple(
            torch.zeros(SLOTS, 1, n, MOST, dtype=dtype) for n in WIDTHS
        )

    def reset_lora(self, slot):
        for stack in (*self.lora_a_stacked, *self.lora_b_stacked):
            stack[slot] = 0

    def set_lora(
        self,
        slot,
        lora_a,
        lora_b,
    ):
        self.reset_lora(slot)
        for part, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
            if a is not None:
                self.lora_a_stacked[part][slot, 0, : a.shape[0]].copy_(a)
                self.lora_b_stacked[part][slot, 0, :, : b.shape[1]].copy_(b)


def wrapper(dtype=torch.float32, tokens=64):
    made = plugin.extended(Theirs)(
        tokens, 8, device=torch.device("cpu"), lora_config=CONFIG
    )
    made.dtype = dtype
    return made


def routed(shared, *ids):
    """Lets rows have the adapters with these ids; the id of slot s is 10 + s."""
    mapping = SimpleNamespace(index_mapping=ids, prompt_mapping=ids)
    names = [10 + slot for slot in range(SLOTS)]
    shared.update_metadata(mapping, names, SLOTS + 1, 100)


def adapter(
    *ranks,
    dtype=torch.float32,
    seed=0,
):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    a = [normal(r, K) if r else None for r in ranks]
    b = [normal(n, r) if r else None for n, r in zip(WIDTHS, ranks, strict=True)]
    return a, b


def exact(
    y,
    x,
    slots,
    adapters,
):
    """y plus each row's update, in the dtype of y."""
    out = y.clone()
    for row, slot in enumerate(slots):
        begin = 0
        for n, a, b in zip(WIDTHS, *adapters.get(slot, ([None] * 3,) * 2), strict=True):
            if a is not None:
                h = a.to(y.dtype) @ x[row]
                out[row, begin : begin + n] += b.to(y.dtype) @ h
            begin += n
    return out


def added(
    layer,
    served,
    m,
    dtype=torch.float32,
):
    """What the layer makes of rows of numbers, and what it began with."""
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, K, generator=generator).to(dtype)
    y = torch.randn(m, sum(WIDTHS), generator=generator).to(dtype)
    out = y.clone()
    with torch.inference_mode():
        served.add_lora_linear(
            out, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, WIDTHS
        )
    return out, y, x


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "m",
    [
        7,
        60,
    ],
)
def test_each_row_gets_the_update_of_its_slot(m, dtype):
    shared = wrapper(dtype)
    layer = Layer(dtype)
    served = plugin.Linear(shared, layer)
    adapters = {
        0: adapter(12, 5, 1, dtype=dtype),
        1: adapter(3, 0, 12, dtype=dtype, seed=1),
        3: adapter(8, 8, 8, dtype=dtype, seed=3),
    }
    for slot, (a, b) in adapters.items():
        layer.set_lora(slot, a, b)
    slots = [(-1, 0, 3, 1)[row * 3 % 4] for row in range(m)]
    routed(shared, *[10 + slot if slot >= 0 else 0 for slot in slots])
    out, y, x = added(layer, served, m, dtype)
    truth = exact(y.double(), x.double(), slots, adapters)
    same = exact(y, x, slots, adapters)
    assert error(out, truth) <= bound(same, truth)
    base = torch.tensor(slots) < 0
    assert torch.equal(out[base], y[base])


def test_stacks_stay_what_vllm_makes_of_them():
    plain = Layer()
    layer = Layer()
    plugin.Linear(wrapper(), layer)
    for other in (plain, layer):
        other.set_lora(2, *adapter(12, 5, 1))
        other.set_lora(1, *adapter(4, 4, 0))
        other.reset_lora(1)
    for name in ("lora_a_stacked", "lora_b_stacked"):
        stacks, expected = getattr(layer, name), getattr(plain, name)
        assert isinstance(stacks, tuple) and len(stacks) == len(WIDTHS)
        assert all(map(torch.equal, stacks, expected))


def test_ranks_are_those_of_the_adapter_that_a_slot_has_now():
    layer = Layer()
    served = plugin.Linear(wrapper(), layer)
    layer.set_lora(2, *adapter(12, 5, 1))
    assert served.rank[:, 2].tolist() == [12, 5, 1]
    layer.set_lora(2, *adapter(3, 0, 2))
    assert served.rank[:, 2].tolist() == [3, 0, 2]
    layer.reset_lora(2)
    assert not served.rank.any()
    served.note(1, torch.ones(7, K))  # vLLM splits it for the parts
    assert served.rank[:, 1].tolist() == [7, 7, 7]
    served.note(1, [torch.ones(3, K), torch.ones(7, K)])
    assert served.rank[:, 1].tolist() == [7, 7, 7]


def test_a_batch_of_the_base_alone_costs_nothing(monkeypatch):
    shared = wrapper()
    layer = Layer()
    served = plugin.Linear(shared, layer)
    layer.set_lora(0, *adapter(12, 5, 1))
    routed(shared, 0, 0, 0)
    monkeypatch.setattr(plugin, "multi_add_", None)
    out, y, _ = added(layer, served, 3)
    assert torch.equal(out, y)


def test_rows_of_an_earlier_batch_are_forgotten():
    shared = wrapper()
    routed(shared, 10, 11, 13, 10)
    routed(shared, 12, 0)
    assert shared.rows.tolist() == [2] + [-1] * 63
    assert shared.present == {2}


class HeadLayer(Layer):
    """What is used of vLLM's layer for logits."""

    def __init__(self):
        super().__init__()
        self.lora_a_stacked = self.lora_a_stacked[0]
        self.lora_b_stacked = self.lora_b_stacked[0]

    def reset_lora(self, slot):
        self.lora_a_stacked[slot] = 0
        self.lora_b_stacked[slot] = 0

    def set_lora(
        self,
        slot,
        a,
        b,
    ):
        self.reset_lora(slot)
        self.lora_a_stacked[slot, 0, : a.shape[0]].copy_(a)
        self.lora_b_stacked[slot, 0, :, : b.shape[1]].copy_(b)


@pytest.mark.parametrize(
    "wide",
    [
        torch.float32,
        torch.float64,
    ],
    ids=str,
)
def test_logits_have_the_adapters_of_their_rows(wide, monkeypatch):
    """Also where logits are in another dtype, and padded."""
    shared = wrapper()
    layer = HeadLayer()
    served = plugin.Head(shared, layer)
    (a, *_), (b, *_) = adapter(5, 1, 1)
    layer.set_lora(SLOTS - 1, a, b)
    routed(shared, 0, 0, 10 + SLOTS - 1)  # here the first row of logits has it
    y = torch.randn(3, WIDTHS[0] + 4).to(wide)
    x = torch.randn(3, K)
    with torch.inference_mode():
        out = served.add_lora_logits(y.clone(), x, None, None, 1.0)
    delta = b.double() @ (a.double() @ x[0].double())
    assert torch.equal(out[1:], y[1:]) and torch.equal(out[:, -4:], y[:, -4:])
    assert error(out[0, :-4] - y[0, :-4], delta) < 1e-5
    layer.reset_lora(SLOTS - 1)
    monkeypatch.setattr(plugin, "multi_add_", None)
    assert served.add_lora_logits(y, x, None, None, 1.0) is y


def test_the_embedding_is_vllms_and_only_of_rows_that_have_one():
    shared = wrapper()
    layer = Layer()
    served = plugin.Embedding(shared, layer)
    y, x = torch.ones(3, 5), torch.ones(3, 2)
    routed(shared, 0, 10, 11)
    layer.set_lora(2, *adapter(1, 1, 1))  # no row has this slot
    assert served.add_lora_embedding(y, x, None) is y and not shared.asked
    layer.set_lora(1, *adapter(1, 1, 1))
    served.add_lora_embedding(y, x, None)
    assert shared.asked[0][:, 0].tolist() == [0, 1, 1]
    assert served.rows is shared.rows  # all else is the wrapper's


@pytest.mark.parametrize(
    "change",
    [
        {"lora_config": SimpleNamespace(fully_sharded_loras=True)},
        {"output_slices": (24, 24)},
        {"lora_a_stacked": Layer(torch.bfloat16).lora_a_stacked},
        {"lora_a_stacked": tuple(torch.zeros(SLOTS, 1, r, K) for r in (12, 12, 8))},
    ],
    ids=["sharded", "other parts", "other dtype", "other ranks"],
)
def test_layers_that_stay_with_vllm(change):
    layer = Layer()
    assert plugin.can_serve(layer, torch.float32)
    vars(layer).update(change)
    assert not plugin.can_serve(layer, torch.float32)


def test_a_staged_adapter_is_two_files_that_are_gone_afterwards():
    staged = Staged(7, json.dumps({"r": 4}), b"tensors")
    files = len(os.listdir("/proc/self/fd"))
    with staged.folder() as folder:
        with open(os.path.join(folder, "adapter_model.safetensors"), "rb") as file:
            assert file.read() == b"tensors"
        with open(os.path.join(folder, "adapter_config.json")) as file:
            assert json.load(file) == {"r": 4}
        assert os.path.isfile(os.path.join(folder, "adapter_model.safetensors"))
    assert not os.path.exists(folder)
    assert len(os.listdir("/proc/self/fd")) == files
