"""Layers with use_dora: numbers, compilation, training; test_dora_gain.py tests their gain."""

import copy

import pytest
import ranks
import torch
from law import bound, error
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import peftops.functional as F
from peftops.nn import LinearNF4, LoRALinear
from peftops.reference.nf4 import decode

pytestmark = pytest.mark.usefixtures("one_thread")
BASES = {
    "dense": lambda dtype: nn.Linear(64, 48, dtype=dtype),
    "nf4": lambda dtype: LinearNF4.from_linear(nn.Linear(64, 48, dtype=dtype)),
}


def layer(base="dense", dtype=torch.float32, **options):
    torch.manual_seed(0)
    defaults = {"lora_alpha": 6, "init_lora_weights": False, "use_dora": True}
    new = LoRALinear(BASES[base](dtype), 4, **defaults | options)
    with torch.no_grad():
        magnitude(new).mul_(torch.linspace(0.5, 2, 48))
    return new


def magnitude(layer):
    return layer.lora_magnitude_vector["default"].weight


def gain(layer):
    return layer.lora_magnitude_vector["default"].gain


def step(layer, optimizer, x=None):
    optimizer.zero_grad()
    x = torch.randn(5, 64, dtype=torch.float32) if x is None else x
    layer(x).square().sum().backward()
    optimizer.step()


def sgd(layer, rate=1e-3):
    return torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], rate)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("mode, p", [("lora", 0.3), ("peft", 0.3), ("peft", 0.0)])
def test_is_the_function(mode, p, base):
    new = layer(base, lora_dropout=p, dropout_mode=mode)
    x = torch.randn(70, 64)
    torch.manual_seed(1)
    y = new(x)
    torch.manual_seed(1)
    weight, a, b, scaling = new.operands("default")
    bias = new.base_layer.bias
    options = {"scaling": scaling, "dropout_p": p, "dropout_mode": mode}
    assert torch.equal(
        y, F.dora_linear(x, weight, a, b, magnitude(new), bias, **options)
    )


@pytest.mark.parametrize("base", BASES)
def test_in_fp64_it_is_exact(base):
    new = layer(base)
    x = torch.randn(5, 64)
    y = new(x)
    new.double()
    _, a, b, _ = new.operands("default")
    w, a, b = (tensor.detach().double() for tensor in (new.base_layer.weight, a, b))
    if base == "nf4":
        codes = new.base_layer.base(torch.float64)
        w = decode(codes.tensors, codes.block, 48 * 64).view(48, 64)
    w = w + new.scaling * b @ a
    exact = x.double() @ (w * (magnitude(new).double() / w.norm(dim=1))[:, None]).T
    exact = (exact + new.base_layer.bias.double()).detach()
    out = new(x.double())
    assert out.dtype is torch.float64
    assert error(out, exact) < bound(y, exact) / 1e6


def test_starts_as_its_base_does():
    base = nn.Linear(64, 48)
    new, x = LoRALinear(base, 4, lora_alpha=8, use_dora=True), torch.randn(3, 5, 64)
    expected = base(x)
    assert error(new(x), expected.double()) <= 2 * bound(expected, expected.double())
    assert [name for name, p in new.named_parameters() if p.requires_grad] == [
        "lora_A.default.weight",
        "lora_B.default.weight",
        "lora_magnitude_vector.default.weight",
    ]
    assert "lora_magnitude_vector.default.gain" not in new.state_dict()


@pytest.mark.parametrize("base", BASES)
def test_one_graph_for_all_steps(base):
    torch._dynamo.reset()  # earlier tests have compiled graphs, which would be reused
    counter = CompileCounterWithBackend("aot_eager")
    new = layer(base, lora_dropout=0.1)
    compiled = torch.compile(new, fullgraph=True, backend=counter)
    optimizer = sgd(new, 0.1)
    x = torch.randn(70, 64)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(x).square().sum().backward()
        optimizer.step()
        new.lora_A["default"].weight.data.add_(0.1)  # which no version counter shows
    assert counter.frame_count == 1
    torch.manual_seed(4)
    y = compiled(x)
    torch.manual_seed(4)
    expected = new(x)
    assert error(y, expected.double()) <= bound(expected, expected.double())


@pytest.mark.parametrize("cast", ["to", "data"])
def test_a_magnitude_learns_in_bf16(cast):
    """A relative step of 1e-4 does not change a bf16 number.

    Trainers that cast every parameter have frozen the magnitude in this way (trl#7268).
    """
    new = layer(dtype=torch.bfloat16, lora_dropout=0.0)
    if cast == "to":
        new.to(torch.bfloat16)
    else:
        for p in new.parameters():
            p.data = p.data.to(torch.bfloat16)
    stock = magnitude(new).detach().bfloat16()
    new(torch.randn(5, 64).bfloat16())
    optimizer = torch.optim.SGD([magnitude(new)], 1.0)
    start = magnitude(new).detach().clone()
    for _ in range(20):
        magnitude(new).grad = start.abs() * 1e-4
        optimizer.step()
        stock -= (start.abs() * 1e-4).bfloat16()
    assert torch.equal(stock, start.bfloat16())
    moved = (start - magnitude(new).detach()) / start.abs()
    assert magnitude(new).dtype is torch.float32 and ((moved - 2e-3).abs() < 1e-5).all()


def test_a_magnitude_is_widened_after_a_step_of_its_optimizer():
    new = layer(dtype=torch.bfloat16, lora_dropout=0.0)
    for p in new.parameters():
        p.data = p.data.to(torch.bfloat16)
    optimizer = torch.optim.AdamW([magnitude(new)], 1e-3)
    magnitude(new).grad = torch.ones_like(magnitude(new))
    optimizer.step()
    new(torch.randn(5, 64).bfloat16()).sum().backward()
    optimizer.step()
    state = optimizer.state[magnitude(new)]
    assert magnitude(new).dtype is state["exp_avg"].dtype is torch.float32
    assert magnitude(new).isfinite().all()


def test_learns():
    new = layer(lora_dropout=0.1, init_lora_weights=True)
    x, target = torch.randn(64, 64), torch.randn(64, 48)
    optimizer = torch.optim.Adam(new.parameters(), 0.02)
    start = magnitude(new).detach().clone()
    losses = []
    for _ in range(40):
        loss = (new(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0] and not torch.equal(
        start, magnitude(new).detach()
    )


def test_in_double():
    new = layer(lora_dropout=0.0)
    x = torch.randn(70, 64)
    same = new(x)
    exact = copy.deepcopy(new).double()(x.double())
    assert exact.dtype is torch.float64 and error(same, exact) < 1e-5
    assert magnitude(new.double()).dtype is torch.float64


def test_bad_options_are_named():
    with pytest.raises(
        ValueError, match="LoRALinear: lora_bias must be False with use_dora, got True"
    ):
        layer(lora_bias=True)
    with pytest.raises(
        ValueError, match="LoRALinear: dropout_mode must be peft or lora, got 'none'"
    ):
        layer(dropout_mode="none")


SHARDED = """
from torch.distributed.fsdp import fully_shard
from peftops.nn import LinearNF4, LoRALinear
from peftops.reference.nf4 import decode

def train(model, x):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model(x)

def work(rank):
    for make in (lambda: nn.Linear(64, 48), lambda: LinearNF4.from_linear(nn.Linear(64, 48))):
        options = {"lora_alpha": 6, "use_dora": True, "init_lora_weights": False}
        model = nn.Sequential(LoRALinear(make(), 4, **options))
        x = torch.randn(80, 64)
        sharded = copy.deepcopy(model)
        expected = train(model, x)
        for layer in (*sharded, sharded):
            fully_shard(layer)
        y = train(sharded, x)
        assert torch.equal(y, expected), rank
        for p, q in zip(sharded.parameters(), model.parameters(), strict=True):
            assert torch.equal(p.full_tensor(), q), rank
        layer = sharded[0]
        with torch.no_grad():
            sharded(x)
            layer.lora_B["default"].weight.add_(0.1)
            model[0].lora_B["default"].weight.add_(0.1)
            assert torch.equal(sharded(x[:1]), model(x[:1])), rank
"""


def test_fsdp2_computes_norms_of_what_it_gathers(tmp_path):
    assert ranks.run("import copy\n" + SHARDED, tmp_path) == ""
