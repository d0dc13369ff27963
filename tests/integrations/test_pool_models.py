"""AdapterPool on transformers' models: each sample is what PEFT gives with its adapter alone."""

import copy
import inspect
from contextlib import nullcontext
from types import MethodType

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from law import bound, chain_bound, error, orders
from mixed import NAMES, TOKENS, exact_of, several, several_in
from tiny import in_4_bits, tiny

import peftops
from peftops.nn import MultiLoRALinear

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Adapter name"),
]


def pooled(
    stock,
    folder,
    four_bits=False,
    **options,
):
    """A pool with the adapters of a PEFT model, on a copy of its base, and that copy."""
    stock.save_pretrained(folder)
    model = in_4_bits(stock) if four_bits else copy.deepcopy(stock)
    base = model.unload().eval()
    pool = peftops.AdapterPool(base, **{"memory": "1MiB", "max_rank": 16} | options)
    for name in stock.peft_config:
        pool.register(name, folder if name == "default" else folder / name)
    return pool, base


@torch.no_grad()
def served(
    pool,
    base,
    names,
    tokens=TOKENS,
):
    with pool.use(names):
        return base(input_ids=tokens).logits


def test_the_models_call_takes_names(tmp_path):
    pool, base = pooled(several(), tmp_path)
    expected = served(pool, base, NAMES)
    with torch.no_grad():
        plain = base(input_ids=TOKENS).logits
        assert torch.equal(base(TOKENS, adapter_names=NAMES).logits, expected)
        assert torch.equal(base(TOKENS).logits, plain)
        with pool.use(["c"] * 6):
            assert torch.equal(base(TOKENS, adapter_names=NAMES).logits, expected)
    assert "adapter_names" not in inspect.signature(base.forward).parameters
    pool.close()
    assert not {"forward", "generate"} & vars(base).keys()


@torch.no_grad()
def alone(
    stock,
    names,
    tokens=TOKENS,
):
    """The logits of each sample by PEFT, with its adapter as the only one."""
    stock.eval()
    rows = []
    for row, name in enumerate(names):
        if name == "__base__":
            with stock.disable_adapter():
                rows.append(stock(input_ids=tokens[row : row + 1]).logits)
        else:
            stock.set_adapter(name)
            rows.append(stock(input_ids=tokens[row : row + 1]).logits)
    return torch.cat(rows)


@pytest.mark.parametrize(
    "four_bits",
    [False, True],
    ids=[
        "dense",
        "4 bits",
    ],
)
@pytest.mark.parametrize(
    "dora",
    [
        (),
        ("default",),
        ("default", "b", "c"),
    ],
    ids=str,
)
def test_each_sample_has_its_adapter(
    dora,
    four_bits,
    tmp_path,
):
    stock = several(dora)
    pool, base = pooled(stock, tmp_path, four_bits)
    logits = served(pool, base, NAMES)
    exact = alone(exact_of(stock), NAMES)
    assert error(logits, exact) <= bound(alone(stock, NAMES), exact)


@pytest.mark.parametrize(
    "adapters",
    [
        "narrow",
        "wide",
    ],
)
@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float16,
    ],
    ids=str,
)
def test_in_16_bits(
    dtype,
    adapters,
    tmp_path,
):
    stock = several_in(dtype)
    pages = torch.float32 if adapters == "wide" else None
    pool, base = pooled(stock, tmp_path, dtype=pages)
    logits = served(pool, base, NAMES)
    exact = alone(exact_of(stock), NAMES)
    assert error(logits.float(), exact) <= bound(alone(stock, NAMES).float(), exact)


def test_under_autocast(tmp_path):
    stock = several()
    pool, base = pooled(stock, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        logits = served(pool, base, NAMES)
        same = alone(stock, NAMES)
    exact = alone(exact_of(stock), NAMES)
    assert error(logits.float(), exact) <= bound(same.float(), exact)


def test_in_fp64(tmp_path):
    stock = exact_of(several(("b",)))
    pool, base = pooled(stock, tmp_path, memory="2MiB")
    logits = served(pool, base, NAMES)
    exact = alone(stock, NAMES)
    assert error(logits.float(), exact) <= bound(exact.float(), exact)


def test_conv1d(tmp_path):
    stock = tiny("gpt2", r=5)
    pool, base = pooled(stock, tmp_path)
    names = ["default", "__base__"] * 3
    logits = served(pool, base, names)
    exact = alone(exact_of(stock), names)
    assert error(logits, exact) <= bound(alone(stock, names), exact)


def hook(layer):
    layer.register_forward_hook(lambda module, args, y: 2 * y)


def own_forward(layer):
    layer.forward = MethodType(lambda self, x: 2 * nn.Linear.forward(self, x), layer)


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def own_class(layer):
    layer.__class__ = Twice


@pytest.mark.parametrize(
    "change",
    [
        hook,
        own_forward,
        own_class,
    ],
)
def test_a_base_that_is_more_than_its_weight_is_called(change, tmp_path):
    stock = several()
    for layer in stock.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            change(layer.base_layer)
    pool, base = pooled(stock, tmp_path)
    logits = served(pool, base, NAMES)
    exact = alone(exact_of(stock), NAMES)
    assert error(logits, exact) <= bound(alone(stock, NAMES), exact)


def test_layers_that_no_sample_has_are_their_bases(tmp_path, monkeypatch):
    """Adapter b has no k_proj."""
    stock = several()
    pool, base = pooled(stock, tmp_path)
    called = []
    fused = MultiLoRALinear.fused

    def counted(self, *args):
        called.append(self)
        return fused(self, *args)

    monkeypatch.setattr(MultiLoRALinear, "fused", counted)
    served(pool, base, ["b", "__base__"] * 3)
    assert len(called) == 4
    served(pool, base, ["__base__"] * 6)
    assert len(called) == 4
    layer = base.model.layers[0].self_attn.k_proj
    assert layer not in called and isinstance(layer, MultiLoRALinear)


def input_gradients(stock, embedded):
    """The gradients of embedded rows by PEFT, each sample alone."""
    rows = []
    stock.eval()
    for row, name in enumerate(NAMES):
        x = embedded[row : row + 1].clone().requires_grad_()
        with stock.disable_adapter() if name == "__base__" else nullcontext():
            if name != "__base__":
                stock.set_adapter(name)
            stock(inputs_embeds=x).logits.square().sum().backward()
        rows.append(x.grad)
    return torch.cat(rows)


def test_gradients_reach_the_input(tmp_path):
    stock = several(("c",))
    pool, base = pooled(stock, tmp_path)
    embedded = base.get_input_embeddings()(TOKENS)
    x = embedded.clone().requires_grad_()
    with pool.use(NAMES):
        base(inputs_embeds=x).logits.square().sum().backward()
    assert not [p for p in base.parameters() if p.grad is not None]
    exact = input_gradients(exact_of(stock), embedded.double())
    draws = orders(lambda: input_gradients(stock, embedded))
    assert error(x.grad, exact) <= chain_bound(draws, exact)


def test_a_version_lasts_as_long_as_its_use(tmp_path):
    stock = several()
    pool, base = pooled(stock, tmp_path)
    tensors = peft.get_peft_model_state_dict(stock, adapter_name="b")
    before = served(pool, base, ["b"] * 6)
    halved = {key: t / 2 for key, t in tensors.items()}
    with pool.use(["b"] * 6), torch.no_grad():
        pool.replace("b", halved)
        assert torch.equal(base(input_ids=TOKENS).logits, before)
        after = served(pool, base, ["b"] * 6)
        pool.unload("b")
        assert torch.equal(base(input_ids=TOKENS).logits, before)
    assert error(after, before) > 0.01
    assert pool.stats().free_pages == pool.stats().pages
    pool.load("b", halved, stock.peft_config["b"])
    assert torch.equal(served(pool, base, ["b"] * 6), after)


@pytest.mark.parametrize(
    "count",
    [
        1,
        3,
        4,
        12,
    ],
)
def test_names_not_as_many_as_samples(count, tmp_path):
    pool, base = pooled(several(), tmp_path)
    with pytest.raises(ValueError, match="should be the same as the number of inputs"):
        served(pool, base, ["b"] * count)


def test_a_layer_without_adapters_may_have_another_batch(tmp_path):
    """As the layers of a vision tower have. Adapter b has no k_proj."""
    pool, base = pooled(several(), tmp_path)
    attention = base.model.layers[0].self_attn
    x = torch.ones(5, 3, attention.k_proj.in_features)
    with pool.use(["b", "__base__"]):
        assert torch.equal(attention.k_proj(x), attention.k_proj.base_layer(x))
        with pytest.raises(ValueError, match="but got 2 and 5"):
            attention.q_proj(x)


def test_unknown_names(tmp_path):
    pool, _ = pooled(several(), tmp_path)
    text = r"non-existing adapter\(s\): nobody, x"
    with pytest.raises(ValueError, match=text), pool.use(["b", "x", "nobody"]):
        pass
    with pytest.raises(TypeError, match="expected a list of str"), pool.use("b"):
        pass
    assert pool.stats().used == 0


def test_a_peft_model_is_refused():
    with pytest.raises(ValueError, match="without PEFT's layers"):
        peftops.AdapterPool(several())


def test_what_is_no_layer_of_the_pool():
    """The output's layer, experts of a list, and a layer whose weight is read by its owner."""
    model = tiny().unload()
    model.model.layers[0].experts = nn.ModuleList([nn.Linear(8, 8)])
    model.model.layers[0].attention = nn.MultiheadAttention(8, 2)
    pool = peftops.AdapterPool(model, memory="1MiB")
    names = {n for n, m in model.named_modules() if isinstance(m, MultiLoRALinear)}
    assert {name.rpartition(".")[2] for name in names} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    with pytest.raises(ValueError, match="has a pool already"):
        peftops.AdapterPool(model, memory="1MiB")
    pool.close()
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert "generate" not in vars(model)
    pool = peftops.AdapterPool(model, memory="1MiB", target_modules=["q_proj"])
    assert len(pool.store.layers.each) == 2
