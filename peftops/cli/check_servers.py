"""What vLLM and SGLang make of a saved adapter: (verdict, text) of each finding."""

import re

from ..adapter_file import listed
from ..adapter_file.features import LACKED, MOVES_BASE, UNREAD

BASE_EMBEDDINGS = ".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight"
VLLM_RANKS = 1, 8, 16, 32, 64, 128, 256, 320, 512  # what --max-lora-rank may be
VLLM_RANK = 16  # what it is by default
VLLM_SAVES = "classifier", "score"


def for_vllm(adapter):
    """vLLM 0.33.0 (config/lora.py, lora/peft_helper.py, lora/lora_model.py, lora/utils.py)."""
    config = adapter.config
    if not adapter.is_lora:
        yield "refused", f"peft_type {config['peft_type']}: vLLM serves LoRA alone"
        return
    yield from foreign(config, "vLLM", "refused")
    for name, what in ("use_dora", "DoRA"), ("lora_bias", "biases of lora_B"):
        if config.get(name):
            yield "refused", f"{name}: vLLM has no {what}"
    if config["bias"] != "none":
        yield "refused", f"bias {config['bias']!r}: vLLM takes no biases"
    if others := [name for name in config["modules_to_save"] if name not in VLLM_SAVES]:
        yield (
            "refused",
            f"modules_to_save: vLLM takes {' and '.join(VLLM_SAVES)} alone, not {listed(others)}",
        )
    allowed = tuple(
        f".{name}.{tensor}" for name in VLLM_SAVES for tensor in ("weight", "bias")
    )
    if strange := [
        key for key in adapter.others if not key.endswith((*BASE_EMBEDDINGS, *allowed))
    ]:
        yield "refused", f"{listed(strange)}: no LoRA weight to vLLM"
    if adapter.rank > VLLM_RANKS[-1]:
        yield (
            "refused",
            f"rank {adapter.rank}: vLLM's --max-lora-rank ends at {VLLM_RANKS[-1]}",
        )
    elif adapter.rank > VLLM_RANK:
        least = min(rank for rank in VLLM_RANKS if rank >= adapter.rank)
        yield "note", f"rank {adapter.rank}: needs --max-lora-rank {least}"
    names = {name.rpartition(".")[2] for name in config["target_parameters"]}
    if names - {"gate_up_proj", "down_proj"} or names == {"gate_up_proj"}:
        yield (
            "refused",
            "target_parameters: vLLM takes down_proj of experts,"
            " with or without gate_up_proj, alone",
        )
    elif names:
        yield (
            "note",
            "target_parameters: served where vLLM's model stacks its experts,"
            " and dropped elsewhere",
        )
    if any(".lora_embedding_" in key for key in adapter.tensors):
        yield (
            "note",
            "embeddings: served where vLLM's model allows them and has the same vocabulary",
        )


def for_sglang(adapter):
    """SGLang 0.5.23 (srt/lora/lora_config, lora, lora_manager, mem_pool and utils.py)."""
    config = adapter.config
    if not adapter.is_lora:
        yield "refused", f"peft_type {config['peft_type']}: SGLang serves LoRA alone"
        return
    yield from foreign(config, "SGLang", "dropped")
    if config.get("use_dora"):
        yield "refused", "use_dora: SGLang has no DoRA"
    if config.get("use_rslora"):
        yield (
            "dropped",
            "use_rslora: SGLang scales by lora_alpha / r,"
            " so that the adapter counts √r times less",
        )
    if any(rank != config["r"] for rank in config["rank_pattern"].values()):
        yield "refused", "rank_pattern: SGLang has one rank for all layers"
    if any(alpha != config["lora_alpha"] for alpha in config["alpha_pattern"].values()):
        yield "dropped", "alpha_pattern: SGLang scales all layers by lora_alpha / r"
    targets = config.get("target_modules")
    if not isinstance(targets, list) and targets not in ("all", "all-linear"):
        yield (
            "refused",
            f"target_modules {targets!r}: SGLang takes a list of names or all-linear",
        )
    if config["target_parameters"]:
        yield "refused", "target_parameters: SGLang has no such layers of experts"
    attention = {}
    for module in adapter.modules:
        owner, name = module.rpartition(".")[::2]
        if name in ("q_proj", "k_proj", "v_proj"):
            attention.setdefault(owner, set()).add(name)
    if alone := [
        owner for owner, names in attention.items() if not names >= {"q_proj", "v_proj"}
    ]:
        yield "refused", f"{listed(alone)}: SGLang wants q_proj and v_proj together"
    layers = [key for key in adapter.others if re.search(r"\.layers\.\d+\.", key)]
    layers += [key for key in adapter.tensors if key.endswith(".lora_B.bias")]
    if layers:
        yield "refused", f"{listed(layers)}: SGLang takes what is not lora_A for lora_B"
    if outside := [key for key in adapter.others if key not in layers]:
        yield "dropped", f"{listed(outside)}: SGLang keeps the base model's"
    if (adapter.folder / "added_tokens.json").exists():
        yield (
            "note",
            "added_tokens.json: SGLang refuses tokens that the base model's vocabulary has not",
        )


def foreign(config, server, verdict):
    """The features of PEFT that neither server computes. Not each server says so."""
    for name, what in (LACKED | UNREAD).items():
        if config.get(name):
            yield (
                verdict if name in LACKED else "dropped",
                f"{name}: {server} has no {what}",
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and MOVES_BASE.fullmatch(init):
        yield (
            verdict,
            f"init_lora_weights {init!r}: PEFT changes the base's weights by it,"
            f" {server} does not",
        )
