"""What PEFT does over bitsandbytes' Linear4bit, it does over LinearNF4.

It computes as over the dense weight, and quantizes what it changed.
"""

import copy

import pytest
import torch
from law import bound, error
from nf4_layers import bits, same_bits
from safetensors.torch import save_file
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

# Imported before there is a LinearNF4, as scripts do.
from peft import replace_lora_weights_loftq
from peft.helpers import KappaTuneSelector
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.loftq_utils import _low_rank_decomposition
from tiny import Net, adapted

import peftops
from peftops import NF4Weight
from peftops.integrations.transformers.experts import PackedExperts
from peftops.nn import LinearNF4

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
K, N = 64, 96


def ours(k=K, n=N, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return LinearNF4.from_linear(nn.Linear(k, n, dtype=dtype), **options)


def dense(layer):
    """An nn.Linear of the same weight and bias."""
    linear = nn.Linear(layer.in_features, layer.out_features)
    linear.weight = nn.Parameter(layer.dequantize(torch.float32), requires_grad=False)
    linear.bias = copy.deepcopy(layer.bias)
    return linear


def made(lin, config, seed=1):
    """A PEFT model of one layer, with adapters that are not zero."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(Net(lin), copy.deepcopy(config))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def layer_of(model):
    return model.base_model.model.lin


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    "model_class",
    [peft.PeftModel, peft.PeftMixedModel],
    ids=lambda model_class: model_class.__name__,
)
@pytest.mark.parametrize("k, n", [(64, 96), (33, 7), (1, 1)])
def test_parameters_are_counted_as_those_of_the_dense_model(model_class, double, k, n):
    layer = ours(k, n, double_quant=double)
    config = peft.LoraConfig(r=4, target_modules=["lin"])
    counts = [
        model_class(Net(lin), copy.deepcopy(config)).get_nb_trainable_parameters()
        for lin in (dense(layer), layer)
    ]
    assert counts[0] == counts[1] == (4 * (k + n), 4 * (k + n) + k * n + n)


def test_experts_are_counted_too(capsys):
    net = Net(nn.Linear(8, 8))
    net.experts = PackedExperts(NF4Weight.quantize(torch.randn(3, 5, 64)))
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["lin"]))
    assert model.get_nb_trainable_parameters() == (32, 32 + 72 + 960)
    model.print_trainable_parameters()
    assert "trainable params: 32 || all params: 1,064" in capsys.readouterr().out


INITS = (
    True,
    "gaussian",
    "orthogonal",
    "olora",
    "pissa",
    "pissa_niter_4",
    "mica",
    "eva",
    "lora_ga",
)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_initializations_are_those_of_the_dense_weight(init, dtype):
    layer = ours(dtype=dtype)
    linear = dense(layer)
    before = bits(layer)
    config = {
        "target_modules": ["lin"],
        "init_lora_weights": init,
        "r": 8,
        "lora_alpha": 8,
    }
    if init == "lora_ga":
        config["lora_ga_config"] = peft.LoraGAConfig()
        gradient = torch.ones(2, N, K).normal_()[0]
        linear._peft_loraga_grad = gradient
        layer._peft_loraga_grad = gradient
    models = []
    for lin in (linear, layer):
        torch.manual_seed(3)
        models.append(layer_of(adapted(Net(lin), **config)))
    for child in ("lora_A", "lora_B"):
        a, b = (getattr(model, child)["default"].weight for model in models)
        assert torch.equal(a, b), child
    weight = models[0].base_layer.weight
    moved = not torch.equal(weight, NF4Weight.load(before).dequantize(torch.float32))
    assert moved == (init in ("olora", "pissa", "pissa_niter_4", "lora_ga"))
    expected = NF4Weight.quantize(weight.detach()) if moved else NF4Weight.load(before)
    assert type(layer) is LinearNF4
    assert layer.weight_dtype is dtype
    assert torch.equal(
        layer.dequantize(torch.float32), expected.dequantize(torch.float32)
    )
    assert same_bits(before, bits(layer)) != moved


def test_olora_leaves_the_bytes_that_it_leaves_over_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = nn.Linear(K, N)
    theirs = bnb.nn.Linear4bit(
        K,
        N,
        quant_type="nf4",
        compute_dtype=torch.float32,
    )
    theirs.load_state_dict(linear.state_dict())
    theirs.to("cpu")
    net = Net(theirs)
    net.is_loaded_in_4bit = True
    mine = LinearNF4.from_linear(linear)
    config = {"target_modules": ["lin"], "init_lora_weights": "olora"}
    models = [layer_of(adapted(base, **config)) for base in (net, Net(mine))]
    for child in ("lora_A", "lora_B"):
        a, b = (getattr(model, child)["default"].weight for model in models)
        assert torch.equal(a, b), child
    assert same_bits(bits(LinearNF4.from_bnb(models[0].base_layer)), bits(mine))


def test_corda_reads_the_weight_that_the_codes_stand_for(tmp_path):
    layer = ours()
    x = torch.randn(300, K)
    before = bits(layer)
    covariance_file = tmp_path / "covariance.pt"
    torch.save({"lin": x.T @ x}, covariance_file)
    options = {"corda_method": "kpm", "covariance_file": str(covariance_file)}
    models = []
    for lin in (dense(layer), layer):
        config = peft.LoraConfig(
            r=8,
            target_modules=["lin"],
            init_lora_weights="corda",
            corda_config=CordaConfig(**options),
        )
        net = Net(lin)
        preprocess_corda(net, config)
        models.append(layer_of(peft.get_peft_model(net, config)))
    for child in ("lora_A", "lora_B"):
        a, b = (getattr(model, child)["default"].weight for model in models)
        assert torch.equal(a, b), child
    expected = NF4Weight.quantize(models[0].base_layer.weight.detach())
    assert torch.equal(layer.dequantize(), expected.dequantize())
    assert not same_bits(before, bits(layer))


def test_what_cannot_start_from_a_quantized_weight_is_refused_by_name():
    config = METHODS["LoRA"]
    layer = layer_of(made(ours(), config))
    with pytest.raises(
        ValueError,
        match="LinearNF4: init_lora_weights='loftq' must have a base that is not quantized",
    ):
        layer.loftq_init("default", config)
    with pytest.raises(ValueError, match="LinearNF4: HiRA must have a base of"):
        peft.get_peft_model(Net(ours()), peft.HiraConfig(target_modules=["lin"]))
    config = peft.LoraConfig(
        target_modules=["lin"],
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )
    with pytest.raises(ValueError, match="LoRA-GA does not support quantized models"):
        preprocess_loraga(Net(ours()), config, lambda: None)


def test_condition_numbers_are_those_of_the_weight():
    net = Net(ours())
    net.other = nn.Linear(4, 4)
    plain = copy.deepcopy(net)
    plain.lin = dense(net.lin)
    numbers = []
    for model in (plain, net):
        selector = KappaTuneSelector(model, show_progress=False)
        selector._compute_kappas()
        selector._compute_kappas()
        numbers.append(selector._condition_numbers)
    assert set(numbers[1]) == {"lin", "other"}
    assert numbers[0] == numbers[1]
    assert selector.model is net


@pytest.mark.parametrize("columns", [False, True])
def test_loftq_replaces_adapters_by_what_quantization_lost(columns, tmp_path):
    torch.manual_seed(0)
    linear = nn.Linear(K, N)
    layer = LinearNF4.from_linear(linear)
    layer.columns = columns
    model = peft.get_peft_model(
        Net(layer),
        peft.LoraConfig(
            r=8,
            lora_alpha=8,
            target_modules=["lin"],
        ),
    )
    stored = linear.weight.T if columns else linear.weight
    save_file(
        {"lin.weight": stored.detach().contiguous()}, tmp_path / "model.safetensors"
    )
    lost = linear.weight - layer.dequantize()
    before = bits(layer)
    kept = layer_of(model).lora_A["default"].weight.detach().clone()
    asked = []

    def refuse(model, name):
        asked.append(name)

    replace_lora_weights_loftq(model, str(tmp_path), callback=refuse)
    assert asked == ["lin"]
    assert torch.equal(layer_of(model).lora_A["default"].weight, kept)
    replace_lora_weights_loftq(model, str(tmp_path))
    best = _low_rank_decomposition(lost.detach(), 8)
    assert torch.equal(layer_of(model).lora_A["default"].weight, best["R"])
    assert torch.equal(layer_of(model).lora_B["default"].weight, best["L"])
    assert same_bits(before, bits(layer))


def test_loftq_of_a_model_without_4_bits_is_pefts(tmp_path):
    model = peft.get_peft_model(
        Net(nn.Linear(K, N)), peft.LoraConfig(target_modules=["lin"])
    )
    save_file({"lin.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="No bnb LoRA module found on the model"):
        replace_lora_weights_loftq(model, str(tmp_path))


T = {"target_modules": ["lin"]}  # of all configs below
METHODS = {
    "LoRA": peft.LoraConfig(r=4, **T),
    "DoRA": peft.LoraConfig(
        r=4,
        use_dora=True,
        **T,
    ),
    "rsLoRA": peft.LoraConfig(
        r=4,
        use_rslora=True,
        **T,
    ),
    "LoRA with a bias": peft.LoraConfig(
        r=4,
        lora_bias=True,
        **T,
    ),
    "PiSSA": peft.LoraConfig(
        r=4,
        init_lora_weights="pissa",
        **T,
    ),
    "AdaLoRA": peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        total_step=10,
        **T,
    ),
    "BOFT": peft.BOFTConfig(boft_block_size=4, **T),
    "C3A": peft.C3AConfig(block_size=8, **T),
    "FourierFT": peft.FourierFTConfig(n_frequency=10, **T),
    "GraLoRA": peft.GraloraConfig(**T),
    "IA3": peft.IA3Config(feedforward_modules=[], **T),
    "MiSS": peft.MissConfig(r=8, **T),
    "OFT": peft.OFTConfig(oft_block_size=4, **T),
    "PVeRA": peft.PveraConfig(**T),
    "RandLoRA": peft.RandLoraConfig(**T),
    "RoAd": peft.RoadConfig(group_size=32, **T),
    "SHiRA": peft.ShiraConfig(**T),
    "VeRA": peft.VeraConfig(**T),
    "WaveFT": peft.WaveFTConfig(n_frequency=10, **T),
}


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_methods_compute_and_merge_as_over_the_dense_weight(method, safe):
    layer = ours()
    x = torch.randn(5, K)
    plain = dense(layer)
    models = [made(lin, METHODS[method]).eval() for lin in (plain, layer)]
    plain.weight.data = layer.dequantize()  # PiSSA has moved it
    exact = copy.deepcopy(models[0]).double()(x.double())
    assert error(models[1](x), exact) <= bound(models[0](x), exact)
    before = bits(layer)
    for step in ("merge", "unmerge"):
        for model in models:
            if step == "merge":
                model.merge_adapter(safe_merge=safe)
            else:
                model.unmerge_adapter()
        rounded = NF4Weight.quantize(plain.weight.detach().contiguous()).dequantize()
        assert torch.equal(layer.dequantize(), rounded), step
        assert torch.equal(layer.bias, plain.bias), step
        assert not same_bits(before, bits(layer))
        assert type(layer) is LinearNF4
        plain.weight.data = rounded


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_what_was_merged_before_patch_stays_pefts(method):
    models = []
    for patched in (False, True):
        model = made(ours(), METHODS[method])
        torch.manual_seed(2)
        model.add_adapter("other", METHODS[method])
        model.merge_adapter(["default"])
        if patched:
            peftops.patch(model)
        model.merge_adapter(["other"])
        assert layer_of(model).merged_adapters == ["default", "other"]
        models.append(model)
    weights = [layer_of(model).base_layer for model in models]
    assert same_bits(*map(bits, weights))
    for model in models:
        model.unmerge_adapter()
        assert not layer_of(model).merged
    assert same_bits(*map(bits, weights))


def test_a_merge_that_fails_changes_nothing():
    layer = ours()
    model = made(layer, METHODS["LoRA"])
    layer_of(model).lora_A["default"].weight.data[0, 0] = float("nan")
    before = bits(layer)
    for safe in (False, True):
        with pytest.raises(ValueError, match="NaN"):
            model.merge_adapter(safe_merge=safe)
        assert same_bits(before, bits(layer))
        assert type(layer) is LinearNF4
        assert not layer_of(model).merged


def test_a_layer_without_data_is_pefts():
    """On the meta device there is no weight to start from. PEFT's own error is raised."""
    layer = LinearNF4(K, N, device="meta")
    with pytest.raises(TypeError, match="PiSSA"):
        adapted(Net(layer), target_modules=["lin"], init_lora_weights="pissa")
