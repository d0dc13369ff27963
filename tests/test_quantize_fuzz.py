"""peftops quantize over spoilt checkpoints, and killed at any point: right weights or one sentence, no leftovers."""

import contextlib
import copy
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

from peftops import NF4Weight
from peftops.__main__ import main

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("rich")

CASES = 520
SLOWEST = 5.0  # seconds of one case; what takes longer has no end that a user waits for
INDEX = "model.safetensors.index.json"
LINEAR = [f"{part}_proj.weight" for part in ("q", "k", "v", "o", "gate", "up", "down")]
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
    None, True, 0, -1, 1, 3, 7, 10**9, 10**30, 0.5, 1e308, float("nan"), "", "x", "[/red]", "a\nb", "\ud800", "../x",
    [], [1], ["x", None], [[]], {}, {"a": 1}, {"quant_method": "fp8"}, "float16", "LlamaModel", "Trainer",
]  # fmt: skip
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64,
    torch.float8_e4m3fn, torch.uint16,
]  # fmt: skip
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


def llama(folder, **sizes):
    sizes = {"vocab_size": 32, "intermediate_size": 64, "num_hidden_layers": 2} | sizes
    config = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=1, **sizes
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(
        folder, max_shard_size="20KB"
    )
    (folder / "tokenizer.json").write_text("{}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    llama(folder)
    return files(folder)


def files(folder):
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def edit_json(name, change):
    def spoil(held, draw):
        value = json.loads(held[name])
        change(value, draw)
        held[name] = json.dumps(value).encode()

    return spoil


def edit_config(config, draw):
    key = draw.choice(
        [*config, "metadata", "auto_map", "quantization_config", "layer_types", "num_labels"]
    )
    config[key] = draw.choice(WEIRD)
    if draw.random() < 0.2:
        del config[draw.choice([*config])]


def edit_index(index, draw):
    key = draw.choice([*index["weight_map"]]) if draw.random() < 0.8 else "more\x1b[31m"
    index["weight_map"][key] = draw.choice(
        [*index["weight_map"].values(), *WEIRD, *WEIRD, "x" * 300]
    )
    if draw.random() < 0.5:
        index[draw.choice(["metadata", "weight_map"])] = draw.choice(WEIRD)


def nest(held, draw):
    """A value in the JSON of config or index so deep that a parser or a printer of it may overflow."""
    name = draw.choice(["config.json", INDEX])
    depth = draw.choice([5, 200, 5000, 100_000])
    held[name] = held[name].replace(b"{", b'{"deep": ' + b"[" * depth + b"]" * depth + b",", 1)


def shard(held, draw):
    return draw.choice([name for name in held if name.endswith(".safetensors")])


def edit_header(held, draw):
    name = shard(held, draw)
    size = int.from_bytes(held[name][:8], "little")
    header, data = json.loads(held[name][8 : 8 + size]), held[name][8 + size :]
    key = draw.choice([*header])
    member = draw.choice(["dtype", "shape", "data_offsets", "name", "lost", "twice"])
    if member == "dtype":
        header[key]["dtype"] = draw.choice(NAMES)
    elif member in ("shape", "data_offsets"):
        header[key][member] = draw.choice(
            [[], [32, 32], [0, 2**62], [2**40, 2**40], [-1, 2], "x", None, [0, 64], [0]]
        )
    elif member == "name":
        header[key + draw.choice([".x", "\n", "\x1b[31m", "[/red]", "", "é"])] = header.pop(key)
    elif member == "lost":
        del header[key]
    text = json.dumps(header)
    if member == "twice":
        text = text.replace("{", "{" + f'"{key}": {json.dumps(header[key])},', 1)
    held[name] = len(text).to_bytes(8, "little") + text.encode() + data


def edit_tensors(held, draw):
    """Other values, dtypes, shapes, names and keys, in a file that is whole."""
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
        tensors[key] = (
            draw.choice([w[:0], w[:1], w[None], w.flatten(), w.mT if w.ndim > 1 else w[1:]])
            .clone()
            .contiguous()
        )
    elif change == "number":
        tensors[key] = w.float() if draw.random() < 0.5 else w
        tensors[key].view(-1)[draw.randrange(w.numel())] = number
    elif change == "rename":
        tensors[draw.choice([key.removeprefix("model."), "0.weight", "a.b", key + "."])] = (
            tensors.pop(key)
        )
    elif change == "twin":
        tensors[draw.choice([key.removeprefix("model."), f"model.{key}"])] = torch.zeros_like(w)
    elif change == "stray":
        tensors[f"{key}.{draw.choice(STATE)}"] = torch.ones(
            draw.choice([0, 1, 16, 64]), dtype=draw.choice(DTYPES)
        )
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
    """A name that a terminal or a markup would take for more than a name, also in the index."""
    name = shard(held, draw)
    new = draw.choice(
        ["[red].safetensors", "\x1b[31m.safetensors", "a b.safetensors", "é.safetensors"]
    )
    held[new] = held.pop(name)
    held[INDEX] = held[INDEX].replace(f'"{name}"'.encode(), json.dumps(new).encode())


MUTATIONS = [
    edit_json("config.json", edit_config), edit_json(INDEX, edit_index), nest, edit_header, edit_header, edit_tensors,
    edit_tensors, edit_tensors, cut, flip, rename_shard,
]  # fmt: skip


def mutated(whole, draw):
    held = copy.copy(whole)
    for mutate in draw.choices(MUTATIONS, k=draw.choice([1, 1, 2])):
        try:
            mutate(held, draw)
        except Exception:
            continue  # the mutation before it has left nothing to change
    return held


def loaded(held):
    """{key: tensor} as loading takes it: of two with one name the one in the last file."""
    return {
        k: v
        for n in sorted(held)
        if n.endswith(".safetensors")
        for k, v in safetensors.load(held[n]).items()
    }


def bits(t):
    return t.flatten().view(torch.uint8)


def right(source, out, config):
    """Is out source with the linear layers of this Llama quantized, tensor by tensor, and with nothing else?"""
    dtype = getattr(torch, config.get("dtype") or config["torch_dtype"])
    wanted, quantized = {}, set()
    for key, w in source.items():
        if f"{key}.quant_map" in out:
            quantized.add(key)
            wanted |= NF4Weight.quantize(w.to(dtype)).state_dict(key)
        else:
            wanted[key] = w if out[key].dtype == w.dtype else w.to(dtype)
    skipped = config["quantization_config"]["llm_int8_skip_modules"] or []
    lost = {
        key
        for key in source
        if is_linear(key, config) and key.removesuffix(".weight") not in skipped
    } - quantized
    same = [
        bits(wanted[key]).equal(bits(out[key])) and wanted[key].dtype == out[key].dtype
        for key in wanted
    ]
    return wanted.keys() == out.keys() and all(same) and not lost and quantized


def is_linear(key, config):
    layers = range(config["num_hidden_layers"])
    homes = [f"model.layers.{i}.{block}." for i in layers for block in ("self_attn", "mlp")]
    return any(key == home + part for home in homes for part in LINEAR)


def verdict(held, folder, capsys):
    """("quantized" or "refused", seconds), after everything that must hold is asserted."""
    for name, content in held.items():
        (folder / "model").mkdir(parents=True, exist_ok=True)
        (folder / "model" / name).write_bytes(content)
    start = time.perf_counter()
    code = main(["quantize", str(folder / "model"), str(folder / "out")])
    took = time.perf_counter() - start
    error = capsys.readouterr().err
    out = files(folder / "out") if (folder / "out").exists() else {}
    assert files(folder / "model") == held
    assert not (folder / "out" / "unfinished.files").exists()
    if code == 0:
        assert error == "" and "unfinished.json" not in out
        read = {name for name in held if name in json.loads(held[INDEX])["weight_map"].values()}
        source = loaded({name: held[name] for name in read})
        assert right(source, loaded(out), json.loads(out["config.json"]))
        return "quantized", took
    assert code == 2 and error.startswith("peftops quantize: ") and error[:-1].isprintable()
    assert "Traceback" not in error and "run it again" not in error
    assert not out or loaded({name: out[name] for name in out if name != "unfinished.json"}), (
        "shards that are whole"
    )
    return "refused", took


def no_prompt(*_):
    raise AssertionError("it asked")


def test_spoilt_checkpoints_give_right_weights_or_one_sentence(
    whole, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("builtins.input", no_prompt)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # no power is cut here
    draw, seen = random.Random(14), []
    for case in range(CASES):
        held = mutated(whole, draw)
        try:
            seen.append(verdict(held, tmp_path / str(case), capsys))
        except BaseException as error:
            raise AssertionError(f"case {case} is kept in {tmp_path / str(case)}") from error
        shutil.rmtree(tmp_path / str(case))
    ends = [end for end, _ in seen]
    assert ends.count("quantized") > CASES // 10 and ends.count("refused") > CASES // 3
    assert max(took for _, took in seen) < SLOWEST


KILLS = 50
SAVES = 5
HELD = {"unfinished.json", "unfinished.files"}


class Steps:
    """Counts lines of the command, and dies at one; a save of safetensors has a step in its middle."""

    def __init__(self, last=None):
        from peftops.cli import quantize
        from peftops.integrations.transformers import output, shards

        self.watched = {file.__file__: "quantize" for file in (quantize, shards)} | {
            output.__file__: "output"
        }
        self.kinds = []  # for each step where it is: "quantize", "output", or "save"
        self.last = last
        self.save = safetensors.save_file

    def step(self, kind):
        if len(self.kinds) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.kinds.append(kind)

    def trace(self, frame, event, _):
        kind = self.watched.get(frame.f_code.co_filename)
        if kind and event == "line":
            self.step(kind)
        return self.trace if kind else None

    def half(self, tensors, path, metadata):
        beside = Path(path).parent / ".tmp7Qx1aB"  # as safetensors does it
        beside.write_bytes(b"half of it")
        self.step("save")
        beside.unlink()
        self.save(tensors, path, metadata)


def in_fork(model, out, last=None, kinds=None):
    """The exit status of the command in a fork of this process, which is killed at step last."""
    child = os.fork()
    if not child:
        steps = Steps(last)
        if last is not None or kinds:
            safetensors.save_file = steps.half
            sys.settrace(steps.trace)
        code = main(["quantize", str(model), str(out)])
        if kinds:
            kinds.write_text(json.dumps(steps.kinds))
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def prepared(model):
    """What every fork would do again: imports, and reading the headers."""
    from peftops.integrations.transformers import checkpoint

    torch.set_num_threads(1)
    read = checkpoint.load(model)
    checkpoint.load = lambda folder: read
    assert transformers.BitsAndBytesConfig and import_module("rich.progress")
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115


def killed_at_steps(model, folder):
    """KILLS runs that die at a step drawn at random, some of them twice; after each a run to the end."""
    prepared(model)
    draw = random.Random(0)
    seen = [[in_fork(model, folder / "whole", kinds=folder / "kinds")]]
    kinds = json.loads((folder / "kinds").read_text())
    places = {
        kind: [i for i, other in enumerate(kinds) if other == kind]
        for kind in ("output", "quantize", "save")
    }
    for i in range(KILLS):
        out = folder / str(i)
        codes = [in_fork(model, out, draw.choice(places[draw.choice([*places])]))]
        shutil.copytree(out, folder / f"{i} killed") if out.exists() else (
            folder / f"{i} killed"
        ).mkdir()
        if i % 4 == 0:
            codes.append(in_fork(model, out, draw.choice(places["output"])))
        seen.append([*codes, in_fork(model, out)])
    (folder / "codes").write_text(json.dumps(seen))


def spawned(function, *args):
    """In a process of its own: one that has run kernels in threads must not fork."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_killed_at_any_step_it_goes_on_to_the_same_bytes(whole, tmp_path):
    for name, content in whole.items():
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes(content)
    spawned(killed_at_steps, tmp_path / "model", tmp_path)
    first, *codes = json.loads((tmp_path / "codes").read_text())
    assert first == [0] and len(codes) == KILLS
    wanted = files(tmp_path / "whole")
    assert HELD.isdisjoint(wanted) and whole.keys() == wanted.keys()
    half = 0
    for i, (one, *_, last) in enumerate(codes):
        held = files(tmp_path / f"{i} killed")
        half += "unfinished.files/.tmp7Qx1aB" in held
        ours = {
            name: content
            for name, content in held.items()
            if name.partition("/")[0] not in HELD
        }
        assert one == -signal.SIGKILL and ours.items() <= wanted.items(), (
            "what has its name is whole"
        )
        assert last in (0, 2), "it went on, or all was there"
        assert files(tmp_path / str(i)) == wanted and not [
            p for p in (tmp_path / str(i)).iterdir() if p.is_dir()
        ]
    assert half > KILLS // 5, "they died in the middle of a file"


def temporary(out):
    """The files that safetensors is writing, in OUT or in our folder of it."""
    found = []
    for folder in ("", "unfinished.files/"):
        with contextlib.suppress(FileNotFoundError):
            found += [
                folder + name for name in os.listdir(out / folder) if name.startswith(".tmp")
            ]
    return found


def killed_in_a_save(model, folder):
    """As soon as a file is seen that safetensors is writing, its process dies; what was left behind is listed."""
    prepared(model)
    left, codes = [], []
    for i in range(SAVES):
        out = folder / str(i)
        child = os.fork()
        if not child:
            os._exit(main(["quantize", str(model), str(out)]))
        while not temporary(out) and not (out / "config.json").exists():
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left.append(temporary(out))
        codes.append(main(["quantize", str(model), str(out)]))
    (folder / "seen").write_text(json.dumps([left, codes]))


def test_what_a_killed_save_leaves_is_cleared(tmp_path):
    llama(tmp_path / "model", vocab_size=200_000, num_hidden_layers=1)
    spawned(killed_in_a_save, tmp_path / "model", tmp_path)
    left, codes = json.loads((tmp_path / "seen").read_text())
    caught = [names for names in left if names]
    assert caught and all(
        name.startswith("unfinished.files/.tmp") for names in caught for name in names
    )
    assert main(["quantize", str(tmp_path / "model"), str(tmp_path / "whole")]) == 0
    for i, code in enumerate(codes):
        assert code == 0 and files(tmp_path / str(i)) == files(tmp_path / "whole")
