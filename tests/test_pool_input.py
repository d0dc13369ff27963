"""AdapterPool's errors for input that no file can hold, or that only its numbers show."""

import pytest
import torch
from adapters import PLAIN, save
from test_pool_files import (
    AQ,
    BV,
    FIELDS,
    SOURCE,
    Tiny,
    check_served,
    offer,
    pool_of,
    state_of,
)
from torch import nn

import peftops

pytestmark = pytest.mark.usefixtures("one_thread")
HUGE = 10**400
WRONG = [  # changed tensors, changed fields, the error and what it says
    ({}, {"lora_alpha": HUGE}, ValueError, "lora_alpha must be a finite number"),
    ({}, {"alpha_pattern": {"q_proj": HUGE}}, ValueError, "alpha_pattern must be"),
    ({}, {"lora_alpha": 1e300}, ValueError, "has a scaling of more than 3.4e"),
    ({AQ: SOURCE[AQ].double() * 1e300}, {}, ValueError, "lora_A"),
    ({}, {"rank_pattern": {7: 4}}, ValueError, "rank_pattern must be an object"),
    ({7: SOURCE[AQ]}, {}, TypeError, "a key must be a text, got 7"),
    ({AQ: [1.0]}, {}, TypeError, "must be a tensor, got list"),
    ({"foo\n\x1b[2J": SOURCE[AQ]}, {}, ValueError, r"foo\\n\\x1b\[2J is no LoRA"),
    ({}, {"target_modules": [], "target_parameters": ["q_proj"]}, ValueError, "of no"),
]


@pytest.fixture
def pool():
    """A pool that serves "anna" and "bert"."""
    pool = pool_of(Tiny())
    pool.load("anna", SOURCE, FIELDS)
    pool.load("bert", SOURCE, FIELDS)
    return pool


@pytest.mark.parametrize(
    "entrance",
    [
        "load",
        "replace",
    ],
)
@pytest.mark.parametrize("tensors, fields, error, text", WRONG)
def test_one_error_and_nothing_changes(
    pool,
    entrance,
    tensors,
    fields,
    error,
    text,
):
    before = state_of(pool), pool.stats()
    with pytest.raises(error, match=text) as raised:
        offer(pool, entrance, SOURCE | tensors, FIELDS | fields)
    assert str(raised.value).isprintable()
    assert (state_of(pool), pool.stats()) == before


@pytest.mark.parametrize("change", ["to_sparse", "to_mkldnn", "meta"])
def test_a_tensor_without_dense_values(pool, change):
    t = SOURCE[AQ].to("meta") if change == "meta" else getattr(SOURCE[AQ], change)()
    with pytest.raises(TypeError, match=r"lora_A\.weight must be a dense"):
        pool.load("new", SOURCE | {AQ: t}, FIELDS)


def test_an_embedding_is_no_linear_layer(pool):
    tensors = {key: t for key, t in SOURCE.items() if ".q_proj." not in key}
    module = AQ.removesuffix("lora_A.weight")
    tensors[f"{module}lora_embedding_A"] = torch.zeros(4, 8)
    tensors[f"{module}lora_embedding_B"] = torch.zeros(6, 4)
    with pytest.raises(ValueError, match="lora_embedding_A is of no layer"):
        pool.load("new", tensors, FIELDS)


def test_numbers_that_16_bit_pages_cannot_hold():
    pool = pool_of(Tiny().half())
    pool.load("anna", SOURCE, FIELDS)
    with pytest.raises(ValueError, match=r"lora_B.weight holds a number of more than"):
        pool.load("new", SOURCE | {BV: SOURCE[BV] + 1e5}, FIELDS)


def test_adapters_of_one_kind_are_told_apart_by_what_differs(pool, tmp_path):
    """One has other numbers, one another scaling, one a broken number."""
    other = {key: 2 * t.numpy() for key, t in SOURCE.items()}
    broken = other | {AQ: other[AQ] * float("nan")}
    pool.load("first", save(tmp_path / "first", PLAIN))
    (kind,) = pool.store.folders.kinds
    pool.load("second", save(tmp_path / "second", other))
    assert [*pool.store.folders.kinds] == [kind]
    assert check_served(pool, "second", {k: 2 * t for k, t in SOURCE.items()}, FIELDS)
    with pytest.raises(ValueError, match=r"third: .* holds NaN"):
        pool.load("third", save(tmp_path / "third", broken))
    pool.load("fourth", save(tmp_path / "fourth", other, lora_alpha=24))
    fields = FIELDS | {"lora_alpha": 24}
    assert check_served(pool, "fourth", {k: 2 * t for k, t in SOURCE.items()}, fields)
    assert len(pool.store.folders.kinds) == 2


class Tied(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(8, 6)
        self.v_proj = self.q_proj

    def forward(self, x):
        return self.q_proj(x) + self.v_proj(x)


def test_a_layer_of_two_names_has_one_adapter():
    model = Tied()
    pool = peftops.AdapterPool(model, memory="1MB", max_rank=8)
    tensors = {}
    for name in ("q_proj", "v_proj"):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(4, 8)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(6, 4)
    with pytest.raises(ValueError, match="are of one layer"):
        pool.load("both", tensors, FIELDS)
    pool.load("one", dict([*tensors.items()][2:]), FIELDS)
    x = torch.ones(1, 8)
    with pool.use(["one"]), torch.no_grad():
        difference = model(x) - 2 * model.q_proj.base_layer(x)
    assert error_free(difference, 2 * 2 * 8 * 4)
    pool.close()
    assert model.q_proj is model.v_proj


def error_free(t, value):
    return torch.equal(t.round(decimals=3), torch.full_like(t, value))


def test_other_arguments(pool, tmp_path):
    with pytest.raises(ValueError, match="there is no folder x"):
        pool.register("new", "x" * 300)
    with pytest.raises(TypeError, match="config must be None with a folder"):
        pool.load("new", tmp_path, FIELDS)
    with pytest.raises(TypeError, match="source must be a folder or a dict"):
        pool.load("new", 7)
    with pytest.raises(TypeError, match="config must be a LoraConfig or a dict"):
        pool.load("new", SOURCE)
    with pytest.raises(ValueError, match="non-existing adapter"), pool.use([7]):
        pass
    assert pool.names() == ["anna", "bert"]


@pytest.mark.parametrize(
    "options",
    [
        {"max_rank": 0},
        {"memory": 100},
        {"memory": "x"},
    ],
)
def test_arguments_of_the_pool(options):
    with pytest.raises(ValueError, match=f"AdapterPool: {next(iter(options))} must"):
        peftops.AdapterPool(Tiny(), **options)


def test_more_memory_than_there_is():
    model = Tiny()
    with pytest.raises(MemoryError, match="of memory cannot be had"):
        peftops.AdapterPool(model, memory=1 << 55)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert type(model.model["layers"][0]["self_attn"]["q_proj"]) is nn.Linear


def test_models_that_have_no_pool():
    for options, text in [
        ({"target_modules": ["nothing"]}, r"\['nothing'\] match no linear layer"),
        ({"dtype": torch.float16}, "dtype must be torch.float32"),
    ]:
        with pytest.raises(ValueError, match=text):
            peftops.AdapterPool(Tiny(), memory="1MB", **options)
    with pytest.raises(ValueError, match="must be on one device, got meta"):
        peftops.AdapterPool(Tiny().to("meta"), memory="1MB")


def test_hooks_that_come_after_dora(pool):
    """The norm would need the weight, of which the layer may make something else by now."""
    tensors = dict(SOURCE)
    for key in SOURCE:
        if key.endswith("A.weight"):
            tensors[key.replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(
                6
            )
    pool.load("dora", tensors, FIELDS | {"use_dora": True})
    layer = pool.store.layers.each[0]
    layer.base_layer.register_forward_hook(lambda module, args, y: y + 1)
    x = torch.ones(1, 2, 8)
    with pool.use(["anna"]):
        pool.model(x)
    with (
        pytest.raises(RuntimeError, match="must be readable, got one with hooks"),
        pool.use(["dora"]),
    ):
        pool.model(x)
