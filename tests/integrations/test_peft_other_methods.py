"""Other methods of PEFT beside LoRA compute as before. A model without LoRA is refused."""

import copy

import pytest
import torch
from law import bound, chain_bound, error, orders
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft.tuners.lora import LoraLayer
from tiny import TOKENS, exactly, step, tiny

import peftops
from peftops.integrations.peft import FUSED, OWN

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

CAUSAL = {"task_type": "CAUSAL_LM"}
TARGETS = {"target_modules": ["0", "1"]}
OTHERS = {  # methods whose layers wrap the layer that they adapt
    "LoHa": peft.LoHaConfig(
        r=2,
        alpha=3,
        init_weights=False,
        **TARGETS,
    ),
    "LoKr": peft.LoKrConfig(
        r=2,
        alpha=3,
        init_weights=False,
        **TARGETS,
    ),
    "OFT": peft.OFTConfig(
        oft_block_size=4,
        init_weights=False,
        use_cayley_neumann=False,
        **TARGETS,
    ),
}
LORA = peft.LoraConfig(
    r=4,
    lora_alpha=6,
    init_lora_weights=False,
    **TARGETS,
)
STACKED = {  # methods that a model with LoRA can be wrapped in
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "p-tuning": peft.PromptEncoderConfig(
        num_virtual_tokens=3,
        encoder_hidden_size=16,
        **CAUSAL,
    ),
    "IA3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        **CAUSAL,
    ),
}


def layers_of(model):
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


def mixed(first, second):
    """Both adapters of both layers, the second around the first."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8))
    model = peft.get_peft_model(base, copy.deepcopy(first), mixed=True)
    model.add_adapter("other", copy.deepcopy(second))
    model.set_adapter(["default", "other"])
    return model


def trained(model, x):
    """y and gradients of one step."""
    model.zero_grad()
    x = x.to(next(model.parameters()).dtype, copy=True).requires_grad_()
    y = model(x)
    y.square().mean().backward()
    return [
        y.detach(),
        x.grad,
        *(p.grad.clone() for p in model.parameters() if p.grad is not None),
    ]


def assert_law(model, run, calls):
    exact = run(exactly(model))
    same = orders(lambda: run(model))
    patched = peftops.patch(copy.deepcopy(model))
    out = run(patched)
    assert error(out, exact) <= chain_bound(same, exact)
    assert peftops.report(patched).calls == calls
    classes = [type(module) for module in model.modules()]
    assert [type(module) for module in peftops.unpatch(patched).modules()] == classes


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_adapter_around_ours(other):
    assert_law(
        mixed(LORA, other),
        lambda model: trained(model, torch.linspace(-1, 1, 70 * 16).view(70, 16)),
        {FUSED: 2},
    )


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_ours_around_another_adapter(other):
    assert_law(
        mixed(other, LORA),
        lambda model: trained(model, torch.linspace(-1, 1, 70 * 16).view(70, 16)),
        {OWN: 2},
    )


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_only_one_of_two_kinds_is_active(other):
    model = mixed(other, LORA)
    x = torch.linspace(-1, 1, 70 * 16).view(70, 16)
    model.set_adapter("default")
    assert_law(model, lambda model: trained(model, x), {"no active adapter": 2})
    model.set_adapter("other")
    assert_law(model, lambda model: trained(model, x), {OWN: 2})


def test_a_layer_of_adalora_is_pefts_own():
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        total_step=10,
        init_lora_weights=False,
        **TARGETS,
    )
    model = mixed(LORA, config)
    x = torch.randn(70, 16)
    patched = peftops.patch(copy.deepcopy(model))
    exact = trained(exactly(model), x)
    same = trained(model, x)
    assert error(trained(patched, x), exact) <= bound(same, exact)
    assert peftops.report(patched).reasons == {"layer is adalora.layer.SVDLinear": 2}


@pytest.mark.parametrize("config", STACKED.values(), ids=STACKED)
def test_methods_around_a_model_with_lora(config):
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny(), copy.deepcopy(config))
    calls = len(layers_of(model))

    def run(model):
        logits, grads = step(model)
        return [logits, *grads]

    assert sum(p.requires_grad for p in model.parameters())
    assert_law(model, run, {FUSED: calls})


@pytest.mark.parametrize("config", STACKED.values(), ids=STACKED)
def test_a_model_of_other_methods_only_is_refused(config):
    model = peft.get_peft_model(tiny().unload(), copy.deepcopy(config))
    expected = model(input_ids=TOKENS).logits
    with pytest.raises(ValueError, match=r"^patch: the model has no LoRA layers$"):
        peftops.patch(model)
    assert torch.equal(model(input_ids=TOKENS).logits, expected)
