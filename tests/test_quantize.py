"""peftops quantize: it writes what bitsandbytes makes on loading, and survives interruptions."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import (
    INDEX,
    edit_tensors,
    files,
    gpt2,
    llama,
    refused,
    same,
    set_config,
    tensors,
    truncate,
)

from peftops import NF4Weight
from peftops.__main__ import main

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

IDS = torch.arange(24)[None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "model"
    return folder, llama(folder)


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
    assert "q_proj" in shown and "down_proj" in shown and "MB →" in shown
    assert "lm_head" not in shown
    expected = {}
    for key, w in model.state_dict().items():
        if key.endswith("_proj.weight"):
            expected |= NF4Weight.quantize(w, **settings).state_dict(key)
        else:
            expected[key] = w
    same(tensors(tmp_path / "out"), expected)
    shards = {
        file.name: list(safetensors.load_file(file))
        for file in (tmp_path / "out").glob("*.safetensors")
    }
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"] == {
        key: name for name, keys in shards.items() for key in keys
    }
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in expected.values()
    )
    copied = {name for name in files(folder) if not name.endswith(".bin")}
    assert set(files(tmp_path / "out")) == copied and len(shards) > 3


def loaded(folder, **settings):
    """The model as stock transformers loads it; with settings, bitsandbytes quantizes it."""
    options = {}
    if settings:
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, **settings)
        options["quantization_config"] = config
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def narrowed_by_config(folder):
    llama(folder, torch.float32)
    set_config(folder, dtype="bfloat16")


def without_dtype(folder):
    llama(folder)
    set_config(folder, dtype=None)


MODELS = {
    "llama": llama,
    "gpt2": gpt2,
    "tied": lambda folder: llama(folder, tie_word_embeddings=True),
    "fp16": lambda folder: llama(folder, torch.float16),
    "fp32 in files, loaded in bf16": narrowed_by_config,
    "no dtype in config": without_dtype,
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
    # gradients are on, as bitsandbytes' inference needs in_features that are multiples of 64
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_layers_that_are_loaded_from_several_tensors_stay(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    config = transformers.AutoConfig.for_model(
        "hrm_text",
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=32,
        H_cycles=1,
        L_cycles=1,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(
        tmp_path / "model"
    )
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
    """OUT after three shards, their names, and a list of the names of those written later."""
    from peftops.integrations.transformers.shards import ShardWriter

    written = []
    write = ShardWriter.write

    def stop(writer, name, advance):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(name)
        write(writer, name, advance)

    monkeypatch.setattr(ShardWriter, "write", stop)
    assert main(["quantize", str(checkpoint[0]), str(tmp_path / "out")]) == 130
    later = []

    def note(writer, name, advance):
        later.append(name)
        write(writer, name, advance)

    monkeypatch.setattr(ShardWriter, "write", note)
    return tmp_path / "out", written, later


def lose_a_tensor(file):
    edit_tensors(file, dict.popitem)


def break_a_state(file):
    def change(tensors):
        key = next(key for key in tensors if "quant_state" in key)
        tensors[key][:4] = 0

    edit_tensors(file, change)


def make_empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("spoil", [truncate, lose_a_tensor, break_a_state, make_empty])
def test_finished_shards_are_kept_and_spoilt_ones_redone(
    checkpoint, tmp_path, interrupted, spoil
):
    out, written, later = interrupted
    spoil(out / written[1])
    assert main(["quantize", str(checkpoint[0]), str(out)]) == 0
    assert later[0] == written[1] and len(later) > 1
    assert not {written[0], written[2]} & set(later)
    later.clear()
    assert main(["quantize", str(checkpoint[0]), str(tmp_path / "whole")]) == 0
    assert files(out) == files(tmp_path / "whole")
    assert len(later) == len(list(out.glob("*.safetensors")))


def test_it_goes_on_only_with_the_same_model_and_options(
    checkpoint, tmp_path, interrupted, capsys
):
    out, *_ = interrupted
    before = files(out)
    capsys.readouterr()
    assert "with other options" in refused(
        capsys, checkpoint[0], out, "--blocksize", "128"
    )
    shutil.copytree(checkpoint[0], tmp_path / "other", copy_function=shutil.copyfile)
    assert "from another model" in refused(capsys, tmp_path / "other", out)
    (out / "unfinished.json").write_text("half of i")
    assert "from another model" in refused(capsys, checkpoint[0], out)
    (out / "unfinished.json").write_bytes(before["unfinished.json"])
    assert files(out) == before


def test_a_full_disk_ends_in_a_sentence_and_loses_nothing(
    checkpoint, tmp_path, capsys, monkeypatch
):
    save = safetensors.save_file

    def full(tensors, file, metadata):
        if "00003" in str(file):
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, file, metadata)

    monkeypatch.setattr(safetensors, "save_file", full)
    error = refused(capsys, checkpoint[0], tmp_path / "out")
    assert "No space left on device; run it again" in error
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
        tensor
        for tensor in gc.get_objects()
        if type(tensor) is torch.Tensor
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not torch._is_functional_tensor(tensor)  # a compiler's, without memory
    ]
    return {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in tensors}


def test_memory_holds_two_shards_at_most(checkpoint, tmp_path, monkeypatch):
    before = alive()
    sizes = [0]

    def measured(function):
        def call(*args, **options):
            new = [size for address, size in alive().items() if address not in before]
            sizes.append(sum(new))
            return function(*args, **options)

        return call

    monkeypatch.setattr(NF4Weight, "quantize", measured(NF4Weight.quantize))
    monkeypatch.setattr(safetensors, "save_file", measured(safetensors.save_file))
    assert main(["quantize", str(checkpoint[0]), str(tmp_path / "out")]) == 0
    shards = [file.stat().st_size for file in checkpoint[0].glob("*.safetensors")]
    assert len(sizes) > 14 and max(sizes) <= 2 * max(shards) < sum(shards)
