"""peftops check: each finding on the smallest adapter that has it, and none on what PEFT saves."""

import json
import os
import time

import numpy as np
import pytest

from peftops import adapter_file
from peftops.__main__ import main
from peftops.adapter_file import header, names, values
from peftops.cli import check as command

LAYER = "base_model.model.model.layers.0"
Q, V = f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.v_proj"
EXPERTS = f"{LAYER}.mlp.experts"
HEAD = {"base_model.model.lm_head.weight": np.ones((6, 8), np.float32)}
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "uint16": "BF16", "int8": "I8"}


def pair(module, r=4, k=8, n=6, dtype=np.float32):
    return {
        f"{module}.lora_A.weight": np.ones((r, k), dtype),
        f"{module}.lora_B.weight": np.ones((n, r), dtype),
    }


PLAIN = pair(Q) | pair(V)


def save(folder, tensors, **config):
    """What PEFT would save; uint16 are the bits of bf16."""
    folder.mkdir(exist_ok=True)
    defaults = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(defaults | config))
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for key, array in tensors.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[key] = {
            "dtype": DTYPES[array.dtype.name],
            "shape": array.shape,
            "data_offsets": offsets,
        }
        data += array.tobytes()
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + data
    )
    return folder


@pytest.fixture
def check(tmp_path, capsys):
    """The rows of the table; the exit code says whether one of them is bad."""

    def run(target, tensors=PLAIN, **config):
        code = main(["check", str(save(tmp_path, tensors, **config)), "--for", target])
        rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()[1:]]
        assert code == any(verdict in command.BAD for _, verdict, *_ in rows)
        return [" ".join(row) for row in rows]

    return run


@pytest.mark.parametrize("target", ["vllm", "sglang"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_a_plain_adapter_loads(check, target, dtype):
    assert check(target, pair(Q, dtype=dtype) | pair(V, dtype=dtype)) == [f"{target} ok"]


def without(part):
    return {
        key: array
        for key, array in PLAIN.items()
        if not key.endswith(f"v_proj.lora_{part}.weight")
    }


def bits(value):
    return (
        pair(Q)
        | {f"{V}.lora_A.weight": np.full((4, 8), value, np.uint16)}
        | pair_b(V, np.uint16)
    )


def pair_b(module, dtype):
    return {f"{module}.lora_B.weight": np.ones((6, 4), dtype)}


NAN = PLAIN | {f"{V}.lora_B.weight": np.array([[1, 2, 3, np.nan]] * 6, np.float32)}
DORA = PLAIN | {f"{module}.lora_magnitude_vector": np.ones(6, np.float32) for module in (Q, V)}
BIASED = PLAIN | {f"{module}.lora_B.bias": np.ones(6, np.float32) for module in (Q, V)}
STACKED = PLAIN | pair(f"{EXPERTS}.base_layer", r=12) | pair(EXPERTS, r=12)
UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


@pytest.mark.parametrize(
    "tensors, config, says",
    [
        ({}, {}, ["no tensors are there"]),
        (without("A"), {}, ["v_proj: lora_B has no lora_A"]),
        (without("B"), {}, ["v_proj: lora_A has no lora_B"]),
        (PLAIN | pair_b(V, np.float16), {}, ["v_proj: lora_A is F32 and lora_B F16"]),
        (pair(Q) | pair(V, r=2), {}, ["v_proj: the rank is 2, and 4 in adapter_config.json"]),
        (pair(Q) | pair(V, r=2), {"rank_pattern": {"v_proj": 2}}, []),
        (
            pair(Q) | pair(V, r=2),
            {"rank_pattern": {"proj": 2}},
            ["v_proj: the rank is 2, and 4"],
        ),
        (
            pair(Q) | pair(V, r=2) | pair_b(V, np.float32),
            {},
            ["v_proj: lora_A is (2, 8) and lora_B (6, 4)"],
        ),
        (
            PLAIN | {f"{V}.lora_A.weight": np.ones(8, np.float32)},
            {},
            ["v_proj: lora_A is (8,)"],
        ),
        (
            PLAIN | pair_b(V, np.int8),
            {},
            ["v_proj.lora_B.weight is I8", "v_proj: lora_A is F32 and lora_B I8"],
        ),
        (NAN, {}, ["v_proj.lora_B.weight holds NaN or infinity"]),
        (bits(0x7F80), {}, ["v_proj.lora_A.weight holds NaN or infinity"]),
        (bits(0xFFC0), {}, ["v_proj.lora_A.weight holds NaN or infinity"]),
        (bits(0x7F7F), {}, []),
        (DORA, {}, ["q_proj has a lora_magnitude_vector, unlike use_dora", "v_proj has a"]),
        (
            PLAIN,
            {"lora_bias": True},
            ["q_proj has no lora_B.bias, unlike lora_bias", "v_proj has no"],
        ),
        (
            BIASED | {f"{V}.lora_B.bias": np.ones(3, np.float32)},
            {"lora_bias": True},
            ["v_proj: lora_B.bias is (3,)"],
        ),
        (STACKED, {"target_parameters": [UP, DOWN]}, []),
        (STACKED, {}, ["experts.base_layer: the rank is 12", "experts: the rank is 12"]),
    ],
)
def test_files_that_contradict_themselves_are_broken(check, tensors, config, says):
    rows = [row for row in check("vllm", tensors, **config) if row.startswith("files")]
    assert len(rows) == len(says)
    assert all(
        row.startswith("files broken") and words in row
        for row, words in zip(rows, says, strict=True)
    )


def test_many_faults_are_cut_short(check):
    rows = check(
        "vllm", {f"{LAYER}.{i}.lora_A.weight": np.ones((4, 8), np.float32) for i in range(20)}
    )
    assert len(rows) == command.SHOWN + 2 and rows[-2] == "files broken and 12 more"


COMMON = [
    (PLAIN, {"peft_type": "LOHA"}, "refused refused", "peft_type LOHA"),
    (DORA, {"use_dora": True}, "refused refused", "use_dora"),
    (BIASED, {"lora_bias": True}, "refused refused", "lora_B"),
    (PLAIN | HEAD, {"modules_to_save": ["lm_head"]}, "refused dropped", "lm_head"),
    (
        PLAIN | {f"{V}.base_layer.bias": np.ones(6, np.float32)},
        {"bias": "all"},
        "refused refused",
        "bias",
    ),
    (PLAIN, {"use_rslora": True}, "ok dropped", "use_rslora"),
    (PLAIN, {"alpha_pattern": {"v_proj": 32}}, "ok dropped", "alpha_pattern"),
    (PLAIN, {"alpha_pattern": {"v_proj": 8}}, "ok ok", ""),
    (pair(Q) | pair(V, r=2), {"rank_pattern": {"v_proj": 2}}, "ok refused", "rank_pattern"),
    (PLAIN, {"rank_pattern": {"v_proj": 4}}, "ok ok", ""),
    (pair(Q, r=24) | pair(V, r=24), {"r": 24}, "note ok", "--max-lora-rank 32"),
    (pair(Q, r=600) | pair(V, r=600), {"r": 600}, "refused ok", "ends at 512"),
    (PLAIN, {"target_modules": ".*_proj"}, "ok refused", "target_modules"),
    (STACKED, {"target_parameters": [UP, DOWN]}, "note refused", "target_parameters"),
    (
        PLAIN | pair(EXPERTS, r=12),
        {"target_parameters": [UP]},
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
    (PLAIN, {"init_lora_weights": "pissa_niter_4"}, "refused dropped", "init_lora_weights"),
    (PLAIN, {"init_lora_weights": "gaussian"}, "ok ok", ""),
]


@pytest.mark.parametrize(
    "tensors, config, verdicts, says", COMMON, ids=[str(case[1])[:50] for case in COMMON]
)
def test_what_servers_refuse_or_drop(check, tensors, config, verdicts, says):
    for target, verdict in zip(("vllm", "sglang"), verdicts.split(), strict=True):
        rows = check(target, tensors, **config)
        if verdict == "ok":
            assert rows == [f"{target} ok"]
        else:
            assert any(row.startswith(f"{target} {verdict}") and says in row for row in rows)


def test_token_embeddings(check):
    embedding = "base_model.model.model.embed_tokens"
    tokens = {f"{embedding}.token_adapter.trainable_tokens_delta": np.ones((2, 8), np.float32)}
    assert check("vllm", PLAIN | tokens)[0].startswith(
        "vllm refused model.embed_tokens.token_adapter"
    )
    assert check("sglang", PLAIN | tokens)[0].startswith(
        "sglang dropped model.embed_tokens.token_adapter"
    )
    low_rank = {
        f"{embedding}.lora_embedding_{name}": a
        for name, a in zip("AB", pair("").values(), strict=True)
    }
    base = {f"{embedding}.base_layer.weight": np.ones((8, 6), np.float32)}
    assert [row[:9] for row in check("vllm", PLAIN | low_rank | base)] == [
        "vllm ok",
        "vllm note",
    ]


def test_added_tokens_are_noted(check, tmp_path):
    (tmp_path / "added_tokens.json").write_text('{"<new>": 99}')
    assert check("sglang")[1].startswith("sglang note added_tokens.json")


def trained(model):
    """No factor is zero any more."""
    for parameter in model.parameters():
        parameter.data.uniform_(1, 2)


@pytest.mark.parametrize("dora", [False, True])
def test_what_peft_saves_is_whole_and_its_own(tmp_path, capsys, dora):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    base = torch.nn.ModuleDict(
        {
            "lin": torch.nn.Linear(8, 6),
            "emb": torch.nn.Embedding(9, 8),
            "head": torch.nn.Linear(6, 2),
        }
    )
    config = peft.LoraConfig(
        r=4,
        target_modules=["lin", "emb"],
        rank_pattern={"emb": 2},
        use_dora=dora,
        modules_to_save=["head"],
    )
    model = peft.get_peft_model(base, config)
    trained(model)
    model.save_pretrained(tmp_path)
    assert main(["check", str(tmp_path), "--for", "peft"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert (
        second.split() == ["peft", "ok"]
        and f"rank 4, 2 modules, F32, saved by PEFT {peft.__version__}" in first
    )


@pytest.mark.parametrize(
    "tensors, config, says",
    [
        (PLAIN, {"peft_type": "NEW"}, "peft refused peft_type NEW"),
        (PLAIN, {"new_field": True, "other": None}, "peft dropped new_field: unknown to PEFT"),
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
        (PLAIN | {"stranger": np.ones(2, np.float32)}, {}, "peft dropped stranger: no part"),
    ],
)
def test_what_peft_refuses_or_drops(check, tensors, config, says):
    pytest.importorskip("peft")
    assert any(row.startswith(says) for row in check("peft", tensors, **config))


def test_every_target_has_a_row_and_peft_may_be_absent(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert main(["check", str(save(tmp_path, PLAIN))]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["peft", "ok"], ["peft", "note"], ["vllm", "ok"], ["sglang", "ok"]]


TOKENS = {
    "base_model.model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones(
        (2, 8), np.float32
    )
}


@pytest.mark.parametrize(
    "tensors, config, says",
    [
        (TOKENS, {"trainable_token_indices": [7, 9]}, "peft ok"),
        (
            TOKENS,
            {"trainable_token_indices": {"lm_head": [7, 8, 9], "embed_tokens": [7, 9]}},
            "peft ok",
        ),
        (
            TOKENS,
            {},
            "peft dropped base_model.model.embed_tokens.token_adapter.trainable_tokens_delta: train",
        ),
        (
            TOKENS,
            {"trainable_token_indices": [7]},
            "peft refused base_model.model.embed_tokens.token_adapter",
        ),
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
        (HEAD, {"modules_to_save": ["lm_head", "score"], "task_type": "SEQ_CLS"}, "peft ok"),
        (
            HEAD,
            {"modules_to_save": ["score"]},
            "peft refused modules_to_save: no tensor is of score",
        ),
        (
            {"base_model.model.norm.weight": np.ones(2, np.float32)},
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


@pytest.mark.parametrize("part", "AB")
def test_a_factor_that_is_all_zero_is_noted(check, part):
    zero = {f"{V}.lora_{part}.weight": 0 * PLAIN[f"{V}.lora_{part}.weight"]}
    [note, row] = check("vllm", PLAIN | zero)
    assert note.startswith(
        f"files note lora_{part} is all zero in 1 of 2 modules, model.layers.0.self_attn.v_proj"
    )
    assert row == "vllm ok"


def test_an_empty_factor_is_broken(check):
    empty = pair("base_model.model.fc", k=0)
    [row, ok] = check("vllm", PLAIN | empty)
    assert (
        row.endswith("fc: lora_A is (4, 0) and lora_B (6, 4): one is empty") and ok == "vllm ok"
    )


def test_a_header_of_a_million_keys_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(header, "LARGEST_HEADER", 100)
    assert main(["check", str(save(tmp_path, PLAIN))]) == 2
    assert "has a header of more than" in capsys.readouterr().err


def test_factors_of_different_layers_are_broken(check):
    mixed = {f"{V}.lora_embedding_A": np.ones((4, 8), np.float32)} | pair_b(V, np.float32)
    assert "one of lora_A and lora_B is an embedding's" in check("vllm", pair(Q) | mixed)[0]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_every_number_of_the_file_is_looked_at(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(values, "CHUNK", 16)
    whole = {
        f"{module}.lora_{part}.weight": np.zeros((2, 9), dtype)
        for module in (Q, V)
        for part in "AB"
    }
    for key in whole:
        for entry in range(18):
            for value, kind in (
                (np.nan, (False, False)),
                (-np.inf, (False, False)),
                (3, (True, False)),
            ):
                changed = whole[key].copy()
                changed.flat[entry] = value
                tensors = adapter_file.load(save(tmp_path, whole | {key: changed})).tensors
                found = {name: (stored.finite, stored.zero) for name, stored in tensors.items()}
                assert found == {name: kind if name == key else (True, True) for name in whole}


def test_holes_are_zero_and_not_read(tmp_path):
    """Of a terabyte two bytes are written. The second is half of an infinity, and a hole is its other half."""
    size = 1 << 40
    header = {"a": {"dtype": "F32", "shape": [size // 8], "data_offsets": [0, size // 2]}}
    header["b"] = {"dtype": "F16", "shape": [size // 4], "data_offsets": [size // 2, size]}
    text = json.dumps(header).encode()
    text += b" " * (len(text) % 2 == 0)  # so that all numbers are at odd places
    path = save(tmp_path, {}) / adapter_file.WEIGHTS
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    start = 8 + len(text)
    os.truncate(path, start + size)
    if path.stat().st_blocks * 512 > size // 2:
        pytest.skip("this file system has no holes")

    def read():
        return [
            (stored.finite, stored.zero)
            for stored in adapter_file.load(tmp_path).tensors.values()
        ]

    assert read() == [(True, True), (True, True)]
    for place, byte, wanted in (
        (start + size - 2, 1, (True, False)),
        (size - (1 << 20), 0x7C, (False, False)),
    ):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([byte]))
        assert read() == [(True, True), wanted]


def test_a_key_cannot_forge_a_line(tmp_path, capsys):
    forged = f"{V}\nsglang  ok\r\x1b[1A\u202e.lora_C"
    assert (
        main(
            [
                "check",
                str(save(tmp_path, PLAIN | {forged: HEAD[next(iter(HEAD))]})),
                "--for",
                "sglang",
            ]
        )
        == 1
    )
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 3 and all(line.isprintable() for line in lines)
    assert "v_proj\\nsglang  ok\\r\\x1b[1A\\u202e.lora_C" in lines[1]


def test_long_rows_keep_both_ends(check):
    row = check("vllm", PLAIN, bias="x" * 5000)[0]
    assert (
        len(row) < command.WIDEST + 10
        and row.endswith("takes no biases")
        and "bias 'xxx" in row
    )


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
def test_a_regex_that_explodes_is_refused_in_time(tmp_path, capsys, monkeypatch, config):
    monkeypatch.setattr(names, "SECONDS", 0.5)
    start = time.perf_counter()
    assert main(["check", str(save(tmp_path, PLAIN, **config))]) == 2
    assert "matching its names takes more than 0.5 seconds" in capsys.readouterr().err
    assert time.perf_counter() - start < 10 * names.SECONDS


@pytest.mark.parametrize("patterns", [["(", ")"], ["(?i)q_proj"], ["*"], ["(" * 5000]])
def test_regexes_are_compiled_as_peft_does(tmp_path, capsys, patterns):
    """Together the first would be one, and a flag is none inside of PEFT's."""
    assert (
        main(["check", str(save(tmp_path, PLAIN, rank_pattern=dict.fromkeys(patterns, 4)))])
        == 2
    )
    assert "is no regex" in capsys.readouterr().err


def rewritten(folder, change):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(change(path.read_bytes()))


def overlapping(data):
    assert b"[128, 224]" in data
    return data.replace(b"[128, 224]", b"[124, 220]")


def first_shape(data):
    return data.replace(b"[4, 8]", b"[5, 8]", 1)


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "No such file"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot read"),
        (
            lambda folder: (folder / "adapter_config.json").write_text("[]"),
            "must hold a JSON object, got list",
        ),
        (
            lambda folder: save(folder, PLAIN, r="4"),
            "r must be a whole number from 1 on, got '4'",
        ),
        (
            lambda folder: save(folder, PLAIN, rank_pattern=["q"]),
            "rank_pattern must be an object of whole numbers from 1 on, got a list",
        ),
        (
            lambda folder: save(folder, PLAIN, rank_pattern={"(": 4}),
            "rank_pattern '(' is no regex",
        ),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            "has no adapter_model.safetensors",
        ),
        (
            lambda folder: rewritten(folder, lambda data: data[:-1]),
            "is not a whole safetensors file",
        ),
        (
            lambda folder: rewritten(folder, lambda data: data + b"x"),
            "is not a whole safetensors file",
        ),
        (lambda folder: rewritten(folder, overlapping), "is not a whole safetensors file"),
        (
            lambda folder: rewritten(folder, lambda data: data[:40]),
            "is not a whole safetensors file",
        ),
        (lambda folder: rewritten(folder, lambda data: b""), "is empty"),
        (
            lambda folder: rewritten(folder, lambda data: data[:8] + b"[" + data[9:]),
            "is not a whole safetensors file",
        ),
        (lambda folder: rewritten(folder, first_shape), "is not a whole safetensors file"),
    ],
)
def test_missing_and_broken_files_are_one_sentence(tmp_path, capsys, spoil, says):
    spoil(save(tmp_path, PLAIN))
    assert main(["check", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("peftops check: ") and error.count("\n") == 1


def test_a_pickle_is_named_and_not_opened(tmp_path, capsys):
    (save(tmp_path, PLAIN) / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    assert main(["check", str(tmp_path)]) == 2
    assert "only adapter_model.bin: save it as safetensors" in capsys.readouterr().err
