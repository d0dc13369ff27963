"""LoRALinear: it replaces nn.Linear, and has the parameters and names of PEFT's layer."""

import copy

import pytest
import torch
from law import bound, error
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import peftops.functional as F
from peftops.nn import LoRALinear

pytestmark = pytest.mark.usefixtures("one_thread")


def layer(dtype=torch.float32, base=None, **options):
    torch.manual_seed(0)
    base = base or nn.Linear(16, 24, dtype=dtype)
    defaults = {"lora_alpha": 6, "init_lora_weights": False}
    return LoRALinear(base, 4, **defaults | options)


def formula(layer, x):
    """The formula in the docstring of LoRALinear, in torch."""
    name = layer.adapter_name
    return layer.base_layer(x) + layer.scaling * layer.lora_B[name](
        layer.lora_A[name](x)
    )


def trained(module, x, call=None):
    """The output, and the gradients of x and of all parameters that have one."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = (module if call is None else call)(x)
    y.float().square().sum().backward()
    return [
        y.detach(),
        x.grad,
        *(p.grad for p in module.parameters() if p.requires_grad),
    ]


def test_is_its_base_until_trained():
    base = nn.Linear(16, 24)
    x = torch.randn(3, 5, 16)
    expected = base(x)
    exact = torch.nn.functional.linear(
        x.double(), base.weight.double(), base.bias.double()
    )
    new = LoRALinear(base, 4, lora_alpha=8)
    assert error(new(x), exact) <= bound(expected, exact)
    assert new.lora_A["default"].weight.abs().sum() > 0
    assert not new.lora_B["default"].weight.any()
    assert [name for name, p in new.named_parameters() if p.requires_grad] == [
        "lora_A.default.weight",
        "lora_B.default.weight",
    ]


@pytest.mark.parametrize(
    "options", [{}, {"lora_bias": True}, {"use_rslora": True}], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_drop_in_for_linear(bias, options):
    model = nn.Sequential(
        nn.Linear(8, 16), nn.GELU(), layer(base=nn.Linear(16, 24, bias=bias), **options)
    )
    assert model[2].scaling == (6 / 2 if "use_rslora" in options else 6 / 4)
    x = torch.randn(2, 7, 8)

    def plain(model):
        return lambda x: formula(model[2], model[1](model[0](x)))

    wide = copy.deepcopy(model).double()
    exact = trained(wide, x.double(), plain(wide))
    same = trained(model, x, plain(model))
    assert error(trained(model, x), exact) <= bound(same, exact)


def test_learns():
    model = layer(init_lora_weights=True, lora_dropout=0.1)
    x, target = torch.randn(64, 16), torch.randn(64, 24)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    losses = []
    for _ in range(40):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_dropout_is_that_of_the_seed():
    model = layer(lora_dropout=0.3)
    x = torch.randn(70, 16)
    torch.manual_seed(5)
    out = model(x)
    torch.manual_seed(5)
    keep = F.dropout_mask(torch.randint(2**62, (1,)), 70, 16, 0.3)

    def dropped(model, x):
        delta = formula(model, x * keep / 0.7) - model.base_layer(x * keep / 0.7)
        return model.base_layer(x) + delta

    exact = dropped(copy.deepcopy(model).double(), x.double())
    assert error(out, exact) <= bound(dropped(model, x), exact)
    exact = formula(copy.deepcopy(model).double(), x.double())
    assert error(model.eval()(x), exact) <= bound(formula(model, x), exact)


@pytest.mark.parametrize(
    "dtype, cast, adapter",
    [
        (torch.float32, True, torch.float32),
        (torch.bfloat16, True, torch.float32),
        (torch.float16, False, torch.float16),
    ],
    ids=str,
)
def test_dtypes(dtype, cast, adapter):
    model = layer(dtype, autocast_adapter_dtype=cast, lora_bias=True)
    parameters = *model.lora_A.parameters(), *model.lora_B.parameters()
    assert {p.dtype for p in parameters} == {adapter}
    wide = copy.deepcopy(model).double()
    narrow = copy.deepcopy(model).to(dtype)
    x = torch.randn(70, 16, dtype=dtype)
    exact = trained(wide, x.double(), lambda x: formula(wide, x))
    same = trained(narrow, x, lambda x: formula(narrow, x))
    out = trained(model, x)
    assert out[0].dtype == dtype and {grad.dtype for grad in out[2:]} == {adapter}
    assert error(out, exact) <= bound(same, exact)


def test_autocast():
    model = layer(lora_bias=True)
    x = torch.randn(5, 16)

    def autocast(call):
        def run(x):
            with torch.autocast("cpu", torch.bfloat16):
                return call(x)

        return run

    wide = copy.deepcopy(model).double()
    exact = trained(wide, x.double(), lambda x: formula(wide, x))
    same = trained(model, x, autocast(lambda x: formula(model, x)))
    out = trained(model, x, autocast(model))
    assert [tensor.dtype for tensor in out] == [tensor.dtype for tensor in same]
    assert out[0].dtype == torch.bfloat16
    assert error(out, exact) <= bound(same, exact)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole_with_dropout_and_dynamic_batch(compiler):
    torch._dynamo.reset()
    model = layer(lora_dropout=0.3, lora_bias=True)
    counter = CompileCounterWithBackend(compiler)
    frames = []
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    with torch._inductor.config.patch(fallback_random=True):  # eager's random numbers
        for batch in (30, 50, 80):
            x = torch.randn(batch, 7, 16)
            runs = []
            for call in (compiled, model):
                torch.manual_seed(1)
                runs.append(trained(model, x, call))
            assert error(*runs) <= bound(runs[1], runs[1])
            frames.append(counter.frame_count)
    assert len(set(frames)) == 1  # one graph for every batch size


@pytest.mark.parametrize("dynamic", [True, None])
def test_changing_scaling_recompiles_at_most_once(dynamic):
    torch._dynamo.reset()
    model = layer(lora_bias=True)
    x = torch.randn(5, 16)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic)
    for scaling in (1.0, 0.5, 0.25, 3.0):
        model.scaling = scaling
        exact = formula(copy.deepcopy(model).double(), x.double())
        assert error(compiled(x), exact) <= bound(formula(model, x), exact)
    assert counter.frame_count <= 2


def test_moves_with_its_model():
    model = layer(lora_dropout=0.1).bfloat16()
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert model.scaling == 1.5
    assert model(torch.randn(3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    other = layer(lora_dropout=0.1).bfloat16()
    other.load_state_dict(model.state_dict())
    assert all(
        map(torch.equal, other.state_dict().values(), model.state_dict().values())
    )


def test_says_what_it_is():
    text = repr(layer(lora_dropout=0.1))
    assert text.startswith(
        "LoRALinear(\n  r=4, lora_alpha=6, scaling=1.5\n  (base_layer): Linear(in_features=16"
    )
    assert "(lora_dropout): ModuleDict(\n    (default): Dropout(p=0.1" in text


ERRORS = [
    (ValueError, "LoRALinear: r must be at least 1, got 0", {"r": 0}),
    (
        ValueError,
        r"LoRALinear: lora_dropout must be in \[0, 1\], got 1.5",
        {"lora_dropout": 1.5},
    ),
    (
        ValueError,
        "LoRALinear: init_lora_weights must be a bool or 'gaussian', got 'olora'",
        {"init_lora_weights": "olora"},
    ),
    (
        TypeError,
        "LoRALinear: base_layer must be nn.Linear, LinearNF4 or transformers' Conv1D, got GELU",
        {"base_layer": nn.GELU()},
    ),
]


@pytest.mark.parametrize(
    "error_class, message, change", ERRORS, ids=[message for _, message, _ in ERRORS]
)
def test_errors(error_class, message, change):
    options = {"base_layer": nn.Linear(16, 24), "r": 4, "lora_alpha": 8}
    with pytest.raises(error_class, match=message):
        LoRALinear(**options | change)


@pytest.fixture
def peft():
    pytest.importorskip("transformers")
    return pytest.importorskip("peft")


def theirs(peft, base, cast=True, **config):
    """PEFT's layer over `base`, and its config."""
    torch.manual_seed(7)
    model = nn.Sequential()
    model.add_module("lin", copy.deepcopy(base))
    config = peft.LoraConfig(target_modules=["lin"], **config)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=cast)
    return model.base_model.model.lin, config


CONFIGS = [
    {"r": 4, "lora_alpha": 6},
    {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "lora_dropout": 0.1,
        "init_lora_weights": "gaussian",
    },
    {"r": 4, "lora_bias": True, "bias": "all", "init_lora_weights": False},
    {"rank_pattern": {"lin": 2}, "alpha_pattern": {r"li.": 5}},
]


@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_from_config_is_pefts_layer(peft, config, conv, dtype, cast):
    from transformers.pytorch_utils import Conv1D

    base = (Conv1D(24, 16) if conv else nn.Linear(16, 24)).to(dtype)
    expected, config = theirs(peft, base, cast, fan_in_fan_out=conv, **config)
    torch.manual_seed(7)
    ours = LoRALinear.from_config(
        base, config, "model.lin", autocast_adapter_dtype=cast
    )
    assert list(ours.state_dict()) == list(expected.state_dict())
    for p, q in zip(ours.parameters(), expected.parameters(), strict=True):
        assert p.dtype == q.dtype and torch.equal(p, q)
        assert p.requires_grad == q.requires_grad
    assert (ours.scaling, ours.r) == (
        expected.scaling["default"],
        expected.r["default"],
    )
    assert repr(ours.lora_dropout) == repr(expected.lora_dropout)


def test_from_config_names_what_it_refuses(peft):
    for option, value in (("alora_invocation_tokens", [1]), ("use_qalora", True)):
        config = peft.LoraConfig(task_type="CAUSAL_LM", **{option: value})
        with pytest.raises(ValueError, match=f"LoRALinear: {option} is not supported"):
            LoRALinear.from_config(nn.Linear(16, 24), config)
    with pytest.raises(ValueError, match="got 'pissa'"):
        LoRALinear.from_config(
            nn.Linear(16, 24), peft.LoraConfig(init_lora_weights="pissa")
        )


@pytest.mark.parametrize(
    "options", [{}, {"lora_bias": True, "use_rslora": True}], ids=str
)
def test_from_peft_shares_and_equals(peft, options):
    stock, _ = theirs(peft, nn.Linear(16, 24), r=4, init_lora_weights=False, **options)
    ours = LoRALinear.from_peft(stock)
    assert {name: p.data_ptr() for name, p in ours.named_parameters()} == {
        name: p.data_ptr() for name, p in stock.named_parameters()
    }
    x = torch.randn(70, 16)
    wide = copy.deepcopy(stock).double()
    exact = trained(wide, x.double())
    same = trained(stock, x)
    assert error(trained(ours, x), exact) <= bound(same, exact)


def test_from_peft_names_what_it_refuses(peft):
    stock, _ = theirs(peft, nn.Linear(16, 24), init_lora_weights=False)
    stock.merge()
    with pytest.raises(
        ValueError, match=r"LoRALinear: layer must not be merged, got \['default'\]"
    ):
        LoRALinear.from_peft(stock)
    stock.unmerge()
    stock.set_adapter([])
    with pytest.raises(
        ValueError, match=r"LoRALinear: layer must have one active adapter, got \[\]"
    ):
        LoRALinear.from_peft(stock)
    other, _ = theirs(peft, nn.Linear(16, 24), init_lora_weights="mica")
    with pytest.raises(
        ValueError,
        match="LoRALinear: layer must be LoRA or DoRA, got MiCALinearVariant",
    ):
        LoRALinear.from_peft(other)
