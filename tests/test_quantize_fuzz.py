"""peftops quantize over spoilt checkpoints: right weights, or one sentence."""

import copy
import json
import os
import random
import shutil
import time

import pytest
import torch
from checkpoints import INDEX, files, tiny_llama

from peftops import NF4Weight
from peftops.__main__ import main

safetensors = pytest.importorskip("safetensors.torch")

CASES = 520
SLOWEST = 5.0  # seconds a case may take; a user would not wait longer
LINEAR = [
    f"{layer}_proj.weight" for layer in ("q", "k", "v", "o", "gate", "up", "down")
]
STATE = [
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "quant_state.bitsandbytes__nf4",
    "SCB",
    "more",
]
WEIRD = [
    None,
    True,
    0,
    -1,
    1,
    3,
    7,
    10**9,
    10**30,
    0.5,
    1e308,
    float("nan"),
    "",
    "x",
    "[/red]",
    "a\nb",
    "\ud800",
    "../x",
    [],
    [1],
    ["x", None],
    [[]],
    {},
    {"a": 1},
    {"quant_method": "fp8"},
    "float16",
    "LlamaModel",
    "Trainer",
]
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.uint16,
]
NAMES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "F4",
    "F6_E2M3",
    "F8_E8M0",
    "I8",
    "U8",
    "U64",
    "C64",
    "X",
    3,
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    tiny_llama(folder)
    return files(folder)


def edit_json(name, change):
    def spoil(held, draw):
        value = json.loads(held[name])
        change(value, draw)
        held[name] = json.dumps(value).encode()

    return spoil


def edit_config(config, draw):
    key = draw.choice(
        [
            *config,
            "metadata",
            "auto_map",
            "quantization_config",
            "layer_types",
            "num_labels",
        ]
    )
    config[key] = draw.choice(WEIRD)
    if draw.random() < 0.2:
        del config[draw.choice([*config])]


def edit_index(index, draw):
    key = draw.choice([*index["weight_map"]]) if draw.random() < 0.8 else "more\x1b[31m"
    shards = [*index["weight_map"].values()]
    index["weight_map"][key] = draw.choice([*shards, *WEIRD, *WEIRD, "x" * 300])
    if draw.random() < 0.5:
        index[draw.choice(["metadata", "weight_map"])] = draw.choice(WEIRD)


def nest(held, draw):
    """Puts a deeply nested value into config or index, so that a parser or printer may overflow."""
    name = draw.choice(["config.json", INDEX])
    depth = draw.choice([5, 200, 5000, 100_000])
    held[name] = held[name].replace(
        b"{", b'{"deep": ' + b"[" * depth + b"]" * depth + b",", 1
    )


def shard(held, draw):
    return draw.choice([name for name in held if name.endswith(".safetensors")])


def edit_header(held, draw):
    name = shard(held, draw)
    size = int.from_bytes(held[name][:8], "little")
    header = json.loads(held[name][8 : 8 + size])
    data = held[name][8 + size :]
    key = draw.choice([*header])
    member = draw.choice(["dtype", "shape", "data_offsets", "name", "lost", "twice"])
    if member == "dtype":
        header[key]["dtype"] = draw.choice(NAMES)
    elif member in ("shape", "data_offsets"):
        header[key][member] = draw.choice(
            [[], [32, 32], [0, 2**62], [2**40, 2**40], [-1, 2], "x", None, [0, 64], [0]]
        )
    elif member == "name":
        header[key + draw.choice([".x", "\n", "\x1b[31m", "[/red]", "", "é"])] = (
            header.pop(key)
        )
    elif member == "lost":
        del header[key]
    text = json.dumps(header)
    if member == "twice":
        text = text.replace("{", "{" + f'"{key}": {json.dumps(header[key])},', 1)
    held[name] = len(text).to_bytes(8, "little") + text.encode() + data


def edit_tensors(held, draw):
    """Changes values, dtypes, shapes, names or keys, and writes a valid file."""
    name = shard(held, draw)
    tensors = safetensors.load(held[name])
    key = draw.choice([*tensors])
    w = tensors[key]
    number = draw.choice([float("nan"), float("inf"), 3e38, 0.0])
    change = draw.choice(
        ["dtype", "shape", "number", "rename", "twin", "stray", "stray", "many"]
    )
    if change == "dtype":
        tensors[key] = w.to(draw.choice(DTYPES))
    elif change == "shape":
        turned = w.mT if w.ndim > 1 else w[1:]
        view = draw.choice([w[:0], w[:1], w[None], w.flatten(), turned])
        tensors[key] = view.clone().contiguous()
    elif change == "number":
        tensors[key] = w.float() if draw.random() < 0.5 else w
        tensors[key].view(-1)[draw.randrange(w.numel())] = number
    elif change == "rename":
        new = draw.choice([key.removeprefix("model."), "0.weight", "a.b", key + "."])
        tensors[new] = tensors.pop(key)
    elif change == "twin":
        tensors[draw.choice([key.removeprefix("model."), f"model.{key}"])] = (
            torch.zeros_like(w)
        )
    elif change == "stray":
        size = draw.choice([0, 1, 16, 64])
        dtype = draw.choice(DTYPES)
        tensors[f"{key}.{draw.choice(STATE)}"] = torch.ones(size, dtype=dtype)
    else:
        tensors |= {f"more.{i}": torch.zeros(1) for i in range(100)}
    held[name] = safetensors.save(tensors, metadata={"format": "pt"})


def cut(held, draw):
    name = draw.choice([*held])
    place = draw.randrange(len(held[name]) + 1)
    held[name] = held[name][:place] + bytes(draw.choice([0, 0, 8]))


def flip(held, draw):
    name = draw.choice([*held])
    data = bytearray(held[name])
    for _ in range(draw.choice([1, 1, 4])):
        data[draw.randrange(min(len(data), 2000))] = draw.randrange(256)
    held[name] = bytes(data)


def rename_shard(held, draw):
    """Renames a shard, also in the index, so that a terminal or markup may misread its name."""
    name = shard(held, draw)
    new = draw.choice(
        [
            "[red].safetensors",
            "\x1b[31m.safetensors",
            "a b.safetensors",
            "é.safetensors",
        ]
    )
    held[new] = held.pop(name)
    held[INDEX] = held[INDEX].replace(f'"{name}"'.encode(), json.dumps(new).encode())


MUTATIONS = [
    edit_json("config.json", edit_config),
    edit_json(INDEX, edit_index),
    nest,
    edit_header,
    edit_header,
    edit_tensors,
    edit_tensors,
    edit_tensors,
    cut,
    flip,
    rename_shard,
]


def mutated(whole, draw):
    held = copy.copy(whole)
    for mutate in draw.choices(MUTATIONS, k=draw.choice([1, 1, 2])):
        try:
            mutate(held, draw)
        except Exception:
            continue  # an earlier mutation has left nothing to change
    return held


def loaded(held):
    """{key: tensor} as a model is loaded: of two with one key it takes that in the last file."""
    tensors = {}
    for name in sorted(held):
        if name.endswith(".safetensors"):
            tensors |= safetensors.load(held[name])
    return tensors


def bits(tensor):
    return tensor.flatten().view(torch.uint8)


def right(source, out, config):
    """Whether out is source with just the linear layers of this Llama quantized."""
    dtype = getattr(torch, config.get("dtype") or config["torch_dtype"])
    expected = {}
    quantized = set()
    for key, w in source.items():
        if f"{key}.quant_map" in out:
            quantized.add(key)
            expected |= NF4Weight.quantize(w.to(dtype)).state_dict(key)
        else:
            expected[key] = w if out[key].dtype == w.dtype else w.to(dtype)
    skipped = config["quantization_config"]["llm_int8_skip_modules"] or []
    linear = {key for key in source if is_linear(key, config)}
    lost = {
        key for key in linear if key.removesuffix(".weight") not in skipped
    } - quantized
    same = [
        bits(expected[key]).equal(bits(out[key]))
        and expected[key].dtype == out[key].dtype
        for key in expected
    ]
    return expected.keys() == out.keys() and all(same) and not lost and quantized


def is_linear(key, config):
    layers = range(config["num_hidden_layers"])
    blocks = [
        f"model.layers.{i}.{block}." for i in layers for block in ("self_attn", "mlp")
    ]
    return any(key == block + layer for block in blocks for layer in LINEAR)


def verdict(held, folder, capsys):
    """("quantized" or "refused", seconds) of one case; asserts all that must hold."""
    for name, content in held.items():
        (folder / "model").mkdir(parents=True, exist_ok=True)
        (folder / "model" / name).write_bytes(content)
    start = time.perf_counter()
    code = main(["quantize", str(folder / "model"), str(folder / "out")])
    seconds = time.perf_counter() - start
    error = capsys.readouterr().err
    out = files(folder / "out") if (folder / "out").exists() else {}
    assert files(folder / "model") == held
    assert not (folder / "out" / "unfinished.files").exists()
    if code == 0:
        assert error == "" and "unfinished.json" not in out
        shards = json.loads(held[INDEX])["weight_map"].values()
        source = loaded({name: held[name] for name in held if name in shards})
        assert right(source, loaded(out), json.loads(out["config.json"]))
        return "quantized", seconds
    assert (
        code == 2
        and error.startswith("peftops quantize: ")
        and error[:-1].isprintable()
    )
    assert "Traceback" not in error and "run it again" not in error
    shards = {
        name: content for name, content in out.items() if name != "unfinished.json"
    }
    assert not out or loaded(shards)  # what was written is whole
    return "refused", seconds


def no_prompt(*_):
    raise AssertionError("it asked")


def test_spoilt_checkpoints_give_right_weights_or_one_sentence(
    whole, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("builtins.input", no_prompt)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # no power is cut here
    draw = random.Random(14)
    verdicts = []
    for case in range(CASES):
        held = mutated(whole, draw)
        try:
            verdicts.append(verdict(held, tmp_path / str(case), capsys))
        except BaseException as error:
            raise AssertionError(
                f"case {case} is kept in {tmp_path / str(case)}"
            ) from error
        shutil.rmtree(tmp_path / str(case))
    ends = [end for end, _ in verdicts]
    assert ends.count("quantized") > CASES // 10 and ends.count("refused") > CASES // 3
    assert max(seconds for _, seconds in verdicts) < SLOWEST
