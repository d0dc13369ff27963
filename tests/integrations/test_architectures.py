"""Tiny models of many architectures: every LoRA layer is fused, and one step is stock PEFT's."""

import copy
from collections import Counter

import pytest
import torch
from law import chain_bound, error, orders

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper
from tiny import TOKENS, adapted, exactly

import peftops

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 1}
HEADS = GROUPED | {"head_dim": 16}
HYBRID = HEADS | {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
SLIDING = HEADS | {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 4,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_mtp_layers": 0,
}
UNDROPPED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE = {"image_size": 16, "patch_size": 8}

MODELS = {  # model class: config class, its options
    "LlamaForCausalLM": ("LlamaConfig", GROUPED),
    "Qwen2ForCausalLM": ("Qwen2Config", GROUPED),
    "Qwen3ForCausalLM": ("Qwen3Config", HEADS),
    "Qwen3NextForCausalLM": (
        "Qwen3NextConfig",
        HYBRID | MOE | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "Qwen3_5ForCausalLM": ("Qwen3_5TextConfig", HYBRID),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", SLIDING),
    "Gemma4ForCausalLM": (
        "Gemma4TextConfig",
        SLIDING
        | {
            "global_head_dim": 16,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "MistralForCausalLM": ("MistralConfig", GROUPED),
    "Phi3ForCausalLM": ("Phi3Config", GROUPED),
    "GptOssForCausalLM": (
        "GptOssConfig",
        HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", SMALL | MOE | LATENT),
    "MixtralForCausalLM": ("MixtralConfig", GROUPED | {"num_local_experts": 4}),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "vocab_size": 64,
            "resid_pdrop": 0,
            "embd_pdrop": 0,
            "attn_pdrop": 0,
        },
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        {
            "d_model": 32,
            "d_kv": 16,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 2,
            "vocab_size": 64,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
    ),
    "BertForSequenceClassification": ("BertConfig", SMALL | UNDROPPED),
    "ViTForImageClassification": ("ViTConfig", SMALL | UNDROPPED | IMAGE),
    "LlavaForConditionalGeneration": (
        "LlavaConfig",
        {"image_token_index": 63, "image_seq_length": 4},
    ),
}
EXPERTS = {  # models of whose experts PEFT makes adapters, too
    "Qwen3NextForCausalLM",
    "DeepseekV3ForCausalLM",
    "MixtralForCausalLM",
}


def options_of(name, options):
    """The options of a config. Llava's has two configs inside."""
    if "Llava" not in name:
        return options
    vision = {key: SMALL[key] for key in SMALL if "size" in key or "num" in key} | IMAGE
    del vision["vocab_size"]
    return options | {
        "vision_config": transformers.CLIPVisionConfig(**vision),
        "text_config": transformers.LlamaConfig(**GROUPED),
    }


def build(name):
    config, options = MODELS[name]
    if not hasattr(transformers, name) or not hasattr(transformers, config):
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    config = getattr(transformers, config)(**options_of(name, options))
    base = getattr(transformers, name)(config)
    base.set_experts_implementation("eager")  # the others know no float64
    model = adapted(base, target_modules="all-linear")
    # Large enough that no gradient is near zero: there, only noise would be compared.
    for key, p in model.named_parameters():
        if "norm" not in key and "ln_" not in key:
            torch.nn.init.normal_(p, std=1.0 if "embed" in key or "wte" in key else 0.1)
    return model


def inputs_of(name):
    pixels = torch.randn(2, 3, 16, 16)
    tokens = TOKENS.clamp(3, 62)
    labels = torch.tensor([0, 1])
    if name.startswith("ViT"):
        return {"pixel_values": pixels, "labels": labels}
    if name.startswith("Bert"):
        return {"input_ids": tokens, "labels": labels}
    if name.startswith("Llava"):
        tokens = torch.cat([torch.full((2, 4), 63), tokens], 1)
        return {
            "pixel_values": pixels,
            "input_ids": tokens,
            "labels": tokens,
        }
    return {"input_ids": tokens, "labels": tokens}


def step(model, inputs):
    """The loss, and gradients by name."""
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    inputs = {
        key: t.to(dtype) if t.is_floating_point() else t for key, t in inputs.items()
    }
    loss = model(**inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | {
        key: p.grad for key, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_fused_and_a_step_is_stock(name):
    """Except layers of experts and of their routers, whose weights are in no nn.Linear."""
    model = build(name)
    inputs = inputs_of(name)
    patched = peftops.patch(copy.deepcopy(model))
    exact = step(exactly(model), inputs)
    same = orders(lambda: step(model, inputs))
    out = step(patched, inputs)
    assert list(out) == list(same[0])
    assert sum("lora_" in key for key in out) >= 8
    limit = chain_bound([draw.values() for draw in same], exact.values())
    assert error(out.values(), exact.values()) <= limit
    layers = Counter(
        type(layer) for layer in model.modules() if isinstance(layer, LoraLayer)
    )
    experts = layers.pop(ParamWrapper, 0)
    report = peftops.report(patched)
    assert report.fused == layers.pop(Linear) and not layers
    assert set(report.calls) == {"fused"}
    assert report.reasons == (
        {"layer is lora.layer.ParamWrapper": experts} if experts else {}
    )
    assert bool(experts) == (name in EXPERTS)
