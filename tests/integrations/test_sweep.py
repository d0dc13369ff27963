"""Every architecture of transformers that small sizes build offline trains as with stock PEFT."""

import copy
import warnings

import pytest
import torch
from law import chain_bound, error, orders

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.tuners.lora.layer import LoraLayer
from tiny import exactly
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
)

import peftops

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SIZES = {  # what a small config has for these of its names
    "vocab_size": 64,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "embed_dim": 32,
    "emb_dim": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "n_head": 2,
    "n_heads": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "d_kv": 16,
    "intermediate_size": 48,
    "d_ff": 48,
    "n_inner": 48,
    "ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "hidden_dim": 48,
    "feed_forward_size": 48,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "image_size": 16,
    "patch_size": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "embedding_size": 32,
    "attention_window": 4,
    "num_labels": 2,
    "rotary_dim": 8,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "sliding_window": 4,
}
DROPOUTS = "drop", "pdrop"  # one of them is in the name of each probability
MAPPINGS = (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
)
LARGEST = 20_000_000  # parameters


def classes():
    """{config class: the first model class for it}"""
    models = {}
    for config in MODEL_MAPPING:
        for mapping in MAPPINGS:
            try:
                model = mapping[config]
            except (
                KeyError,
                ValueError,
                ImportError,
            ):  # named by this transformers, but absent
                continue
            models.setdefault(config, model[0] if isinstance(model, tuple) else model)
    return models


def small(config):
    """A config of this class with small sizes, also in the configs inside of it."""
    outer = config()
    configs = [outer]
    for value in vars(outer).values():
        if isinstance(value, transformers.PretrainedConfig):
            configs.append(value)
    for each in configs:
        for name, value in list(vars(each).items()):
            if name in SIZES and type(value) is int:
                setattr(each, name, SIZES[name])
            elif any(word in name for word in DROPOUTS) and type(value) is float:
                setattr(each, name, 0.0)
            elif name == "layer_types" and isinstance(value, list):
                setattr(each, name, value[:2])
    return outer


def build(config, model):
    """A tiny model of this architecture with adapters that are not zero.

    None where small sizes do not make one.
    """
    try:
        small_config = small(config)
        with torch.device("meta"):
            on_meta = model(copy.deepcopy(small_config))
        if sum(p.numel() for p in on_meta.parameters()) > LARGEST:
            return None
        torch.manual_seed(0)
        base = model(small_config)
        getattr(base, "set_experts_implementation", str)("eager")
        options = {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "init_lora_weights": False,
        }
        adapted = peft.get_peft_model(base, peft.LoraConfig(**options))
        step(adapted)
    except Exception:  # somebody else's code may raise anything
        return None
    return adapted.eval()


def inputs_of(model):
    name = getattr(model.base_model.model, "main_input_name", "input_ids")
    if name == "pixel_values":
        return {
            name: torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        }
    tokens = torch.arange(18).view(2, 9) * 7 % 60 + 3
    inputs = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    return inputs


def step(model):
    """The first output, and gradients by name."""
    model.zero_grad()
    torch.manual_seed(1)
    dtype = next(model.parameters()).dtype
    inputs = {
        key: t.to(dtype) if t.is_floating_point() else t
        for key, t in inputs_of(model).items()
    }
    y = next(
        t
        for t in model(**inputs).to_tuple()
        if isinstance(t, torch.Tensor) and t.is_floating_point()
    )
    y.square().mean().backward()
    grads = {
        key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None
    }
    return {"y": y.detach()} | grads


def verdict(config, model):
    """What happened ("" where there is nothing to compare), and how many layers run fused."""
    stock = build(config, model)
    if stock is None:
        return "", 0
    try:
        exact = step(exactly(stock))
        draws = orders(lambda: step(stock))
    except Exception:  # some models cannot run in float64
        return "", 0
    if not all(t.isfinite().all() for draw in draws for t in draw.values()):
        return "", 0
    if not all(
        t.isfinite().all() for t in exact.values()
    ):  # some masks are for float32 only
        exact = {key: t.double() for key, t in draws[0].items()}
        draws = draws[1:]
    patched = peftops.patch(copy.deepcopy(stock))
    try:
        out = step(patched)
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}", 0
    limit = chain_bound([draw.values() for draw in draws], exact.values())
    if list(out) != list(exact) or not error(out.values(), exact.values()) <= limit:
        return f"{error(out.values(), exact.values()):.1e} over {limit:.1e}", 0
    report = peftops.report(patched)
    layers = sum(isinstance(layer, LoraLayer) for layer in patched.modules())
    assert report.fused + report.fallback == layers
    assert "not patched" not in report.reasons
    return "as stock", report.fused


@pytest.mark.filterwarnings("ignore")
def test_every_architecture():
    verdicts = {}
    fused = 0
    for config, model in classes().items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdicts[config.__name__], layers = verdict(config, model)
        fused += layers > 0
    compared = {name: text for name, text in verdicts.items() if text}
    assert {name: text for name, text in compared.items() if text != "as stock"} == {}
    assert fused > 200, (fused, len(compared), len(verdicts))
