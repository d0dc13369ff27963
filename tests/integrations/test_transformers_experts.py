"""Expert weights of three dimensions under integrations.transformers.enable()."""

import copy

import pytest
import torch
from law import bound, error

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from test_transformers import TOKENS, config, load

import peftops.functional as F
from peftops.integrations.transformers import enable
from peftops.integrations.transformers import experts as experts_module

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.MixtralConfig(
        **sizes, num_key_value_heads=2, num_local_experts=4, vocab_size=64
    )
    folder = tmp_path_factory.mktemp("mixtral")
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def test_names_the_experts_it_leaves(mixture, caplog):
    with enable():
        model = load(mixture, quantization_config=config(), dtype=torch.float32)
    message = (
        "load_in_4bit: 4 expert weights stay in 16 bits, model.layers.0.mlp.experts."
    )
    assert message in caplog.text
    assert model.model.layers[0].mlp.experts.gate_up_proj.dim() == 3


def trained(model):
    model.train().zero_grad()
    embeddings = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    out = model(inputs_embeds=embeddings, labels=TOKENS)
    out.loss.backward()
    return [out.logits.detach(), embeddings.grad]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_in_4_bits(mixture, implementation, tmp_path):
    with enable(experts=True):
        model = load(mixture, quantization_config=config(), dtype=torch.float32)
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
    plain = load(mixture, dtype=torch.float32)
    assert model.num_parameters() == plain.num_parameters()
    for ours, theirs in zip(model.model.layers, plain.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            packed, weight = (
                getattr(ours.mlp.experts, name),
                getattr(theirs.mlp.experts, name),
            )
            assert torch.equal(
                packed.dequantize(), F.quantize_nf4(weight.data).dequantize()
            )
            assert packed.weight.nbytes * 8 == weight.nbytes
            weight.data = packed.dequantize()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = getattr(ours.self_attn, name).dequantize()
            getattr(theirs.self_attn, name).weight.data = weight
    plain.set_experts_implementation("eager")
    exact = trained(copy.deepcopy(plain).double())
    model.set_experts_implementation(implementation)
    plain.set_experts_implementation(implementation)
    same = trained(plain)
    limit = bound(same, exact)
    assert error(trained(model), exact) <= limit
    assert error(trained(copy.deepcopy(model)), exact) <= limit
    for module in model.modules():
        assert not {"gate_up_proj", "_peftops_hooks"} & set(vars(module))
    assert not experts_module._recent
    assert type(again.model.layers[0].mlp.experts.down_proj).__name__ == "PackedExperts"


def test_experts_fail_cleanly(mixture):
    with enable(experts=True):
        model = load(mixture, quantization_config=config(), dtype=torch.float32)
    layer = model.model.layers[0].mlp.experts
    with pytest.raises(RuntimeError):
        layer(torch.ones(2, 63), torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2))
    assert not {"gate_up_proj", "_peftops_hooks"} & set(vars(layer))
    with pytest.raises(NotImplementedError, match="cannot be dequantized for good"):
        model.dequantize()
