"""peftops check: what it finds in the tensors of an adapter, on the smallest that shows it."""

import json
import os

import numpy as np
import pytest
from adapters import (
    BIASED,
    DORA,
    DOWN,
    GATE_UP,
    HEAD,
    LAYER,
    PLAIN,
    STACKED,
    Q,
    V,
    factor_a,
    factor_b,
    ones,
    pair,
    save,
)

from peftops import adapter_file
from peftops.__main__ import main
from peftops.adapter_file import header, values
from peftops.cli import check as command

WITHOUT_A = pair(Q) | factor_b(V)
WITHOUT_B = pair(Q) | factor_a(V)
LOW_RANK_V = pair(Q) | pair(V, r=2)
NAN = PLAIN | {f"{V}.lora_B.weight": np.array([[1, 2, 3, np.nan]] * 6, np.float32)}


def bf16_of_bits(bits):
    """An adapter whose lora_A of V repeats one bf16 number."""
    tensor = np.full((4, 8), bits, np.uint16)
    return pair(Q) | {f"{V}.lora_A.weight": tensor} | factor_b(V, dtype=np.uint16)


@pytest.mark.parametrize(
    "tensors, config, says",
    [
        ({}, {}, ["no tensors are there"]),
        (WITHOUT_A, {}, ["v_proj: lora_B has no lora_A"]),
        (WITHOUT_B, {}, ["v_proj: lora_A has no lora_B"]),
        (
            PLAIN | factor_b(V, dtype=np.float16),
            {},
            ["v_proj: lora_A is F32 and lora_B F16"],
        ),
        (LOW_RANK_V, {}, ["v_proj: the rank is 2, and 4 in adapter_config.json"]),
        (LOW_RANK_V, {"rank_pattern": {"v_proj": 2}}, []),
        (LOW_RANK_V, {"rank_pattern": {"proj": 2}}, ["v_proj: the rank is 2, and 4"]),
        (LOW_RANK_V | factor_b(V), {}, ["v_proj: lora_A is (2, 8) and lora_B (6, 4)"]),
        (PLAIN | {f"{V}.lora_A.weight": ones(8)}, {}, ["v_proj: lora_A is (8,)"]),
        (
            PLAIN | factor_b(V, dtype=np.int8),
            {},
            ["v_proj.lora_B.weight is I8", "v_proj: lora_A is F32 and lora_B I8"],
        ),
        (NAN, {}, ["v_proj.lora_B.weight holds NaN or infinity"]),
        (bf16_of_bits(0x7F80), {}, ["v_proj.lora_A.weight holds NaN or infinity"]),
        (bf16_of_bits(0xFFC0), {}, ["v_proj.lora_A.weight holds NaN or infinity"]),
        (bf16_of_bits(0x7F7F), {}, []),
        (
            DORA,
            {},
            ["q_proj has a lora_magnitude_vector, unlike use_dora", "v_proj has a"],
        ),
        (
            PLAIN,
            {"lora_bias": True},
            ["q_proj has no lora_B.bias, unlike lora_bias", "v_proj has no"],
        ),
        (
            BIASED | {f"{V}.lora_B.bias": ones(3)},
            {"lora_bias": True},
            ["v_proj: lora_B.bias is (3,)"],
        ),
        (STACKED, {"target_parameters": [GATE_UP, DOWN]}, []),
        (
            STACKED,
            {},
            ["experts.base_layer: the rank is 12", "experts: the rank is 12"],
        ),
    ],
)
def test_files_that_contradict_themselves_are_broken(check, tensors, config, says):
    rows = [row for row in check("vllm", tensors, **config) if row.startswith("files")]
    assert len(rows) == len(says)
    for row, words in zip(rows, says, strict=True):
        assert row.startswith("files broken")
        assert words in row


def test_many_faults_are_cut_short(check):
    tensors = {f"{LAYER}.{i}.lora_A.weight": ones(4, 8) for i in range(20)}
    rows = check("vllm", tensors)
    assert len(rows) == command.SHOWN + 2
    assert rows[-2] == "files broken and 12 more"


@pytest.mark.parametrize("factor", "AB")
def test_a_factor_that_is_all_zero_is_noted(check, factor):
    zero = {f"{V}.lora_{factor}.weight": 0 * PLAIN[f"{V}.lora_{factor}.weight"]}
    [note, row] = check("vllm", PLAIN | zero)
    modules = "1 of 2 modules, model.layers.0.self_attn.v_proj"
    assert note.startswith(f"files note lora_{factor} is all zero in {modules}")
    assert row == "vllm ok"


def test_an_empty_factor_is_broken(check):
    empty = pair("base_model.model.fc", k=0)
    [row, ok] = check("vllm", PLAIN | empty)
    assert row.endswith("fc: lora_A is (4, 0) and lora_B (6, 4): one is empty")
    assert ok == "vllm ok"


def test_factors_of_different_layers_are_broken(check):
    mixed = {f"{V}.lora_embedding_A": ones(4, 8)} | factor_b(V)
    assert (
        "one of lora_A and lora_B is an embedding's"
        in check("vllm", pair(Q) | mixed)[0]
    )


def test_a_header_of_a_million_keys_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(header, "LARGEST_HEADER", 100)
    assert main(["check", str(save(tmp_path, PLAIN))]) == 2
    assert "has a header of more than" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_every_number_of_the_file_is_looked_at(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(values, "CHUNK", 16)
    zeros = {
        f"{module}.lora_{factor}.weight": np.zeros((2, 9), dtype)
        for module in (Q, V)
        for factor in "AB"
    }
    finite_and_zero = {
        np.nan: (False, False),
        -np.inf: (False, False),
        3: (True, False),
    }
    for key in zeros:
        for entry in range(18):
            for value, expected in finite_and_zero.items():
                changed = zeros[key].copy()
                changed.flat[entry] = value
                tensors = adapter_file.load(
                    save(tmp_path, zeros | {key: changed})
                ).tensors
                checked = {
                    name: (stored.finite, stored.zero)
                    for name, stored in tensors.items()
                }
                assert checked == dict.fromkeys(zeros, (True, True)) | {key: expected}


def test_holes_are_zero_and_not_read(tmp_path):
    """Two bytes of a terabyte are written.

    The second byte is half of an infinity; the other half lies in a hole.
    """
    size = 1 << 40
    header = {
        "a": {"dtype": "F32", "shape": [size // 8], "data_offsets": [0, size // 2]},
        "b": {"dtype": "F16", "shape": [size // 4], "data_offsets": [size // 2, size]},
    }
    text = json.dumps(header).encode()
    if len(text) % 2 == 0:
        text += b" "  # so that all numbers are at odd places
    path = save(tmp_path, {}) / adapter_file.WEIGHTS
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    start = 8 + len(text)
    os.truncate(path, start + size)
    if path.stat().st_blocks * 512 > size // 2:
        pytest.skip("this file system has no holes")

    def read():
        tensors = adapter_file.load(tmp_path).tensors
        return [(stored.finite, stored.zero) for stored in tensors.values()]

    def write(place, byte):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([byte]))

    assert read() == [(True, True), (True, True)]
    write(start + size - 2, 1)
    assert read() == [(True, True), (True, False)]
    write(size - (1 << 20), 0x7C)
    assert read() == [(True, True), (False, False)]


def test_a_key_cannot_forge_a_line(tmp_path, capsys):
    forged = f"{V}\nsglang  ok\r\x1b[1A\u202e.lora_C"
    [head] = HEAD.values()
    folder = save(tmp_path, PLAIN | {forged: head})
    assert main(["check", str(folder), "--for", "sglang"]) == 1
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    assert "v_proj\\nsglang  ok\\r\\x1b[1A\\u202e.lora_C" in lines[1]


def test_long_rows_keep_both_ends(check):
    row = check("vllm", PLAIN, bias="x" * 5000)[0]
    assert len(row) < command.WIDEST + 10
    assert row.endswith("takes no biases")
    assert "bias 'xxx" in row


def change_weights(change):
    """Returns spoil(folder), which replaces the bytes of the weights by change(bytes)."""

    def spoil(folder):
        file = folder / "adapter_model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return spoil


def write_config(text):
    return lambda folder: (folder / "adapter_config.json").write_text(text)


def save_with(**config):
    return lambda folder: save(folder, PLAIN, **config)


def remove(name):
    return lambda folder: (folder / name).unlink()


def overlapping(data):
    assert b"[128, 224]" in data
    return data.replace(b"[128, 224]", b"[124, 220]")


def first_shape(data):
    return data.replace(b"[4, 8]", b"[5, 8]", 1)


NOT_WHOLE = "is not a whole safetensors file"


@pytest.mark.parametrize(
    "spoil, says",
    [
        (remove("adapter_config.json"), "No such file"),
        (write_config("{"), "cannot read"),
        (write_config("[]"), "must hold a JSON object, got list"),
        (save_with(r="4"), "r must be a whole number from 1 on, got '4'"),
        (
            save_with(rank_pattern=["q"]),
            "rank_pattern must be an object of whole numbers from 1 on, got a list",
        ),
        (save_with(rank_pattern={"(": 4}), "rank_pattern '(' is no regex"),
        (remove("adapter_model.safetensors"), "has no adapter_model.safetensors"),
        (change_weights(lambda data: data[:-1]), NOT_WHOLE),
        (change_weights(lambda data: data + b"x"), NOT_WHOLE),
        (change_weights(overlapping), NOT_WHOLE),
        (change_weights(lambda data: data[:40]), NOT_WHOLE),
        (change_weights(lambda data: b""), "is empty"),
        (change_weights(lambda data: data[:8] + b"[" + data[9:]), NOT_WHOLE),
        (change_weights(first_shape), NOT_WHOLE),
    ],
)
def test_missing_and_broken_files_are_refused_in_one_sentence(
    tmp_path, capsys, spoil, says
):
    spoil(save(tmp_path, PLAIN))
    assert main(["check", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("peftops check: ")
    assert error.count("\n") == 1


def test_a_pickle_is_named_and_not_opened(tmp_path, capsys):
    weights = save(tmp_path, PLAIN) / "adapter_model.safetensors"
    weights.rename(tmp_path / "adapter_model.bin")
    assert main(["check", str(tmp_path)]) == 2
    assert "only adapter_model.bin: save it as safetensors" in capsys.readouterr().err
