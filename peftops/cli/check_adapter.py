"""peftops check: whether a saved LoRA adapter loads in PEFT, vLLM and SGLang, and whether all of it counts there.

It reads the two files of the adapter and no model (peftops bench check is about kernels). A finding is `broken`: the
files contradict themselves; `refused`: loading raises; `dropped`: it loads and gives other numbers than in training; or
a `note`: the base model or a flag decides. Exit code 1: something is broken, refused or dropped.
"""

import dataclasses
import re
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from . import Parser, adapter, need, sentence

SHOWN = 8  # of what is broken
BAD = "broken", "refused", "dropped"
MOVES_BASE = re.compile("pissa.*|olora|corda|loftq", re.IGNORECASE)  # inits by which PEFT changes the base's weights
BASE_EMBEDDINGS = ".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight"
UNREAD = {"arrow_config": "Arrow", "kasa_config": "KaSA", "monteclora_config": "MonteCLoRA"}
LACKED = {
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "replicated layers",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
}
VLLM_RANKS, VLLM_RANK = (1, 8, 16, 32, 64, 128, 256, 320, 512), 16  # what --max-lora-rank may be, and is
VLLM_SAVES = "classifier", "score"


def options(argv):
    parser = Parser("peftops check", description=__doc__)
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="a folder with adapter_config.json")
    parser.add_argument(
        "--for", dest="target", choices=list(TARGETS), help="who shall load it; without it, all of them"
    )
    return parser.parse_args(argv)


def main(argv=None):
    o = options(argv)
    if o.target == "peft":
        need("peft")
    found = adapter.load(o.adapter)
    rows = [("files", "broken", fault) for fault in adapter.faults(found)]
    if len(rows) > SHOWN:
        rows[SHOWN:] = [("files", "broken", f"and {len(rows) - SHOWN} more")]
    for target in [o.target] if o.target else TARGETS:
        findings = list(TARGETS[target](found))
        if not any(verdict in BAD for verdict, _ in findings):
            findings.insert(0, ("ok", ""))
        rows += [(target, *finding) for finding in findings]
    print(found)
    for target, verdict, text in rows:
        print(f"{target:7} {verdict:8} {text}".rstrip())
    return int(any(verdict in BAD for _, verdict, _ in rows))


def for_peft(found):
    """What the config class of the installed PEFT says, and which tensors loading misses or skips."""
    if find_spec("peft") is None:
        yield "note", "PEFT is not installed, so the config was not compared with its fields"
        return
    from packaging.version import Version
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    here, config = version("peft"), found.config
    made = PEFT_TYPE_TO_CONFIG_MAPPING.get(config.get("peft_type"))
    if made is None:
        yield "refused", f"peft_type {config.get('peft_type')}: unknown to PEFT {here}"
        return
    known = {field.name for field in dataclasses.fields(made)}
    if unknown := sorted(name for name, value in config.items() if name not in known and value):
        yield "dropped", f"{', '.join(unknown)}: unknown to PEFT {here}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made(**{name: value for name, value in config.items() if name in known})
            newer = Version(config.get("peft_version") or "0") > Version(here)
    except Exception as error:  # each field has checks of its own
        yield "refused", sentence(error)
        return
    if newer:
        yield "note", f"PEFT {config['peft_version']} saved it, and PEFT {here} is installed"
    for name in config["modules_to_save"]:
        if not any(f".{name}." in key for key in found.others):
            yield "refused", f"modules_to_save: no tensor is of {name}"
    if found.is_lora and (strange := [key for key in found.others if not expected(key, config)]):
        yield "dropped", f"{listed(strange)}: no part of a LoRA adapter"


def expected(key, config):
    """Whether PEFT saves such a key beside those of LoRA layers."""
    saved = any(f".{name}." in key for name in config["modules_to_save"])
    bias = key.endswith(".bias") and config.get("bias", "none") != "none"
    resized = key.endswith((".embed_tokens.weight", ".lm_head.weight", *BASE_EMBEDDINGS))
    return saved or bias or resized or "trainable_tokens_delta" in key


def listed(keys):
    return adapter.plain(keys[0]) + f" and {len(keys) - 1} more" * (len(keys) > 1)


def for_vllm(found):
    """vLLM 0.33.0 (config/lora.py, lora/peft_helper.py, lora/lora_model.py, lora/utils.py)."""
    config = found.config
    if not found.is_lora:
        yield "refused", f"peft_type {config.get('peft_type')}: vLLM serves LoRA alone"
        return
    yield from foreign(config, "vLLM", "refused")
    for name, what in ("use_dora", "DoRA"), ("lora_bias", "biases of lora_B"):
        if config.get(name):
            yield "refused", f"{name}: vLLM has no {what}"
    if config.get("bias", "none") != "none":
        yield "refused", f"bias {config['bias']!r}: vLLM takes no biases"
    if others := [name for name in config["modules_to_save"] if name not in VLLM_SAVES]:
        yield "refused", f"modules_to_save: vLLM takes {' and '.join(VLLM_SAVES)} alone, not {', '.join(others)}"
    allowed = tuple(f".{name}.{part}" for name in VLLM_SAVES for part in ("weight", "bias"))
    if strange := [key for key in found.others if not key.endswith((*BASE_EMBEDDINGS, *allowed))]:
        yield "refused", f"{listed(strange)}: no LoRA weight to vLLM"
    if found.rank > VLLM_RANKS[-1]:
        yield "refused", f"rank {found.rank}: vLLM's --max-lora-rank ends at {VLLM_RANKS[-1]}"
    elif found.rank > VLLM_RANK:
        yield "note", f"rank {found.rank}: needs --max-lora-rank {min(r for r in VLLM_RANKS if r >= found.rank)}"
    names = {name.rpartition(".")[2] for name in config["target_parameters"]}
    if names - {"gate_up_proj", "down_proj"} or names == {"gate_up_proj"}:
        yield "refused", "target_parameters: vLLM takes down_proj of experts, with or without gate_up_proj, alone"
    elif names:
        yield "note", "target_parameters: served where vLLM's model stacks its experts, and dropped elsewhere"
    if any(".lora_embedding_" in key for key in found.tensors):
        yield "note", "embeddings: served where vLLM's model allows them and has the same vocabulary"


def for_sglang(found):
    """SGLang 0.5.23 (srt/lora/lora_config.py, lora.py, lora_manager.py, mem_pool.py, utils.py)."""
    config = found.config
    if not found.is_lora:
        yield "refused", f"peft_type {config.get('peft_type')}: SGLang serves LoRA alone"
        return
    yield from foreign(config, "SGLang", "dropped")
    if config.get("use_dora"):
        yield "refused", "use_dora: SGLang has no DoRA"
    if config.get("use_rslora"):
        yield "dropped", "use_rslora: SGLang scales by lora_alpha / r, so that the adapter counts √r times less"
    if any(rank != config["r"] for rank in config["rank_pattern"].values()):
        yield "refused", "rank_pattern: SGLang has one rank for all layers"
    if any(alpha != config["lora_alpha"] for alpha in config["alpha_pattern"].values()):
        yield "dropped", "alpha_pattern: SGLang scales all layers by lora_alpha / r"
    targets = config.get("target_modules")
    if not isinstance(targets, list) and targets not in ("all", "all-linear"):
        yield "refused", f"target_modules {targets!r}: SGLang takes a list of names or all-linear"
    if config["target_parameters"]:
        yield "refused", "target_parameters: SGLang has no such layers of experts"
    attention = {}
    for owner, _, name in (module.rpartition(".") for module in found.modules):
        if name in ("q_proj", "k_proj", "v_proj"):
            attention.setdefault(owner, set()).add(name)
    if alone := [owner for owner, names in attention.items() if not names >= {"q_proj", "v_proj"}]:
        yield "refused", f"{listed(alone)}: SGLang wants q_proj and v_proj together"
    layers = [key for key in found.others if re.search(r"\.layers\.\d+\.", key)]
    layers += [key for key in found.tensors if key.endswith(".lora_B.bias")]
    if layers:
        yield "refused", f"{listed(layers)}: SGLang takes what is not lora_A for lora_B"
    if outside := [key for key in found.others if key not in layers]:
        yield "dropped", f"{listed(outside)}: SGLang keeps the base model's"
    if (found.folder / "added_tokens.json").exists():
        yield "note", "added_tokens.json: SGLang refuses tokens that the base model's vocabulary has not"


def foreign(config, server, verdict):
    """What neither server computes, though not each says so."""
    for name, what in (LACKED | UNREAD).items():
        if config.get(name):
            yield verdict if name in LACKED else "dropped", f"{name}: {server} has no {what}"
    init = config.get("init_lora_weights")
    if isinstance(init, str) and MOVES_BASE.fullmatch(init):
        yield verdict, f"init_lora_weights {init!r}: PEFT changes the base's weights by it, {server} does not"


TARGETS = {"peft": for_peft, "vllm": for_vllm, "sglang": for_sglang}
