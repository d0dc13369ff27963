"""peftops quantize: it writes what bitsandbytes makes on loading, whatever interrupts it, and it spoils nothing."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch

from peftops import NF4Weight
from peftops.__main__ import main

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("rich")

IDS = torch.arange(24)[None]


def llama(folder, dtype=torch.bfloat16, **options):
    """Two layers in five shards, and what lies beside them."""
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
    }
    config = transformers.LlamaConfig(
        num_attention_heads=2, num_key_value_heads=1, **sizes | options
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size="50KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "training_args.bin").write_text("not for others")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    return model


def gpt2(folder):
    """Conv1D, whose weights are (in, out), a tied head, keys without the prefix of the whole model, fp32."""
    config = transformers.GPT2Config(
        vocab_size=128, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    model.transformer.save_pretrained(folder)
    set_config(folder, architectures=["GPT2LMHeadModel"])
    return model


def set_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "model"
    return folder, llama(folder)


def files(folder):
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def tensors(folder):
    return {
        k: v
        for file in sorted(folder.glob("*.safetensors"))
        for k, v in safetensors.load_file(file).items()
    }


def same(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k])] == []


OPTIONS = {
    "nf4": ([], {}),
    "flat": (["--no-double-quant"], {"double_quant": False}),
    "fp4": (["--quant-type", "fp4"], {"quant_type": "fp4"}),
    "128": (
        ["--blocksize", "128", "--no-double-quant"],
        {"blocksize": 128, "double_quant": False},
    ),
}


@pytest.mark.parametrize("options, settings", OPTIONS.values(), ids=OPTIONS)
def test_every_linear_layer_is_quantized_and_nothing_else(
    checkpoint, tmp_path, options, settings, capsys
):
    folder, model = checkpoint
    assert main(["quantize", str(folder), str(tmp_path / "out"), *options]) == 0
    shown = capsys.readouterr().out
    assert (
        "q_proj" in shown
        and "down_proj" in shown
        and "MB →" in shown
        and "lm_head" not in shown
    )
    wanted = {}
    for key, w in model.state_dict().items():
        linear = key.endswith("_proj.weight")
        wanted |= NF4Weight.quantize(w, **settings).state_dict(key) if linear else {key: w}
    same(tensors(tmp_path / "out"), wanted)
    shards = {
        f.name: list(safetensors.load_file(f)) for f in (tmp_path / "out").glob("*.safetensors")
    }
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: name for name, keys in shards.items() for key in keys}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in wanted.values())
    beside = {name for name in files(folder) if not name.endswith(".bin")}
    assert set(files(tmp_path / "out")) == beside and len(shards) > 3


def loaded(folder, **settings):
    """By stock transformers and bitsandbytes: on the fly where there are settings."""
    if settings:
        settings = {
            "quantization_config": transformers.BitsAndBytesConfig(
                load_in_4bit=True, **settings
            )
        }
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


MODELS = {
    "llama": llama,
    "gpt2": gpt2,
    "tied": lambda folder: llama(folder, tie_word_embeddings=True),
    "fp16": lambda folder: llama(folder, torch.float16),
    "fp32 in files, loaded in bf16": lambda folder: (
        llama(folder, torch.float32),
        set_config(folder, dtype="bfloat16"),
    ),
    "no dtype in config": lambda folder: (llama(folder), set_config(folder, dtype=None)),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_stock_transformers_loads_what_bitsandbytes_would_make(make, tmp_path):
    pytest.importorskip("bitsandbytes")
    make(tmp_path / "model")
    assert main(["quantize", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    ours = loaded(tmp_path / "out")
    options = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": ours.dtype,
    }
    theirs = loaded(tmp_path / "model", **options)
    same(ours.state_dict(), theirs.state_dict())
    assert any(".absmax" in key for key in ours.state_dict())
    assert torch.equal(
        ours(IDS).logits, theirs(IDS).logits
    )  # with gradients, as inference needs 64 | in_features


def test_layers_that_loading_makes_of_several_tensors_stay(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    config = transformers.AutoConfig.for_model(
        "hrm_text", vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=2, head_dim=32, H_cycles=1, L_cycles=1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    assert main(["quantize", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    assert "12 linear layers stay as they are" in capsys.readouterr().out
    ours = loaded(tmp_path / "out")
    skipped = ours.config.quantization_config.llm_int8_skip_modules
    options = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_skip_modules": skipped,
    }
    same(ours.state_dict(), loaded(tmp_path / "model", **options).state_dict())


@pytest.fixture
def interrupted(checkpoint, tmp_path, monkeypatch):
    """OUT after the third shard, and the names of the shards that are written from then on."""
    from peftops.integrations.transformers.shards import ShardWriter

    written, write = [], ShardWriter.write

    def stop(writer, name, advance):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(name)
        write(writer, name, advance)

    monkeypatch.setattr(ShardWriter, "write", stop)
    assert main(["quantize", str(checkpoint[0]), str(tmp_path / "out")]) == 130
    again = []
    monkeypatch.setattr(
        ShardWriter, "write", lambda *args: (again.append(args[1]), write(*args))
    )
    return tmp_path / "out", written, again


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def lose_a_tensor(path):
    held = safetensors.load_file(path)
    held.popitem()
    safetensors.save_file(held, path, metadata={"format": "pt"})


def break_a_state(path):
    held = safetensors.load_file(path)
    key = next(key for key in held if "quant_state" in key)
    held[key][:4] = 0
    safetensors.save_file(held, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "spoil", [truncate, lose_a_tensor, break_a_state, lambda path: path.write_bytes(b"")]
)
def test_finished_shards_are_kept_and_spoilt_ones_redone(
    checkpoint, tmp_path, interrupted, spoil
):
    out, written, again = interrupted
    spoil(out / written[1])
    assert main(["quantize", str(checkpoint[0]), str(out)]) == 0
    assert (
        again[0] == written[1] and not {written[0], written[2]} & set(again) and len(again) > 1
    )
    again.clear()
    assert main(["quantize", str(checkpoint[0]), str(tmp_path / "whole")]) == 0
    assert files(out) == files(tmp_path / "whole") and len(again) == len(
        list(out.glob("*.safetensors"))
    )


def refused(capsys, *argv):
    assert main(["quantize", *map(str, argv)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("peftops quantize: ")
    return error


def test_it_goes_on_only_with_the_same_model_and_options(
    checkpoint, tmp_path, interrupted, capsys
):
    out, *_ = interrupted
    before = files(out)
    capsys.readouterr()
    assert "with other options" in refused(capsys, checkpoint[0], out, "--blocksize", "128")
    shutil.copytree(checkpoint[0], tmp_path / "other", copy_function=shutil.copyfile)
    assert "from another model" in refused(capsys, tmp_path / "other", out)
    (out / "unfinished.json").write_text("half of i")
    assert "from another model" in refused(capsys, checkpoint[0], out)
    (out / "unfinished.json").write_bytes(before["unfinished.json"])
    assert files(out) == before


def no_weights(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def edit_index(change):
    def spoil(folder):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return spoil


def edit_map(change):
    return edit_index(lambda index: change(index["weight_map"]))


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def link_out(path):
    aside = path.parent.parent / f"aside {path.name}"
    path.rename(aside)
    path.symlink_to(aside)


def edit_shard(change):
    def spoil(folder):
        held = safetensors.load_file(shard(folder))
        change(held)
        safetensors.save_file(held, shard(folder), metadata={"format": "pt"})

    return spoil


def add_a_tensor(key, shape):
    return edit_shard(lambda held: held.update({key: torch.ones(shape)}))


def rename(key, other):
    def spoil(folder):
        names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        held = safetensors.load_file(folder / names[key])
        held[other] = held.pop(key)
        safetensors.save_file(held, folder / names[key], metadata={"format": "pt"})
        edit_map(lambda m: m.update({other: m.pop(key)}))(folder)

    return spoil


def shard(folder):
    return sorted(folder.glob("*.safetensors"))[2]


def change_a_tensor(key, change):
    def spoil(folder):
        name = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][
            key
        ]
        held = safetensors.load_file(folder / name)
        held[key] = change(held[key])
        safetensors.save_file(held, folder / name, metadata={"format": "pt"})

    return spoil


Q = "model.layers.1.self_attn.q_proj.weight"
BAD = {
    "no config": (lambda f: (f / "config.json").unlink(), "there is no config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "cannot read"),
    "config is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "must hold a JSON object",
    ),
    "no safetensors": (no_weights, "has no weights in safetensors"),
    "already quantized": (
        lambda f: set_config(f, quantization_config={"load_in_4bit": True}),
        "already quantized",
    ),
    "unknown model": (
        lambda f: set_config(f, model_type="nothing", architectures=None),
        "cannot make the model",
    ),
    "integers": (change_a_tensor(Q, lambda w: w.to(torch.int8)), f"{Q} is I8"),
    "wrong shape": (
        change_a_tensor(Q, lambda w: w[:32].clone()),
        "must be (64, 64) by config.json, got (32, 64)",
    ),
    "truncated shard": (lambda f: truncate(shard(f)), "cannot read the shard"),
    "shard of zeros": (lambda f: shard(f).write_bytes(bytes(5000)), "cannot read the shard"),
    "lost shard": (lambda f: shard(f).unlink(), "lacks the shard"),
    "index is not JSON": (
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        "cannot read",
    ),
    "index of nothing": (edit_map(dict.clear), "weight_map must name the file"),
    "index points elsewhere": (
        edit_map(lambda m: m.update({Q: "../x.safetensors"})),
        "beside it",
    ),
    "metadata is a list": (
        edit_index(lambda index: index.update(metadata=[])),
        "metadata must be a JSON object",
    ),
    "index is deep": (
        edit_index(lambda index: index.update(more=nested(200))),
        "nested more than 100 deep",
    ),
    "config is deep": (lambda f: set_config(f, more=nested(500)), "nested more than 100 deep"),
    "config is deeper": (
        lambda f: (f / "config.json").write_text('{"a":' * 100_000),
        "nested more than 100 deep",
    ),
    "endless layers": (
        lambda f: set_config(f, num_hidden_layers=10**9),
        "num_hidden_layers is 1000000000",
    ),
    "too many layers": (lambda f: set_config(f, num_hidden_layers=10**5), "asks for more than"),
    "endless labels": (lambda f: set_config(f, num_labels=10**9), "num_labels is 1000000000"),
    "another's code": (
        lambda f: set_config(f, model_type="new", auto_map={"AutoConfig": "a.A"}),
        "cannot make the",
    ),
    "linked config": (lambda f: link_out(f / "config.json"), "is a link out of MODEL"),
    "linked shard": (lambda f: link_out(shard(f)), "is a link out of MODEL"),
    "linked index": (
        lambda f: link_out(f / "model.safetensors.index.json"),
        "is a link out of MODEL",
    ),
    "one weight twice": (add_a_tensor(Q.removeprefix("model."), (64, 64)), f"holds {Q} twice"),
    "packed by another": (
        rename(Q, Q.replace("weight", "qweight")),
        "already quantized: it holds model.layers.1.self",
    ),
    "a name that moves the cursor": (
        edit_map(lambda m: m.update({"\x1b[2J": m[Q]})),
        "lacks \\x1b[2J",
    ),
    "a name too long": (
        edit_map(lambda m: m.update({Q: "x" * 300 + ".safetensors"})),
        "lacks the shard xxx",
    ),
    "index names too much": (edit_map(lambda m: m.update({"more": m[Q]})), "lacks more"),
}


@pytest.mark.parametrize("spoil, words", BAD.values(), ids=BAD)
def test_bad_models_are_refused_in_a_sentence(
    checkpoint, spoil, words, tmp_path, capsys, monkeypatch
):
    shutil.copytree(checkpoint[0], tmp_path / "model")
    spoil(tmp_path / "model")
    before = files(tmp_path / "model")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    assert words in refused(capsys, tmp_path / "model", tmp_path / "out")
    assert files(tmp_path / "model") == before and not (tmp_path / "out").exists()


def test_bad_places_are_refused_in_a_sentence(checkpoint, tmp_path, capsys):
    folder = checkpoint[0]
    before = files(folder.parent)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    assert "there is no folder" in refused(capsys, tmp_path / "nowhere", tmp_path / "out")
    assert "is not empty: it holds mine.txt" in refused(capsys, folder, tmp_path / "notes")
    assert "Not a directory" in refused(capsys, folder, tmp_path / "notes" / "mine.txt")
    assert "MODEL itself" in refused(capsys, folder, folder / ".." / folder.name)
    assert "inside MODEL" in refused(capsys, folder, folder / "deep" / "out")
    assert "inside OUT" in refused(capsys, folder, folder.parent)
    assert "--blocksize must be" in refused(
        capsys, folder, tmp_path / "out", "--blocksize", "48"
    )
    assert "no device 'cuda:77'" in refused(
        capsys, folder, tmp_path / "out", "--device", "cuda:77"
    )
    assert "invalid choice" in refused(capsys, folder, tmp_path / "out", "--quant-type", "nf3")
    assert files(folder.parent) == before and files(tmp_path) == {"notes/mine.txt": b"mine"}


def test_a_full_disk_ends_in_a_sentence_and_loses_nothing(
    checkpoint, tmp_path, capsys, monkeypatch
):
    save = safetensors.save_file

    def full(held, path, metadata):
        if "00003" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(held, path, metadata)

    monkeypatch.setattr(safetensors, "save_file", full)
    assert "No space left on device; run it again" in refused(
        capsys, checkpoint[0], tmp_path / "out"
    )
    assert {name[:11] for name in files(tmp_path / "out")} == {
        "model-00001",
        "model-00002",
        "unfinished.",
    }
    monkeypatch.setattr(safetensors, "save_file", save)
    assert main(["quantize", str(checkpoint[0]), str(tmp_path / "out")]) == 0


def alive():
    """{address: bytes} of the memory that tensors own."""
    tensors = [
        t for t in gc.get_objects() if type(t) is torch.Tensor and t.device.type == "cpu"
    ]
    return {t.untyped_storage().data_ptr(): t.nbytes for t in tensors}


def test_memory_holds_two_shards_at_most(checkpoint, tmp_path, monkeypatch):
    before, most = alive(), [0]
    quantize, save = NF4Weight.quantize, safetensors.save_file

    def counted(function):
        def call(*args, **options):
            most.append(sum(size for place, size in alive().items() if place not in before))
            return function(*args, **options)

        return call

    monkeypatch.setattr(NF4Weight, "quantize", counted(quantize))
    monkeypatch.setattr(safetensors, "save_file", counted(save))
    assert main(["quantize", str(checkpoint[0]), str(tmp_path / "out")]) == 0
    shards = [file.stat().st_size for file in checkpoint[0].glob("*.safetensors")]
    assert len(most) > 14 and max(most) <= 2 * max(shards) < sum(shards)
