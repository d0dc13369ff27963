"""Small checkpoints for tests of peftops quantize, and changes that spoil them."""

import json

import pytest
import torch

from peftops.__main__ import main

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("rich")

INDEX = "model.safetensors.index.json"
Q = "model.layers.1.self_attn.q_proj.weight"


def llama(folder, dtype=torch.bfloat16, **options):
    """Writes two layers in five shards, and the other files of a checkpoint."""
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


def tiny_llama(folder, **sizes):
    """Writes a model that is quantized in milliseconds, for tests that do it hundreds of times."""
    sizes = {"vocab_size": 32, "intermediate_size": 64, "num_hidden_layers": 2} | sizes
    config = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=1, **sizes
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer.json").write_text("{}")


def gpt2(folder):
    """Writes a GPT-2 in fp32.

    Its Conv1D weights are (in, out), its head is tied, and its keys lack the prefix of the
    whole model.
    """
    config = transformers.GPT2Config(
        vocab_size=128, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    model.transformer.save_pretrained(folder)
    set_config(folder, architectures=["GPT2LMHeadModel"])
    return model


def set_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def files(folder):
    """{name: bytes} of all files in a folder and below it."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def tensors(folder):
    """{key: tensor} of all shards."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.load_file(file)
    return tensors


def same(a, b):
    assert a.keys() == b.keys()
    assert [
        k for k in a if a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k])
    ] == []


def refused(capsys, *argv):
    """The one sentence with which peftops quantize refuses these arguments."""
    assert main(["quantize", *map(str, argv)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("peftops quantize: ")
    return error


def shard(folder):
    return sorted(folder.glob("*.safetensors"))[2]


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1000])


def edit_tensors(file, change):
    tensors = safetensors.load_file(file)
    change(tensors)
    safetensors.save_file(tensors, file, metadata={"format": "pt"})


def edit_index(change):
    def spoil(folder):
        file = folder / INDEX
        index = json.loads(file.read_text())
        change(index)
        file.write_text(json.dumps(index))

    return spoil


def edit_map(change):
    return edit_index(lambda index: change(index["weight_map"]))


def shard_of(folder, key):
    """The shard that holds a tensor by the index."""
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][key]


def change_a_tensor(key, change):
    def spoil(folder):
        edit_tensors(
            shard_of(folder, key), lambda held: held.update({key: change(held[key])})
        )

    return spoil
