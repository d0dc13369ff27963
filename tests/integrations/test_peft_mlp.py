"""mlp.fuse(model): a SwiGLU of three LoRA layers as one operation. 6 seconds."""

import copy
import io
import logging
import re

import pytest
import torch
from law import chain_bound, error, orders
from peftops.bench.model import saved
from torch import nn
from torch.nn import functional

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from tiny import Net, adapted, exactly, install_our_mask, logits, pass_of, step, tiny

import peftops
from peftops.integrations.peft import FUSED, mlp
from peftops.integrations.peft.mlp import FusedMLP
from peftops.nn import LinearNF4

pytestmark = pytest.mark.usefixtures("one_thread")
K, N = 64, 96


class Gated(nn.Module):
    """down(silu(gate(x)) ⊙ up(x)), with names that do not say which is which."""

    def __init__(self, k=K, n=N, linear_class=nn.Linear, act=nn.SiLU, **options):
        super().__init__()
        self.w1 = linear_class(n, k, **options)
        self.w2 = linear_class(k, n, **options)
        self.w3 = linear_class(k, n, **options)
        self.act = act()

    def forward(self, x):
        return self.w1(self.act(self.w3(x)) * self.w2(x))


def gated(
    block=Gated,
    autocast_adapter_dtype=True,
    targets=("w1", "w2", "w3"),
    config=None,
    **options,
):
    """A LoRA model of one block under the name lin."""
    torch.manual_seed(0)
    net = Net(block(**options))
    return adapted(
        net,
        autocast_adapter_dtype,
        target_modules=list(targets),
        **config or {},
    )


def fused(model, strict=False):
    return mlp.fuse(peftops.patch(model), strict=strict)


def mlp_of(model):
    return model.base_model.model.lin


def assert_same_bits(model, x, autocast=None, mlps=None):
    """Compares the model with its MLPs fused with the same model layer by layer."""
    by_layers = peftops.patch(copy.deepcopy(model))
    whole = fused(model)
    expected = pass_of(by_layers, x, autocast)
    out = pass_of(whole, x, autocast)
    assert all(map(torch.equal, out, expected))
    assert [t.dtype for t in out] == [t.dtype for t in expected]
    assert mlp.calls(whole) == (mlps or {FUSED: 1})
    assert peftops.report(whole).calls == peftops.report(by_layers).calls


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16, "autocast_adapter_dtype": False},
        {"dtype": torch.float16, "autocast_adapter_dtype": False},
        {"autocast": torch.bfloat16},
        {"dtype": torch.bfloat16, "autocast": torch.bfloat16},
    ],
    ids=["fp32", "bf16", "fp16", "autocast", "autocast-bf16"],
)
def test_a_step_is_stock(options, p, monkeypatch):
    install_our_mask(monkeypatch)
    options = dict(options)
    autocast = options.pop("autocast", None)
    model = tiny(
        lora_dropout=p,
        lora_bias=True,
        **options,
    )
    exact = step(exactly(model))
    same = orders(lambda: step(model, autocast))
    by_layers = peftops.patch(copy.deepcopy(model))
    whole = fused(copy.deepcopy(model), strict=True)
    out = step(whole, autocast)
    unfused = step(by_layers, autocast)
    for ours, truth, *draws in zip(out, exact, *same, strict=True):
        assert error(ours, truth) <= chain_bound(draws, truth)
    assert torch.equal(out[0], unfused[0])
    assert all(map(torch.equal, out[1], unfused[1]))
    assert mlp.calls(whole) == {FUSED: 2}
    assert peftops.report(whole).calls == {FUSED: 14}
    assert torch.equal(logits(whole.eval()), logits(by_layers.eval()))


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("linear_class", [nn.Linear, LinearNF4])
def test_bases_and_rows(linear_class, autocast, rows):
    dtype = torch.bfloat16 if autocast else torch.float32
    model = gated(
        linear_class=linear_class,
        dtype=dtype,
        config={"lora_dropout": 0.3 if rows == 3 else 0.0},
    )
    if linear_class is LinearNF4:
        for layer in mlp_of(model).children():
            if isinstance(layer, peft.tuners.lora.Linear):
                layer.base_layer.quantize(
                    torch.randn(layer.out_features, layer.in_features)
                )
    assert_same_bits(model, torch.randn(2, rows, K, dtype=dtype), autocast)


def test_what_needs_no_gradient_gets_none():
    for trained in ((), ("w3",), ("w1",), ("w2", "w3")):
        by_layers = peftops.patch(gated())
        whole = fused(gated())
        for x in (torch.randn(3, K), torch.randn(3, K, requires_grad=True)):
            grads = []
            for model in (by_layers, whole):
                for name, parameter in model.named_parameters():
                    is_trained = "lora" in name and any(
                        f".{w}." in name for w in trained
                    )
                    parameter.requires_grad_(is_trained)
                    parameter.grad = None
                x.grad = None
                y = model(x)
                assert y.requires_grad == (bool(trained) or x.requires_grad)
                if y.requires_grad:
                    y.sum().backward()
                grads.append(
                    [x.grad, *(parameter.grad for parameter in model.parameters())]
                )
            for ours, theirs in zip(*grads, strict=True):
                assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_keeps_half_of_what_lies_between_the_layers(p):
    model = gated(config={"lora_dropout": p})
    x = torch.randn(100, K)
    by_layers = peftops.patch(copy.deepcopy(model))
    whole = fused(model)
    before, after = (
        saved(each, lambda each=each: each(x).sum().backward())
        for each in (by_layers, whole)
    )
    assert before - after == 2 * 100 * N * 4  # silu and product
    assert after >= 2 * 100 * N * 4  # gate and up


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    model = fused(tiny(lora_dropout=0.3))
    expected = step(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    out = step(model)
    assert torch.equal(out[0], expected[0])
    assert all(map(torch.equal, out[1], expected[1]))
    assert mlp.calls(model) == {FUSED: 6}


def test_backward_twice_and_nothing_kept_after():
    model = fused(gated())
    y = model(torch.randn(70, K)).sum()
    grads = [
        torch.autograd.grad(
            y, list(mlp_of(model).w1.lora_A.parameters()), retain_graph=keep
        )
        for keep in (1, 0)
    ]
    assert torch.equal(grads[0][0], grads[1][0])
    nodes = y.grad_fn.next_functions[0][0].layers
    assert not any("saved_tensors" in vars(node) for node in nodes)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


FALLBACKS = {
    "DoRA": lambda model: None,
    "merged": lambda model: mlp_of(model).w2.merge(),
    "adapters disabled": lambda model: mlp_of(model).w1.enable_adapters(False),
    "hooks on a part": lambda model: mlp_of(model).w3.register_forward_hook(
        lambda module, args, y: 2 * y
    ),
    "hooks on a part ": lambda model: mlp_of(model).act.register_forward_hook(
        lambda module, args, y: 2 * y
    ),
    "its parts have changed": lambda model: setattr(mlp_of(model), "act", nn.Tanh()),
    "a layer is not patched": lambda model: peftops.unpatch(mlp_of(model).w2),
    "dropout of several active adapters": lambda model: (
        model.add_adapter(
            "other",
            peft.LoraConfig(
                r=2,
                init_lora_weights=False,
                lora_dropout=0.3,
                target_modules=["w1"],
            ),
        ),
        model.base_model.set_adapter(["default", "other"]),
    ),
    "a base's own product": lambda model: mlp_of(
        model
    ).w1.base_layer.register_forward_hook(lambda *args: None),
    "base weight is trained": lambda model: mlp_of(
        model
    ).w3.base_layer.weight.requires_grad_(),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_falls_back_to_the_layers_by_call(reason):
    by_layers = peftops.patch(gated(config={"use_dora": reason == "DoRA"}))
    whole = fused(copy.deepcopy(by_layers))
    for model in (by_layers, whole):
        torch.manual_seed(2)
        FALLBACKS[reason](model)
    x = torch.randn(5, K)
    assert all(map(torch.equal, pass_of(whole, x), pass_of(by_layers, x)))
    assert mlp.calls(whole) == {reason.strip(): 1}


def test_a_cast_between_the_layers_falls_back():
    model = gated(linear_class=LinearNF4, compute_dtype=torch.bfloat16)
    for layer in (mlp_of(model).w1, mlp_of(model).w2, mlp_of(model).w3):
        layer.base_layer.quantize(torch.randn(layer.out_features, layer.in_features))
    assert_same_bits(
        model, torch.randn(5, K), torch.bfloat16, {"a layer casts its result": 1}
    )


def test_compiled_it_runs_by_layers():
    torch._dynamo.reset()
    model = gated()
    x = torch.randn(70, K)
    expected = pass_of(peftops.patch(copy.deepcopy(model)), x)
    whole = fused(model)
    out = pass_of(torch.compile(whole, backend="aot_eager", fullgraph=True), x)
    assert all(map(torch.equal, out, expected))
    assert mlp.calls(whole) == {}


class Residual(Gated):
    def forward(self, x):
        return x + super().forward(x)


class Clamped(Gated):
    def forward(self, x):
        return self.w1(self.act(self.w3(x)).clamp(max=7) * self.w2(x))


class Dropping(Gated):
    def forward(self, x):
        return self.w1(
            functional.dropout(self.act(self.w3(x)) * self.w2(x), 0.1, self.training)
        )


class Narrow(Gated):
    def forward(self, x):
        return self.w1(self.act(self.w3(x)) * self.w2(x).chunk(2, -1)[0])


class Pair(Gated):
    def forward(self, x):
        return super().forward(x), None


class Weighted(Gated):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


OTHERS = {
    block.__name__: {"block": block}
    for block in (Residual, Clamped, Dropping, Narrow, Pair, Weighted)
} | {
    "another activation": {"act": nn.GELU},
    "fewer layers": {"targets": ("w1", "w2")},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_what_computes_something_else_stays(options, caplog):
    model = gated(**options)
    random_state = torch.get_rng_state()
    mlp_class = type(mlp_of(model))
    with pytest.raises(
        ValueError,
        match=r"^fuse: no module computes down\(silu\(gate\(x\)\) \* up\(x\)\) of three",
    ):
        fused(copy.deepcopy(model), strict=True)
    caplog.set_level(logging.INFO, "peftops")
    assert type(mlp_of(fused(model))) is mlp_class
    messages = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert ("WARNING", "0 MLPs fused") in messages
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("n", [N, K])
def test_gate_up_and_down_are_known_by_what_they_do(n):
    """Also where all three have one shape."""
    model = fused(gated(n=n), strict=True)
    assert type(mlp_of(model))._peftops[:2] == (Gated, ("w3", "w2", "w1"))
    assert_same_bits(gated(n=n), torch.randn(5, K))


def test_strict_names_the_module_and_changes_nothing():
    model = peftops.patch(gated(config={"use_dora": True}))
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(
        ValueError, match=re.escape("fuse: base_model.model.lin cannot be fused: DoRA")
    ):
        fused(model, strict=True)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_copies_and_pickles_and_saves_what_stock_saves(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "stock")
    fused(model).save_pretrained(tmp_path / "fused")
    for file in (tmp_path / "stock").iterdir():
        assert file.read_bytes() == (tmp_path / "fused" / file.name).read_bytes(), (
            file.name
        )
    expected = logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(other), expected)
        assert mlp.calls(other) == {FUSED: 4}
        other.base_model.model.model.layers[0].mlp.up_proj.lora_B[
            "default"
        ].weight.data.zero_()
        assert not torch.equal(logits(other), expected)
    assert torch.equal(logits(model), expected)
    assert mlp.calls(model) == {FUSED: 4}


def test_unpatch_and_merging_give_back_what_was():
    model = tiny()
    before = {
        name: (type(module), set(vars(module)))
        for name, module in model.named_modules()
    }
    fused(fused(model))
    assert sum(isinstance(module, FusedMLP) for module in model.modules()) == 2
    step(model)
    merged = copy.deepcopy(model).merge_and_unload()
    assert {
        name: (type(module), set(vars(module)))
        for name, module in peftops.unpatch(model).named_modules()
    } == before
    expected = peftops.patch(model).merge_and_unload()
    assert torch.equal(logits(merged), logits(expected))
    assert not any(
        isinstance(module, FusedMLP) for module in peftops.unpatch(merged).modules()
    )


def test_a_second_derivative_is_refused():
    model = fused(gated())
    x = torch.randn(5, K, requires_grad=True)
    with pytest.raises(RuntimeError, match="lora_mlp: create_graph must be False"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
