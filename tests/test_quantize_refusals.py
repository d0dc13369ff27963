"""peftops quantize: bad models and bad folders are refused in one sentence."""

import shutil

import pytest
import torch
from checkpoints import (
    INDEX,
    Q,
    change_a_tensor,
    edit_index,
    edit_map,
    edit_tensors,
    files,
    llama,
    refused,
    set_config,
    shard,
    shard_of,
    truncate,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "model"
    return folder, llama(folder)


def no_weights(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def link_out(file):
    """Moves a file out of the folder, and leaves a link to it."""
    moved = file.parent.parent / f"aside {file.name}"
    file.rename(moved)
    file.symlink_to(moved)


def add_a_tensor(key, shape):
    def spoil(folder):
        edit_tensors(shard(folder), lambda held: held.update({key: torch.ones(shape)}))

    return spoil


def rename(key, other):
    """Renames a tensor in its shard and in the index."""

    def change(mapping):
        mapping[other] = mapping.pop(key)

    def spoil(folder):
        edit_tensors(shard_of(folder, key), change)
        edit_map(change)(folder)

    return spoil


BAD = {
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "there is no config.json",
    ),
    "config is not JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "cannot read",
    ),
    "config is a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "must hold a JSON object",
    ),
    "no safetensors": (no_weights, "has no weights in safetensors"),
    "already quantized": (
        lambda folder: set_config(folder, quantization_config={"load_in_4bit": True}),
        "already quantized",
    ),
    "unknown model": (
        lambda folder: set_config(folder, model_type="nothing", architectures=None),
        "cannot make the model",
    ),
    "integers": (change_a_tensor(Q, lambda w: w.to(torch.int8)), f"{Q} is I8"),
    "wrong shape": (
        change_a_tensor(Q, lambda w: w[:32].clone()),
        "must be (64, 64) by config.json, got (32, 64)",
    ),
    "truncated shard": (
        lambda folder: truncate(shard(folder)),
        "cannot read the shard",
    ),
    "shard of zeros": (
        lambda folder: shard(folder).write_bytes(bytes(5000)),
        "cannot read the shard",
    ),
    "lost shard": (lambda folder: shard(folder).unlink(), "lacks the shard"),
    "index is not JSON": (
        lambda folder: (folder / INDEX).write_text("{"),
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
    "config is deep": (
        lambda folder: set_config(folder, more=nested(500)),
        "nested more than 100 deep",
    ),
    "config is deeper": (
        lambda folder: (folder / "config.json").write_text('{"a":' * 100_000),
        "nested more than 100 deep",
    ),
    "endless layers": (
        lambda folder: set_config(folder, num_hidden_layers=10**9),
        "num_hidden_layers is 1000000000",
    ),
    "too many layers": (
        lambda folder: set_config(folder, num_hidden_layers=10**5),
        "asks for more than",
    ),
    "endless labels": (
        lambda folder: set_config(folder, num_labels=10**9),
        "num_labels is 1000000000",
    ),
    "another's code": (
        lambda folder: set_config(
            folder, model_type="new", auto_map={"AutoConfig": "a.A"}
        ),
        "cannot make the",
    ),
    "linked config": (
        lambda folder: link_out(folder / "config.json"),
        "is a link out of MODEL",
    ),
    "linked shard": (lambda folder: link_out(shard(folder)), "is a link out of MODEL"),
    "linked index": (
        lambda folder: link_out(folder / INDEX),
        "is a link out of MODEL",
    ),
    "one weight twice": (
        add_a_tensor(Q.removeprefix("model."), (64, 64)),
        f"holds {Q} twice",
    ),
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
    "index names too much": (
        edit_map(lambda m: m.update({"more": m[Q]})),
        "lacks more",
    ),
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
    assert "there is no folder" in refused(
        capsys, tmp_path / "nowhere", tmp_path / "out"
    )
    assert "is not empty: it holds mine.txt" in refused(
        capsys, folder, tmp_path / "notes"
    )
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
    assert "invalid choice" in refused(
        capsys, folder, tmp_path / "out", "--quant-type", "nf3"
    )
    assert files(folder.parent) == before and files(tmp_path) == {
        "notes/mine.txt": b"mine"
    }
