"""In any state of a model, patch completes or changes nothing, and unpatch restores all classes."""

import copy

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft.tuners.lora import LoraLayer
from tiny import logits, single, tiny

import peftops
import peftops.functional as F
from peftops.integrations.peft import FUSED, Fused, FusedLinear

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def state(model):
    """Class and names of attributes of each module."""
    return {
        name: (type(module), set(vars(module)))
        for name, module in model.named_modules()
    }


def classes(model):
    """The class of each module, except those of the adapter `other`."""
    return {
        name: type(module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] != "other"
    }


def blocks(model):
    return model.base_model.model.model.layers


def other(**config):
    """The config of a second adapter."""
    return peft.LoraConfig(
        r=3,
        init_lora_weights=False,
        **{"target_modules": ["k_proj", "o_proj"]} | config,
    )


def test_patch_completes_what_is_half_patched():
    model = tiny(target_modules=["q_proj"])
    peftops.patch(blocks(model)[0])
    model.add_adapter("other", other())
    logits(model)
    before = peftops.report(model)
    assert before.reasons == {"not patched": 5}
    assert before.calls == {FUSED: 1}
    peftops.patch(model)
    for layer in model.modules():
        assert type(layer) is FusedLinear or not isinstance(layer, LoraLayer)
    logits(model)
    assert peftops.report(model).calls == {FUSED: 3, "no active adapter": 4}


def test_a_patch_that_fails_changes_nothing(monkeypatch):
    model = tiny(use_dora=True)
    kept = []
    peftops.patch(blocks(model)[0])
    before = state(model)
    buffers = [name for name, _ in model.named_buffers()]

    def fail(layer):
        kept.append(layer)
        if len(kept) == 10:
            raise MemoryError
        keep(layer)

    keep = Fused.keep_gains
    monkeypatch.setattr(Fused, "keep_gains", fail)
    with pytest.raises(MemoryError):
        peftops.patch(model)
    assert state(model) == before
    assert [name for name, _ in model.named_buffers()] == buffers


def add_layers(model):
    model.add_adapter("other", other())


def add_dora(model):
    model.add_adapter("other", other(use_dora=True))
    model.set_adapter("other")
    logits(model)


def add_and_delete(model):
    model.add_adapter("other", other())
    model.set_adapter("other")
    logits(model)
    model.delete_adapter("other")


def fail_strictly(model):
    base = blocks(model)[1].self_attn.q_proj.base_layer
    base.requires_grad_()
    with pytest.raises(ValueError, match="base weight is trained"):
        peftops.patch(model, strict=True)
    base.requires_grad_(False)


def merge_and_unmerge(model):
    model.merge_adapter()
    logits(model)
    model.unmerge_adapter()


def patch_again(model):
    add_layers(model)
    peftops.patch(model)


def unpatch_a_block(model):
    peftops.unpatch(blocks(model)[0])


BETWEEN = [
    add_layers,
    add_dora,
    add_and_delete,
    fail_strictly,
    merge_and_unmerge,
    patch_again,
    unpatch_a_block,
]
IN_STOCK = {
    merge_and_unmerge: lambda model: None,  # ours leaves no trace
    patch_again: add_layers,
    fail_strictly: lambda model: None,
    unpatch_a_block: lambda model: None,
}


@pytest.mark.parametrize("between", BETWEEN)
def test_unpatch_restores_every_class(between):
    model, stock = (tiny(target_modules=["q_proj", "k_proj"]) for _ in range(2))
    peftops.patch(model)
    for each, change in ((model, between), (stock, IN_STOCK.get(between, between))):
        torch.manual_seed(2)
        change(each)
    peftops.unpatch(model)
    assert classes(model) == classes(stock)
    assert not any(
        key.startswith("_peftops") for module in model.modules() for key in vars(module)
    )
    assert torch.equal(logits(model), logits(stock))


def test_a_model_is_patched_before_its_weights_are_there():
    model = tiny()
    weights = model.state_dict()
    expected = logits(peftops.patch(copy.deepcopy(model)))
    model.to("meta")
    assert peftops.report(peftops.patch(model)).reasons == {"no kernels for meta": 14}
    model.to_empty(device="cpu").load_state_dict(weights)
    for name, buffer in peftops.unpatch(tiny()).named_buffers():
        model.get_buffer(name).copy_(buffer)
    assert torch.equal(logits(model), expected)
    assert peftops.report(model).calls == {FUSED: 14}


def outcome(model):
    """The device of y in a call, or the error."""
    try:
        return model(torch.randn(3, 16)).device
    except RuntimeError as refusal:
        return str(refusal)


@pytest.mark.parametrize("child", ["base_layer", "lora_A", "lora_B"])
def test_tensors_of_two_devices_are_pefts_own(child):
    model = single()
    getattr(model.base_model.model.lin, child).to("meta")
    expected = outcome(model)
    assert outcome(peftops.patch(model)) == expected
    assert peftops.report(model).reasons == {"tensors on different devices": 1}


def test_a_base_weight_that_is_trained_is_refused_in_one_sentence():
    x = torch.randn(3, 16)
    w = torch.randn(24, 16, requires_grad=True)
    a = torch.randn(4, 16)
    b = torch.randn(24, 4)
    with pytest.raises(
        ValueError, match=r"^lora: w must be frozen, got one that requires grad$"
    ):
        F.lora_linear(x, w, a, b)


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
def test_a_tensor_without_memory_is_refused_in_one_sentence(name):
    shapes = {
        "x": (3, 16),
        "weight": (24, 16),
        "lora_A": (4, 16),
        "lora_B": (24, 4),
    }
    t = {name: torch.randn(shape) for name, shape in shapes.items()}
    t[name] = t[name].to("meta")
    with pytest.raises(ValueError, match=rf"^lora: {name} must be on cpu, got meta$"):
        F.lora_linear(*t.values())
