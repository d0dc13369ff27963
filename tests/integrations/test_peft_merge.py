"""Merging a patched model: one rounding, and every bit back, whatever happened meanwhile."""

import copy
import warnings

import pytest
import torch
from law import bound, error

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from tiny import TOKENS, logits, lora_layers, single, tiny

import peftops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
METHODS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True, "r": 3},
    "lora_bias": {"lora_bias": True},
    "DoRA": {"use_dora": True},
}


def base_bits(model):
    """The bits of all weights and biases of the base layers."""
    tensors = {}
    for i, layer in enumerate(lora_layers(model)):
        for name, t in layer.base_layer.state_dict().items():
            tensors[i, name] = t.contiguous().view(torch.uint8).clone()
    return tensors


def same(bits, others):
    return all(torch.equal(t, others[key]) for key, t in bits.items())


def train(model, size=0.1):
    """Changes every adapter, as an optimizer's step does."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += size * torch.randn_like(parameter)


def with_two(model, **config):
    """The model with a second adapter, both of which are active."""
    options = peft.LoraConfig(r=2, init_lora_weights=False, **config)
    options.target_modules = model.peft_config["default"].target_modules
    options.fan_in_fan_out = model.peft_config["default"].fan_in_fan_out
    model.add_adapter("other", options)
    model.base_model.set_adapter(["default", "other"])
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_cycles_with_an_adapter_that_trains(method, architecture, dtype):
    config = dict(METHODS[method])
    if method == "lora_bias" and architecture == "llama":
        config["target_modules"] = ["q_proj", "v_proj"]  # which have a bias
    model = peftops.patch(tiny(architecture, dtype=dtype, **config))
    before = base_bits(model)
    for cycle in range(12):
        model.merge_adapter(safe_merge=cycle % 2 == 0)
        assert not same(before, base_bits(model))
        train(model)
        model.unmerge_adapter()
        assert same(before, base_bits(model))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dora", [False, True])
def test_several_adapters_in_one_rounding(dora, dtype):
    """At once, and one after another; DoRA's norms are of the weight without any adapter."""
    model = peftops.patch(with_two(tiny(dtype=dtype, use_dora=dora), use_dora=dora))
    before = base_bits(model)
    layer = lora_layers(model)[0]
    w = layer.base_layer.weight.double()
    exact = w
    for name in ("default", "other"):
        delta = layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double()
        delta = delta * layer.scaling[name]
        exact = exact + delta
        if dora:
            magnitude = layer.lora_magnitude_vector[name].weight.double()
            exact = exact * (magnitude / (w + delta).norm(dim=1))[:, None]
    model.merge_adapter()
    assert layer.merged_adapters == ["default", "other"]
    merged = base_bits(model)
    out = layer.base_layer.weight
    assert error(out, exact) <= bound(exact.to(dtype), exact)
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert same(merged, base_bits(model))
    model.unmerge_adapter()
    assert same(before, base_bits(model))


def test_a_deleted_adapter_is_unmerged():
    model = peftops.patch(with_two(tiny(dtype=torch.bfloat16)))
    before = base_bits(model)
    model.merge_adapter()
    for layer in lora_layers(model):  # the model itself refuses
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.delete_adapter("other")
    model.unmerge_adapter()
    assert same(before, base_bits(model))


def test_disabled_adapters_are_unmerged():
    model = peftops.patch(tiny(dtype=torch.bfloat16))
    before = base_bits(model)
    model.merge_adapter()
    with model.disable_adapter():
        logits(model)
        assert same(before, base_bits(model))
    assert peftops.report(model).merged == 0


def test_a_copy_and_a_saved_model_come_back_too(tmp_path):
    model = peftops.patch(tiny(dtype=torch.bfloat16))
    before = base_bits(model)
    model.merge_adapter()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for each in (copy.deepcopy(model), loaded, model):
        each.unmerge_adapter()
        assert same(before, base_bits(each))


def test_a_changed_weight_is_named_and_nothing_is_changed():
    model = peftops.patch(tiny(dtype=torch.bfloat16))
    model.merge_adapter()
    layer = lora_layers(model)[5]
    layer.base_layer.weight.data[0, 0] += 1
    merged = base_bits(model)
    with pytest.raises(
        ValueError,
        match=r"unmerge: model\.layers\.0\.mlp.* cannot be unmerged: its merged weight was changed",
    ):
        model.unmerge_adapter()
    assert same(merged, base_bits(model))
    assert all(layer.merged for layer in lora_layers(model))
    with pytest.raises(ValueError, match="weight must be as merged"):
        layer.unmerge()
    assert layer.merged_adapters == ["default"]


def test_a_broken_adapter_changes_nothing():
    model = peftops.patch(with_two(single()))
    layer = lora_layers(model)[0]
    layer.lora_B["other"].weight.data[3, 1] = float("nan")
    before = base_bits(model)
    with pytest.raises(
        ValueError, match="The adapter default, other seems to be broken"
    ):
        model.merge_adapter(safe_merge=True)
    assert same(before, base_bits(model))
    assert not layer.merged
    assert peftops.report(model).merged == 0


def test_a_bias_without_a_place_is_refused():
    model = single(lora_bias=True)
    lora_layers(model)[0].base_layer.bias = None
    peftops.patch(model)
    before = base_bits(model)
    with pytest.raises(RuntimeError, match="default must come without lora_bias"):
        model.merge_adapter()
    assert same(before, base_bits(model))


def test_merging_twice_is_a_warning_and_so_is_unmerging():
    model = peftops.patch(single())
    before = base_bits(model)
    model.merge_adapter()
    merged = base_bits(model)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    assert same(merged, base_bits(model))
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert same(before, base_bits(model))


def test_the_report_of_a_merged_model():
    model = peftops.patch(tiny(dtype=torch.bfloat16))
    expected = logits(model)
    model.merge_adapter()
    report = peftops.report(model)
    assert (report.merged, report.fused, report.fallback) == (14, 0, 0)
    weights = sum(layer.base_layer.weight.nbytes for layer in lora_layers(model))
    adapters = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
    assert 0 < report.undo_bytes - adapters < weights
    assert f"merged: 14, {report.undo_bytes:,} bytes" in str(report)
    assert error(logits(model), expected.double()) < 0.05
    with pytest.raises(ValueError, match=r"unpatch: .* must be unmerged first"):
        peftops.unpatch(model)
    model.unmerge_adapter()
    assert torch.equal(logits(peftops.unpatch(model)), logits(model))


def test_the_loss_of_a_merged_model_does_not_walk_away():
    """Stock PEFT's base is another one after as many cycles: the test can fail."""
    torch.manual_seed(0)
    models = [tiny(dtype=torch.bfloat16), peftops.patch(tiny(dtype=torch.bfloat16))]
    changed = []
    for model in models:
        before = base_bits(model)
        for _ in range(5):
            model.merge_adapter()
            model.unmerge_adapter()
            train(model)
        changed.append(not same(before, base_bits(model)))
    assert changed == [True, False]


def test_a_merged_model_generates_the_adapted_models_tokens():
    model = peftops.patch(tiny())
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=TOKENS, **options)
    merged = copy.deepcopy(model).merge_and_unload()
    assert not any("_peftops" in key for m in merged.modules() for key in vars(m))
    assert torch.equal(merged.generate(input_ids=TOKENS, **options), expected)
    model.merge_adapter()
    assert torch.equal(model.generate(input_ids=TOKENS, **options), expected)


def test_what_only_peft_merges_is_pefts():
    """A subclass of nn.Linear, and fp64."""
    for change in ("class", "double"):
        models = [single(), single()]
        for model in models:
            layer = lora_layers(model)[0]
            if change == "class":
                layer.base_layer.__class__ = type("Sub", (torch.nn.Linear,), {})
            else:
                model.double()
        peftops.patch(models[1])
        for step in ("merge_adapter", "unmerge_adapter"):
            for model in models:
                getattr(model, step)()
            assert same(base_bits(models[0]), base_bits(models[1]))


def test_what_ours_has_merged_becomes_pefts_beside_what_only_peft_merges():
    models = [with_two(single(use_dora=True)) for _ in range(2)]
    peftops.patch(models[1])
    for model in models:
        torch.manual_seed(3)
        train(model)
        layer = lora_layers(model)[0]
        layer.lora_A["other"].double()
        layer.lora_B["other"].double()
        model.merge_adapter(["default"])
        model.merge_adapter(["other"])
        assert layer.merged_adapters == ["default", "other"]
    assert same(*map(base_bits, models))
    for model in models:
        model.unmerge_adapter()
    assert same(*map(base_bits, models))


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_merge_and_unmerge_of_a_model(method, patched):
    """They need no patch for layers over dense weights."""
    model = tiny("gpt2", dtype=torch.bfloat16, **METHODS[method])
    other = peftops.patch(copy.deepcopy(model))
    other.merge_adapter()
    if patched:
        peftops.patch(model)
    before = base_bits(model)
    assert peftops.merge(model) is model
    assert same(base_bits(other), base_bits(model))
    train(model)
    assert peftops.unmerge(model) is model
    assert same(before, base_bits(model))


def test_merging_some_and_then_others():
    model = with_two(tiny(dtype=torch.bfloat16))
    before = base_bits(model)
    both = base_bits(peftops.merge(copy.deepcopy(model)))
    peftops.merge(model, adapter_names=["default"])
    assert not same(both, base_bits(model))
    peftops.merge(model, adapter_names=["other"])
    assert same(both, base_bits(model))
    peftops.unmerge(model)
    assert same(before, base_bits(model))


def broken(layer):
    layer.lora_B["default"].weight.data[3, 1] = float("inf")


def too_large(layer):
    layer.lora_B["default"].weight.data.fill_(6e4)
    layer.lora_A["default"].weight.data.fill_(6e4)


def no_place(layer):
    layer.lora_bias["default"] = True
    layer.base_layer.bias = None


def changed(layer):
    peftops.merge(layer)
    layer.base_layer.weight.data[0, 0] += 1
    layer.merged_adapters[:] = ["another"]


@pytest.mark.parametrize(
    "change, words",
    [
        (broken, "adapter 'default' holds NaN or infinity"),
        (too_large, r"the sum is too large for torch\.float16"),
        (no_place, "adapter 'default' has a bias, and the base layer has none"),
        (changed, "its merged weight was changed since"),
    ],
)
def test_one_layer_that_cannot_be_merged_stops_all(change, words):
    model = tiny(dtype=torch.float16)
    layer = lora_layers(model)[-1]
    change(layer)
    before = base_bits(model)
    merged = [[*layer.merged_adapters] for layer in lora_layers(model)]
    with pytest.raises(ValueError, match=f"merge: .* cannot be merged: {words}"):
        peftops.merge(model)
    assert same(before, base_bits(model))
    assert merged == [[*layer.merged_adapters] for layer in lora_layers(model)]


def test_bad_calls_are_refused_in_a_sentence():
    model = single()
    with pytest.raises(ValueError, match="merge: the model has no LoRA layers"):
        peftops.merge(torch.nn.Linear(2, 3))
    with pytest.raises(ValueError, match="merge: the model has no adapter 'nobody'"):
        peftops.merge(model, adapter_names=["nobody"])
    with pytest.warns(UserWarning, match="unmerge: no adapter is merged"):
        peftops.unmerge(model)
    peftops.merge(model)
    with pytest.raises(ValueError, match="merge: adapter 'default' is merged already"):
        peftops.merge(model, adapter_names=["default"])


def test_unmerging_a_changed_weight_stops_all():
    model = peftops.merge(tiny())
    lora_layers(model)[3].base_layer.weight.data.neg_()
    before = base_bits(model)
    with pytest.raises(ValueError, match=r"unmerge: .*layers\.0.* cannot be unmerged"):
        peftops.unmerge(model)
    assert same(before, base_bits(model))


def test_what_peft_has_unmerged_is_merged_anew():
    model = peftops.merge(single(dtype=torch.bfloat16))
    model.unmerge_adapter()  # PEFT's own, which rounds
    before = base_bits(model)
    peftops.unmerge(peftops.merge(model))
    assert same(before, base_bits(model))


def test_embeddings_are_merged_by_peft():
    model = tiny(target_modules=["q_proj", "embed_tokens"])
    before = logits(model)
    peftops.merge(model)
    assert all(layer.merged for layer in lora_layers(model))
    assert error(logits(model), before.double()) < 1e-3
    peftops.unmerge(model)
    assert not any(layer.merged for layer in lora_layers(model))
