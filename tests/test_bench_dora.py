"""peftops bench dora, and bench model with DoRA: the peers, what is computed, and the tables."""

import json
from dataclasses import replace

import pytest
import torch
from commands import run
from peftops.bench import (
    compare,
    dora,
    lora,
    measure,
    model,
    nf4,
    peers,
    readme,
    results,
    timing,
)
from peftops.bench.peers import BASE, COPY, FUSE, LORA, OURS, Problem
from result_lines import result_line

from peftops import NF4Weight
from peftops.nn import LoRALinear

pytest.importorskip("peft")
CPU = torch.device("cpu")
# blocks of bitsandbytes end with rows
SMALL = Problem((70, 64, 48, 4), torch.bfloat16, CPU, dora="peft")
BOTH = "forward + backward"


@pytest.fixture
def short(monkeypatch, one_thread):
    """Makes the benches short.

    They measure a small layer with many rows and one with one row, in the shortest samples, and no
    peer that has to be compiled.
    """
    shapes = {"tiny": SMALL.shape, "tiny, one token": (1, *SMALL.shape[1:])}
    monkeypatch.setattr(timing, "SHORTEST", 1e-4)
    monkeypatch.setattr(timing, "PATIENCE", 0.01)
    monkeypatch.setattr(dora, "layers", lambda *_: shapes)
    monkeypatch.setitem(dora.PEERS, "dense", ("PEFT",))


def test_the_row_is_measured_and_kept(capsys, tmp_path, short):
    pytest.importorskip("bitsandbytes")
    code, out, _ = run(capsys, "bench", "dora", "--quick", "--out", str(tmp_path))
    assert code == 0
    assert "× peftops, LoRA" in out
    assert "256 × 256, r = 16, NF4" in out
    (file,) = tmp_path.glob("*.jsonl")
    lines = {
        (line["layer"], line["dropout"], line["pass"]): line
        for line in map(json.loads, file.open())
    }
    for base, theirs in (("", "PEFT"), (", NF4", nf4.PEER)):
        for p in (0.0, 0.1):
            assert {BASE, theirs, LORA, OURS} <= set(
                lines[f"tiny{base}", p, BOTH]["ms"]
            )
        undropped_base = lines[f"tiny{base}, dropout_mode lora", 0.1, BOTH]
        assert set(undropped_base["ms"]) == {BASE, LORA, OURS}
        assert undropped_base["op"] == "lora_fwd + lora_bwd"
        assert (
            lines[f"tiny{base}", 0.1, BOTH]["op"] == "dora_drop + lora_fwd + lora_bwd"
        )
        assert lines[f"tiny, one token{base}", 0.0, "forward"]["op"] == "lora_gemv"
        norm = lines[f"256 × 256, r = 16{base}", 0.0, "norm"]
        assert set(norm["ms"]) == {OURS, "torch", "PEFT", COPY}
        assert norm["shape"] == [256, 256, 16]
    errors = [
        error for line in lines.values() for error in line.get("error", {}).values()
    ]
    assert max(errors) < peers.WRONG
    assert lines[dora.HOST[0], 0.0, "forward, grad"]["op"] == "host"


def test_compare_takes_rows(capsys, monkeypatch, short):
    monkeypatch.setattr(compare, "check_out", lambda commit, tree: results.HERE.parent)
    monkeypatch.setattr(compare, "resolve", lambda name: "0123456789ab")
    argv = (
        "HEAD",
        "nf4",
        "--quick",
        "--shape",
        "70,64,48,4",
        "--dropout",
        "0",
        "dora",
        "nf4",
    )
    code, out, _ = run(capsys, "bench", "compare", *argv)
    names = ("nf4, as asked", "dora, as asked", "dora, as asked, NF4")
    titles = [
        f"{name} (70, 64, 48, 4), p = 0.0, {pass_name}"
        for name in names
        for pass_name in ("forward", BOTH)
    ]
    assert code == 0
    assert [line.partition(": ")[0] for line in out.splitlines()] == titles
    assert out.count("× 0123456789ab's time") == len(titles)


def test_bitsandbytes_is_named_where_it_is_absent(monkeypatch):
    monkeypatch.setattr(dora, "find_spec", lambda name: None)
    labels, absent = dora.contenders(replace(SMALL, base="nf4, double"), ["reference"])
    assert labels == [BASE, f"{OURS}, frozen", LORA, OURS, f"{OURS}, reference"]
    assert absent == {"bitsandbytes": "is not installed"}
    absent_from_norms = {}
    norms = dora.norms(64, 64, 4, CPU, True, absent_from_norms)
    assert set(norms) == {OURS, "torch", "PEFT", COPY}
    assert absent_from_norms == absent


@pytest.mark.parametrize("mode", ["peft", "lora"])
def test_a_gain_is_part_of_what_is_computed(mode):
    """The gain is not 1: magnitudes are those of the weight alone, and the adapter is not zero."""
    for base in ("dense", "nf4, double"):
        problem = replace(SMALL, base=base, dora=mode)
        for label in (BASE, "PEFT", LORA, OURS):
            if (label, base) != ("PEFT", "nf4, double"):
                assert peers.contender(label, problem).error < peers.WRONG
    dora_y = peers.contender(OURS, SMALL).calls["forward"][0]()
    lora_y = peers.contender(LORA, SMALL).calls["forward"][0]()
    assert (dora_y - lora_y).abs().max() > 0.05


def test_norms_of_all_are_the_same():
    for packed in (False, True):
        contenders = dora.norms(96, 64, 4, CPU, packed, {})
        norms = {label: calls["norm"][0]() for label, calls in contenders.items()}
        ours = norms.pop(OURS)
        norms.pop(COPY)
        assert ours.dtype is torch.float32
        for norm in norms.values():
            assert ((norm - ours).abs() / ours).max() < 0.01


def test_costs_of_dora_are_those_of_lora_and_more():
    """DoRA also moves z. PEFT's dropout adds a product, which reads the weight and x again."""
    m, k, n, _ = SMALL.shape
    for backward in (False, True):
        flops, moved = lora.cost(SMALL, backward)
        passes = 2 if backward else 1
        assert dora.cost(SMALL, backward) == (flops, moved + passes * 2 * m * n)
        dropped = replace(SMALL, p=0.1)
        assert dora.cost(dropped, backward)[0] == flops + passes * 2 * m * k * n
        assert dora.cost(replace(dropped, dora="lora"), backward) == dora.cost(
            SMALL, backward
        )
    packed = replace(SMALL, base="nf4, double")
    assert dora.cost(packed)[1] == nf4.cost(packed)[1] + 2 * m * n
    one = replace(SMALL, shape=(1, *SMALL.shape[1:]))
    assert dora.cost(one) == lora.cost(one)


@pytest.fixture
def short_model(monkeypatch):
    """Makes `bench model` short: the shortest samples, no check of the law, two tokens."""
    monkeypatch.setattr(timing, "SHORTEST", 1e-4)
    monkeypatch.setattr(timing, "PATIENCE", 0.01)
    monkeypatch.setattr(measure, "unlawful", lambda *_: None)
    monkeypatch.setattr(model, "TOKENS", 2)


@pytest.mark.parametrize("method", ["dora", "qdora"])
def test_a_model_is_measured_beside_its_peers(
    capsys, tmp_path, tiny, short_model, method
):
    if method == "qdora":
        pytest.importorskip("bitsandbytes")
    argv = ["--method", method, "--quick", "--rank", "4", "--out", str(tmp_path)]
    code, _, _ = run(capsys, "bench", "model", *argv)
    assert code == 0
    (file,) = tmp_path.glob("*.jsonl")
    plain, dropped, undropped_base, generated = map(json.loads, file.open())
    stock = "PEFT" if method == "dora" else nf4.PEER
    for line in (plain, dropped, generated):
        assert set(line["ms"]) == {BASE, stock, LORA, OURS}
    assert set(undropped_base["ms"]) == {BASE, LORA, OURS}
    assert undropped_base["layer"].endswith(f"{method}, dropout_mode lora")
    assert (plain["dropout"], dropped["dropout"]) == (0.0, 0.1)
    assert undropped_base["dropout"] == 0.1
    assert generated["pass"] == "generate 2 tokens"
    for line in (plain, undropped_base, generated):
        assert readme.in_table(line)
        assert results.family(line) == "dora"


def test_the_other_dropout_mode_shares_the_adapters(tiny):
    base, _ = tiny.load_model(None, torch.float32, CPU)
    adapted = tiny.build("DoRA, peftops", base, 4, 0.5, 0).model
    before = {id(p) for p in adapted.parameters() if p.requires_grad}
    layers = [
        m for m in model.undropped_base(adapted).modules() if isinstance(m, LoRALinear)
    ]
    assert len(layers) == 14
    assert all(layer.dropout_mode == "lora" for layer in layers)
    assert {id(p) for p in adapted.parameters() if p.requires_grad} == before


def test_readme_has_tables_of_dora_and_its_norm(tmp_path):
    target = tmp_path / "README.md"
    target.write_text(" ".join(readme.MARKS))
    file = tmp_path / "a.jsonl"
    ratio = {BASE: 1.2, "PEFT": 0.5, LORA: 1.05}
    norm = {
        "layer": "64 × 32, r = 8",
        "shape": [64, 32, 8],
        "op": "dora_norm",
        "pass": "norm",
        "ratio": {COPY: 2.0, "PEFT": 0.25, "torch": 0.5},
    }
    results.append(file, result_line())
    results.append(file, result_line(row="dora", ratio=ratio))
    layer = "m, all linear layers, qdora"
    results.append(file, result_line(row="model", layer=layer, ratio=ratio))
    results.append(file, result_line(row="dora", **norm))
    assert readme.rewrite(target, tmp_path) == 4
    plain, layers, norms = target.read_text().split("**DoRA")
    assert LORA not in plain
    columns = (
        "| pass | PEFT | peftops, LoRA | **peftops** | of PEFT's time | of our LoRA's"
    )
    assert columns in layers
    assert layers.count("| 2.40 | 1.14 | **1.20** | 0.50 | 1.05 |") == 2
    assert "qdora" in layers
    assert "| n, k, r |" in norms
    assert "| norm | 4.00 | 8.00 | **2.00** | 0.25 |" in norms


def test_the_copy_is_of_what_a_norm_reads():
    copied = dora.norms(64, 32, 4, CPU, True, {})[COPY]["norm"][0]()
    assert copied.dtype is torch.uint8
    assert copied.numel() == NF4Weight.quantize(torch.ones(64, 32)).codes.numel()


def test_a_model_with_fused_mlps_stands_beside_ours_with_memory(
    capsys, tmp_path, tiny, short_model
):
    argv = ["--fuse", "mlp", "--quick", "--rank", "4", "--out", str(tmp_path)]
    code, out, _ = run(capsys, "bench", "model", *argv)
    assert code == 0
    (file,) = tmp_path.glob("*.jsonl")
    plain, dropped, generated = map(json.loads, file.open())
    assert set(plain["ms"]) == set(generated["ms"]) == {BASE, "PEFT", OURS, FUSE}
    saved = plain["saved_mb"]
    assert saved[FUSE] < saved[OURS] < saved["PEFT"] < dropped["saved_mb"]["PEFT"]
    assert out.count("  kept for backward: ") == 2 and out.count(f"MB {FUSE}") == 5
