"""adapter_names: a batch that mixes adapters gives each sample what its adapter alone would."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from law import bound, chain_bound, error, orders
from mixed import (
    NAMES,
    TOKENS,
    alone,
    exact_of,
    flat,
    gradients,
    several,
    step,
)
from peft.tuners.lora import LoraModel
from tiny import in_4_bits, lora_layers, single, tiny

import peftops

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Adapter name"),
]


def assert_as_alone(stock, ours, names=NAMES, **more):
    """ours computes a mixed batch as `stock` computes it adapter by adapter."""
    exact = alone(exact_of(stock), names)
    out = step(ours, names, **more)
    for name, grad in exact[1].items():
        assert (out[1][name] is None) == (grad is None), name
    draws = orders(lambda: flat(alone(stock, names)))
    assert error(flat(out), flat(exact)) <= chain_bound(draws, flat(exact))
    return out


@pytest.mark.parametrize("dora", [(), ("default",), ("default", "b", "c")], ids=str)
def test_a_step_is_that_of_each_adapter_alone(dora):
    stock = several(dora)
    ours = peftops.patch(copy.deepcopy(stock))
    assert_as_alone(stock, ours)
    assert set(peftops.report(ours).calls) == {"fused"}


def test_gradients_accumulate():
    ours = peftops.patch(several())
    sums = {}
    for names in (NAMES, NAMES[::-1]):
        for name, grad in step(ours, names)[1].items():
            sums[name] = grad if name not in sums else sums[name] + grad
    ours.zero_grad()
    for names in (NAMES, NAMES[::-1]):
        logits = ours(input_ids=TOKENS, adapter_names=names).logits
        logits.square().mean((1, 2)).sum().backward()
    for name, grad in gradients(ours).items():
        assert torch.equal(grad, sums[name]), name


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("names", [["c"] * 6, ["__base__", "c"] * 3], ids=str)
def test_absent_adapters_have_no_gradient(names, architecture):
    if architecture == "gpt2":
        stock = tiny("gpt2").train()
        names = ["default" if name == "c" else name for name in names]
        stock.add_adapter("b", stock.peft_config["default"])
        stock.set_requires_grad(["default", "b"])
    else:
        stock = several()
    ours = peftops.patch(copy.deepcopy(stock))
    _, grads = step(ours, names)
    for name, grad in grads.items():
        present = any(f".{adapter}." in name for adapter in names)
        assert (grad is not None) == present, name
    assert set(peftops.report(ours).calls) <= {"fused", "no active adapter"}


def test_over_4_bits():
    stock = several(("c",))
    ours = in_4_bits(stock)
    assert_as_alone(stock, peftops.patch(ours))


def test_over_a_base_that_only_its_layer_computes():
    stock = several()
    ours = copy.deepcopy(stock)
    for layer in lora_layers(ours):
        layer.base_layer.__class__ = type("Sub", (nn.Linear,), {})
    ours = peftops.patch(ours)
    assert_as_alone(stock, ours)
    assert set(peftops.report(ours).calls) == {"fused, base's own product"}


def test_under_autocast():
    stock = several(dtype=torch.bfloat16)
    ours = peftops.patch(copy.deepcopy(stock))
    exact = alone(exact_of(stock), NAMES)
    with torch.autocast("cpu", torch.bfloat16):
        out = step(ours, NAMES)
        same = alone(stock, NAMES)
    assert error(flat(out), flat(exact)) <= bound(flat(same), flat(exact))
    assert set(peftops.report(ours).calls) == {"fused"}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dora", [(), ("default", "c")], ids=str)
def test_checkpointed_blocks_keep_their_names(reentrant, dora):
    """Two forwards before one backward, of other names; the active adapters are others still."""
    plain = peftops.patch(several(dora))
    ours = copy.deepcopy(plain)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    before = [
        vars(module).get("_gradient_checkpointing_func") for module in ours.modules()
    ]
    results = []
    for model in (plain, ours):
        model.zero_grad()
        loss = sum(
            model(input_ids=TOKENS, adapter_names=names).logits.square().mean()
            for names in (NAMES, NAMES[::-1])
        )
        loss.backward()
        results.append(gradients(model))
    for name, grad in results[0].items():
        assert torch.equal(grad, results[1][name]), name
    after = [
        vars(module).get("_gradient_checkpointing_func") for module in ours.modules()
    ]
    assert all(a is b for a, b in zip(before, after, strict=True))


class Checkpointing(nn.Module):
    """Checkpoints its layer in a way that patch does not know."""

    def __init__(self, lin, reentrant):
        super().__init__()
        self.lin = lin
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.lin, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_lost_route_raises(reentrant):
    net = Checkpointing(nn.Linear(16, 24), reentrant)
    config = peft.LoraConfig(target_modules=["lin"], init_lora_weights=False)
    model = peft.get_peft_model(net, config)
    model.add_adapter("b", config)
    model = peftops.patch(model.train())
    x = torch.randn(4, 16, requires_grad=True)
    y = model(x, adapter_names=["b", "b", "__base__", "default"])
    with pytest.raises(
        RuntimeError, match="ran again in backward without adapter_names"
    ):
        y.sum().backward()
    model(x).sum().backward()  # a plain step works again
    peftops.unpatch(model)
    assert "_peftops_routed" not in vars(lora_layers(model)[0])


def test_dropout_is_that_of_each_adapter(monkeypatch):
    model = single(lora_dropout=0.3)
    torch.manual_seed(1)
    model.add_adapter(
        "b",
        peft.LoraConfig(
            r=3, lora_dropout=0.6, target_modules=["lin"], init_lora_weights=False
        ),
    )
    model.set_requires_grad(["default", "b"])
    names = ["b", "default", "__base__", "b", "default"]
    x = torch.randn(5, 7, 16)
    ours = peftops.patch(copy.deepcopy(model)).train()
    seed = torch.tensor([12345])
    monkeypatch.setattr(torch, "randint", lambda *args, **named: seed)
    y = ours(x, adapter_names=names)
    y.square().sum().backward()
    masks = {
        name: peftops.functional.dropout_mask(seed, 35, 16, p).view(5, 7, 16)
        for name, p in {"default": 0.3, "b": 0.6}.items()
    }
    model = exact_of(model)
    layer = model.base_model.model.lin
    rows = []
    for at, name in enumerate(names):
        row = layer.base_layer(x[at].double())
        if name != "__base__":
            kept = x[at].double() * masks[name][at] / (1 - layer.lora_dropout[name].p)
            row = row + layer.scaling[name] * layer.lora_B[name](
                layer.lora_A[name](kept)
            )
        rows.append(row)
    exact = torch.stack(rows)
    exact.square().sum().backward()
    pairs = zip(gradients(ours).values(), gradients(model).values(), strict=True)
    for out, truth in [(y, exact), *pairs]:
        assert error(out, truth) <= 1e-6


def test_dora_with_dropout_is_pefts_own():
    stock = several(("b",), lora_dropout=0.5)
    ours = peftops.patch(copy.deepcopy(stock))
    step(ours, NAMES)
    reasons = set(peftops.report(ours).calls)
    assert "DoRA with dropout, in a mixed batch" in reasons
    # without its random numbers it is what each adapter gives alone
    for model in (stock, ours):
        for layer in lora_layers(model):
            for dropout in layer.lora_dropout.values():
                dropout.eval()
    assert_as_alone(stock, ours)


@pytest.mark.parametrize("training", [True, False])
def test_bad_names_raise_as_in_peft(training):
    ours = peftops.patch(several()).train(training)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): other, some"):
        ours(input_ids=TOKENS, adapter_names=["some", "other", *NAMES[:4]])
    with pytest.raises(
        ValueError, match="Length of `adapter_names` should be the same"
    ):
        ours(input_ids=TOKENS, adapter_names=NAMES[:5])
    ours.merge_adapter(["b"])
    with pytest.raises(ValueError, match="when there are merged adapters"):
        ours(input_ids=TOKENS, adapter_names=NAMES)
    ours.unmerge_adapter()
    hooks = [len(layer._forward_pre_hooks) for layer in lora_layers(ours)]
    assert not training or set(hooks) == {0}


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("dora", [(), ("b",)], ids=str)
def test_compiled(dora, blocks):
    torch._dynamo.reset()
    ours = peftops.patch(several(dora))
    compiled = copy.deepcopy(ours)
    if blocks:
        for block in compiled.base_model.model.model.layers:
            block.compile(backend="aot_eager", fullgraph=True)
    else:
        compiled.compile(backend="aot_eager")
    for names in (NAMES, NAMES[::-1]):
        expected = step(ours, names)
        out = step(compiled, names)
        assert all(map(torch.equal, flat(out), flat(expected)))


def test_unpatch_gives_pefts_model_back():
    ours = several()
    model = peftops.patch(ours)
    assert type(model.base_model) is not LoraModel
    assert type(copy.deepcopy(model).base_model) is type(model.base_model)
    peftops.unpatch(model)
    assert type(model.base_model) is LoraModel
    with pytest.raises(ValueError, match="in training mode"):
        model(input_ids=TOKENS, adapter_names=NAMES)
