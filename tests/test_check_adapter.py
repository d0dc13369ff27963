"""peftops check: what PEFT, vLLM and SGLang make of an adapter, and that plain ones pass."""

import time

import numpy as np
import pytest
from adapters import (
    BIASED,
    DORA,
    DOWN,
    EXPERTS,
    GATE_UP,
    HEAD,
    LAYER,
    PLAIN,
    STACKED,
    Q,
    V,
    ones,
    pair,
    save,
)

from peftops.__main__ import main
from peftops.adapter_file import names
from peftops.cli import check as command


@pytest.mark.parametrize("target", ["vllm", "sglang"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_a_plain_adapter_loads(check, target, dtype):
    assert check(target, pair(Q, dtype=dtype) | pair(V, dtype=dtype)) == [
        f"{target} ok"
    ]


# tensors, fields of the config, verdicts of vLLM and SGLang, a word of the row
SERVED = [
    (PLAIN, {"peft_type": "LOHA"}, "refused refused", "peft_type LOHA"),
    (DORA, {"use_dora": True}, "refused refused", "use_dora"),
    (BIASED, {"lora_bias": True}, "refused refused", "lora_B"),
    (PLAIN | HEAD, {"modules_to_save": ["lm_head"]}, "refused dropped", "lm_head"),
    (
        PLAIN | {f"{V}.base_layer.bias": ones(6)},
        {"bias": "all"},
        "refused refused",
        "bias",
    ),
    (PLAIN, {"use_rslora": True}, "ok dropped", "use_rslora"),
    (PLAIN, {"alpha_pattern": {"v_proj": 32}}, "ok dropped", "alpha_pattern"),
    (PLAIN, {"alpha_pattern": {"v_proj": 8}}, "ok ok", ""),
    (
        pair(Q) | pair(V, r=2),
        {"rank_pattern": {"v_proj": 2}},
        "ok refused",
        "rank_pattern",
    ),
    (PLAIN, {"rank_pattern": {"v_proj": 4}}, "ok ok", ""),
    (pair(Q, r=24) | pair(V, r=24), {"r": 24}, "note ok", "--max-lora-rank 32"),
    (pair(Q, r=600) | pair(V, r=600), {"r": 600}, "refused ok", "ends at 512"),
    (PLAIN, {"target_modules": ".*_proj"}, "ok refused", "target_modules"),
    (
        STACKED,
        {"target_parameters": [GATE_UP, DOWN]},
        "note refused",
        "target_parameters",
    ),
    (
        PLAIN | pair(EXPERTS, r=12),
        {"target_parameters": [GATE_UP]},
        "refused refused",
        "target_parameters",
    ),
    (
        PLAIN | pair(EXPERTS, r=12),
        {"target_parameters": ["mlp.experts.w"]},
        "refused refused",
        "target_parameters",
    ),
    (pair(Q), {}, "ok refused", "q_proj and v_proj together"),
    (pair(f"{LAYER}.self_attn.o_proj"), {}, "ok ok", ""),
    (PLAIN | pair(f"{EXPERTS}.3.up_proj"), {}, "ok ok", ""),
    (PLAIN, {"layer_replication": [[0, 1]]}, "refused dropped", "layer_replication"),
    (PLAIN, {"use_bdlora": {"nblocks": 2}}, "refused dropped", "BD-LoRA"),
    (PLAIN, {"arrow_config": {"top_k": 3}}, "dropped dropped", "arrow_config"),
    (
        PLAIN,
        {"init_lora_weights": "pissa_niter_4"},
        "refused dropped",
        "init_lora_weights",
    ),
    (PLAIN, {"init_lora_weights": "gaussian"}, "ok ok", ""),
]


@pytest.mark.parametrize(
    "tensors, config, verdicts, says",
    SERVED,
    ids=[str(case[1])[:50] for case in SERVED],
)
def test_what_servers_refuse_or_drop_is_said(check, tensors, config, verdicts, says):
    for target, verdict in zip(("vllm", "sglang"), verdicts.split(), strict=True):
        rows = check(target, tensors, **config)
        if verdict == "ok":
            assert rows == [f"{target} ok"]
        else:
            assert any(
                row.startswith(f"{target} {verdict}") and says in row for row in rows
            )


def test_servers_refuse_or_drop_token_embeddings(check):
    embedding = "base_model.model.model.embed_tokens"
    tokens = {f"{embedding}.token_adapter.trainable_tokens_delta": ones(2, 8)}
    module = "model.embed_tokens.token_adapter"
    assert check("vllm", PLAIN | tokens)[0].startswith(f"vllm refused {module}")
    assert check("sglang", PLAIN | tokens)[0].startswith(f"sglang dropped {module}")
    low_rank = {
        f"{embedding}.lora_embedding_A": ones(4, 8),
        f"{embedding}.lora_embedding_B": ones(6, 4),
    }
    base = {f"{embedding}.base_layer.weight": ones(8, 6)}
    rows = check("vllm", PLAIN | low_rank | base)
    assert [row[:9] for row in rows] == ["vllm ok", "vllm note"]


def test_added_tokens_are_noted(check, tmp_path):
    (tmp_path / "added_tokens.json").write_text('{"<new>": 99}')
    assert check("sglang")[1].startswith("sglang note added_tokens.json")


@pytest.mark.parametrize("dora", [False, True])
def test_what_peft_saves_is_whole_and_its_own(tmp_path, capsys, dora):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    layers = {
        "lin": torch.nn.Linear(8, 6),
        "emb": torch.nn.Embedding(9, 8),
        "head": torch.nn.Linear(6, 2),
    }
    config = peft.LoraConfig(
        r=4,
        target_modules=["lin", "emb"],
        rank_pattern={"emb": 2},
        use_dora=dora,
        modules_to_save=["head"],
    )
    model = peft.get_peft_model(torch.nn.ModuleDict(layers), config)
    for parameter in model.parameters():
        parameter.data.uniform_(1, 2)  # so that no factor is zero
    model.save_pretrained(tmp_path)
    assert main(["check", str(tmp_path), "--for", "peft"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert second.split() == ["peft", "ok"]
    assert f"rank 4, 2 modules, F32, saved by PEFT {peft.__version__}" in first


@pytest.mark.parametrize(
    "tensors, config, says",
    [
        (PLAIN, {"peft_type": "NEW"}, "peft refused peft_type NEW"),
        (
            PLAIN,
            {"new_field": True, "other": None},
            "peft dropped new_field: unknown to PEFT",
        ),
        (
            PLAIN,
            {"use_dora": True, "megatron_config": {"a": 1}},
            "peft refused DoRA does not support megatron",
        ),
        (PLAIN, {"peft_version": "99.1"}, "peft note PEFT 99.1 saved it"),
        (PLAIN, {"peft_version": "what?"}, "peft refused Invalid version"),
        (
            PLAIN,
            {"modules_to_save": ["lm_head"]},
            "peft refused modules_to_save: no tensor is of lm_head",
        ),
        (PLAIN | {"stranger": ones(2)}, {}, "peft dropped stranger: no part"),
    ],
)
def test_what_peft_refuses_or_drops_is_said(check, tensors, config, says):
    pytest.importorskip("peft")
    assert any(row.startswith(says) for row in check("peft", tensors, **config))


def test_every_target_has_a_row_and_peft_may_be_absent(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert main(["check", str(save(tmp_path, PLAIN))]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["peft", "ok"], ["peft", "note"], ["vllm", "ok"], ["sglang", "ok"]]


TOKEN_MODULE = "base_model.model.embed_tokens.token_adapter"
TOKENS = {f"{TOKEN_MODULE}.trainable_tokens_delta": ones(2, 8)}


@pytest.mark.parametrize(
    "tensors, config, says",
    [
        (TOKENS, {"trainable_token_indices": [7, 9]}, "peft ok"),
        (
            TOKENS,
            {"trainable_token_indices": {"lm_head": [7, 8, 9], "embed_tokens": [7, 9]}},
            "peft ok",
        ),
        (TOKENS, {}, f"peft dropped {TOKEN_MODULE}.trainable_tokens_delta: train"),
        (TOKENS, {"trainable_token_indices": [7]}, f"peft refused {TOKEN_MODULE}"),
        (
            {},
            {"trainable_token_indices": [7]},
            "peft refused trainable_token_indices: no tensor is a token_adapter",
        ),
        (
            HEAD,
            {"modules_to_save": ["lm_head", "score"]},
            "peft note modules_to_save: no tensor is of score",
        ),
        (
            HEAD,
            {"modules_to_save": ["lm_head", "score"], "task_type": "SEQ_CLS"},
            "peft ok",
        ),
        (
            HEAD,
            {"modules_to_save": ["score"]},
            "peft refused modules_to_save: no tensor is of score",
        ),
        (
            {"base_model.model.norm.weight": ones(2)},
            {},
            "peft note norm.weight: no part of a LoRA",
        ),
        (
            {},
            {"target_modules": ["q_proj", "v_proj", "fc"]},
            "peft note target_modules: no tensor is of fc, which",
        ),
        (
            {},
            {"layers_to_transform": [0, 5]},
            "peft note layers_to_transform: no tensor is of 5, which",
        ),
        (pair("base_model.model.lm_head"), {"ensure_weight_tying": True}, "peft ok"),
        (
            pair("base_model.model.lm_head"),
            {},
            "peft dropped lm_head: not of the modules that target_modules in",
        ),
    ],
)
def test_what_the_config_asks_for_is_there(check, tensors, config, says):
    pytest.importorskip("peft")
    rows = check("peft", PLAIN | tensors, **config)
    assert any(row.startswith(says) for row in rows)
    assert says == "peft ok" or len(rows) == 1 + says.startswith("peft note")


EXPLOSIVE = "(.|.)*!"


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": EXPLOSIVE},
        {"exclude_modules": EXPLOSIVE},
        {"modules_to_save": [EXPLOSIVE]},
        {"layers_pattern": [EXPLOSIVE], "layers_to_transform": [0]},
        {"rank_pattern": {EXPLOSIVE: 4}},
    ],
)
def test_a_regex_that_explodes_is_refused_in_time(
    tmp_path, capsys, monkeypatch, config
):
    monkeypatch.setattr(names, "SECONDS", 0.5)
    start = time.perf_counter()
    assert main(["check", str(save(tmp_path, PLAIN, **config))]) == 2
    assert "matching its names takes more than 0.5 seconds" in capsys.readouterr().err
    assert time.perf_counter() - start < 10 * names.SECONDS


@pytest.mark.parametrize("patterns", [["(", ")"], ["(?i)q_proj"], ["*"], ["(" * 5000]])
def test_regexes_are_compiled_as_peft_does(tmp_path, capsys, patterns):
    """The first two joined would be a regex; PEFT puts a flag inside its own, which is an error."""
    folder = save(tmp_path, PLAIN, rank_pattern=dict.fromkeys(patterns, 4))
    assert main(["check", str(folder)]) == 2
    assert "is no regex" in capsys.readouterr().err
