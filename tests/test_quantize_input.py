"""peftops quantize: odd keys, values, links and sizes, which must not spoil the result silently."""

import json
import math
import shutil
import sys

import pytest
import torch
from checkpoints import (
    INDEX,
    Q,
    change_a_tensor,
    edit_index,
    files,
    llama,
    refused,
    same,
    set_config,
    tensors,
)

from peftops import NF4Weight
from peftops.__main__ import main
from peftops.cli import quantize

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def model(tmp_path):
    llama(tmp_path / "model")
    return tmp_path / "model"


def add(folder, tensors):
    """Adds tensors to a checkpoint, in a shard of their own that the index names."""
    safetensors.save_file(
        tensors, folder / "more.safetensors", metadata={"format": "pt"}
    )
    edit_index(
        lambda index: index["weight_map"].update(
            dict.fromkeys(tensors, "more.safetensors")
        )
    )(folder)


STATES = [
    NF4Weight.quantize(torch.ones(64, 64), 64, double, quant_type).state_dict(Q)
    for double in (False, True)
    for quant_type in ("nf4", "fp4")
]
STRAY = sorted({key for state in STATES for key in state} - {Q})


@pytest.mark.parametrize(
    "key",
    [
        *STRAY,
        Q.removeprefix("model.") + ".absmax",
        Q + ".absmax.0",
        "lm_head.weight.absmax",
    ],
)
@pytest.mark.parametrize("flat", [[], ["--no-double-quant"]], ids=["double", "flat"])
def test_no_key_of_the_source_takes_the_place_of_ours(model, key, flat, capsys):
    add(model, {key: torch.ones(64)})
    error = refused(capsys, model, model.parent / "out", *flat)
    assert f"is already quantized, or was in part: it holds {key}" in error
    assert not (model.parent / "out").exists()


@pytest.mark.parametrize("flat", [[], ["--no-double-quant"]], ids=["double", "flat"])
def test_a_quantized_model_is_refused(model, flat, capsys):
    out = model.parent / "out"
    assert main(["quantize", str(model), str(out), *flat]) == 0
    assert "already quantized" in refused(capsys, out, model.parent / "again")
    set_config(out, quantization_config=None)
    assert "already quantized" in refused(capsys, out, model.parent / "again")


def test_keys_that_are_no_part_of_a_state_are_copied(model):
    more = {
        Q + ".absmaximum": torch.ones(3),
        Q + ".more": torch.ones(2),
        "more.absmaxima": torch.zeros(1),
    }
    add(model, more)
    assert main(["quantize", str(model), str(model.parent / "out")]) == 0
    written = tensors(model.parent / "out")
    same({key: written[key] for key in more}, more)


def test_nan_is_the_worst_error_whichever_layer_has_it():
    for errors in ([math.nan, 1.0], [1.0, math.nan], [0.0, math.nan, 2.0, 1.0]):
        worst = 0.0
        for error in errors:
            worst = quantize.worse(worst, error)
        assert math.isnan(worst)
    assert quantize.worse(1.0, 2.0) == quantize.worse(2.0, 1.0) == 2.0


def test_the_table_shows_nan(model, capsys, monkeypatch):
    errors = iter([0.1, math.nan, *[0.1] * 100])
    monkeypatch.setattr(quantize, "distance", lambda w, q: next(errors))
    assert main(["quantize", str(model), str(model.parent / "out")]) == 0
    assert capsys.readouterr().out.count("nan │") == 1


NOT_FINITE = {
    "NaN": [math.nan],
    "inf": [math.inf] * 2,
    "both": [math.nan, -math.inf, math.inf],
}


@pytest.mark.parametrize("flat", [[], ["--no-double-quant"]], ids=["double", "flat"])
@pytest.mark.parametrize("values", NOT_FINITE.values(), ids=NOT_FINITE)
def test_a_weight_that_is_not_finite_is_named_and_counted_once(
    model, values, flat, capsys
):
    def spoil(w):
        w.view(-1)[torch.arange(len(values)) * 100] = torch.tensor(
            values, dtype=w.dtype
        )
        return w

    change_a_tensor(Q, spoil)(model)
    out = model.parent / "out"
    error = refused(capsys, model, out, *flat)
    layer = Q.removesuffix(".weight")
    reason = f"{len(values)} of its 4096 weights are NaN or infinite"
    assert f"{layer} cannot be quantized: {reason}" in error and error.count("NaN") == 1
    before = files(out)
    assert "unfinished.json" in before
    assert refused(capsys, model, out, *flat) == error
    assert files(out) == before


def test_values_that_overflow_in_the_dtype_of_the_model_are_named(model, capsys):
    change_a_tensor(Q, lambda w: w.float().index_fill_(0, torch.tensor([0]), 1e38))(
        model
    )
    set_config(model, dtype="float16")
    error = refused(capsys, model, model.parent / "out")
    assert "64 of its 4096 weights are NaN or infinite in torch.float16" in error


def in_one_file(model):
    """Puts all tensors of a checkpoint into one file, without an index."""
    merged = tensors(model)
    for file in model.glob("*.safetensors*"):
        file.unlink()
    safetensors.save_file(
        merged, model / "model.safetensors", metadata={"format": "pt"}
    )


def test_nothing_stays_where_the_first_shard_is_refused(model, capsys):
    change_a_tensor(Q, lambda w: w * math.nan)(model)
    in_one_file(model)
    assert "4096 of its 4096 weights are NaN" in refused(
        capsys, model, model.parent / "out"
    )
    assert files(model.parent / "out") == {}


def test_metadata_may_be_null(model):
    edit_index(lambda index: index.update(metadata=None))(model)
    out = model.parent / "out"
    assert main(["quantize", str(model), str(out)]) == 0
    size = sum(tensor.nbytes for tensor in tensors(out).values())
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"] == {"total_size": size}


def test_links_and_hidden_files_are_not_copied(model, tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "notes.txt").write_text("secret")
    (model / ".env").write_text("TOKEN=secret")
    (model / "notes.txt").symlink_to(secret / "notes.txt")
    (model / "inside.json").symlink_to(model / "tokenizer.json")
    (model / "nowhere.json").symlink_to(tmp_path / "nowhere")
    (model / "additional_chat_templates" / "notes.txt").symlink_to(secret / "notes.txt")
    assert main(["quantize", str(model), str(tmp_path / "out")]) == 0
    assert "4 links were not copied, such as inside.json" in capsys.readouterr().out
    written = files(tmp_path / "out")
    assert not [name for name, content in written.items() if b"secret" in content]
    assert not {".env", "notes.txt", "inside.json", "nowhere.json"} & written.keys()
    assert "tokenizer.json" in written
    shutil.rmtree(model / "additional_chat_templates")
    (model / "additional_chat_templates").symlink_to(secret)
    assert main(["quantize", str(model), str(tmp_path / "again")]) == 0
    written = files(tmp_path / "again")
    assert not [name for name, content in written.items() if b"secret" in content]


def test_a_snapshot_of_the_hubs_cache_is_a_model(model, tmp_path):
    """Its files are links into blobs/ of the same repository; only such links are followed."""
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "1f"
    blobs = repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(
        file for file in sorted(model.iterdir()) if file.is_file()
    ):
        shutil.copyfile(file, blobs / str(i))
        (snapshot / file.name).symlink_to(blobs / str(i))
    (tmp_path / "notes.txt").write_text("secret")
    (snapshot / "notes.txt").symlink_to(tmp_path / "notes.txt")
    shutil.rmtree(model / "additional_chat_templates")
    assert main(["quantize", str(snapshot), str(tmp_path / "out")]) == 0
    assert main(["quantize", str(model), str(tmp_path / "plain")]) == 0
    assert files(tmp_path / "out") == files(tmp_path / "plain")


def test_code_of_others_does_not_run(model, tmp_path, monkeypatch):
    """transformers' own class makes a known model, whatever code lies beside it; no question."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    set_config(
        model,
        auto_map={"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.B"},
        architectures=["Unknown"],
        attn_implementation="evil/kernel",
    )
    assert main(["quantize", str(model), str(tmp_path / "out")]) == 0
    assert not (tmp_path / "ran").exists()


def test_what_is_not_a_model_class_is_not_called(model, tmp_path):
    set_config(model, architectures=["TrainingArguments"])
    assert main(["quantize", str(model), str(tmp_path / "out")]) == 0


LAYERS = 4
GROWTH = 2.2  # twice, and a tenth more for calls that depend on the clock


def test_twice_the_keys_of_a_file_take_twice_the_calls(tmp_path):
    calls = []
    for factor in (1, 1, 2, 4):  # the first fills caches
        folder = tmp_path / f"{len(calls)}"
        llama(folder, num_hidden_layers=LAYERS * factor)
        in_one_file(folder)
        calls.append(0)

        def count(*_):
            calls[-1] += 1

        sys.setprofile(count)
        code = main(["quantize", str(folder), f"{folder} out"])
        sys.setprofile(None)
        assert code == 0
    _, once, twice, four = calls
    assert four - twice <= GROWTH * (twice - once)
