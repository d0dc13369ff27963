"""peftops bench dora, and bench model of DoRA: who stands beside whom, what is computed, where it is shown."""

import json
from dataclasses import replace

import pytest
import torch
from commands import run
from peftops.bench import compare, dora, measure, model, nf4, peers, readme, results, timing
from peftops.bench.peers import BASE, COPY, FUSE, LORA, OURS, Problem
from result_lines import result_line

from peftops import NF4Weight
from peftops.nn import LoRALinear

pytest.importorskip("peft")
CPU = torch.device("cpu")
SMALL = Problem(
    (70, 64, 48, 4), torch.bfloat16, CPU, dora="peft"
)  # blocks of bitsandbytes end with rows


@pytest.fixture
def short(monkeypatch, one_thread):
    """One small layer with many rows and one with one, in samples of no length; nobody who has to be compiled."""
    monkeypatch.setattr(timing, "SHORTEST", 1e-4)
    monkeypatch.setattr(timing, "PATIENCE", 0.01)
    monkeypatch.setattr(
        dora,
        "layers",
        lambda *_: {"tiny": SMALL.shape, "tiny, one token": (1, *SMALL.shape[1:])},
    )
    monkeypatch.setitem(dora.PEERS, "dense", ("PEFT",))


def test_the_row_is_measured_and_kept(capsys, tmp_path, short):
    pytest.importorskip("bitsandbytes")
    code, out, _ = run(capsys, "bench", "dora", "--quick", "--out", str(tmp_path))
    assert code == 0 and "× peftops, LoRA" in out and "256 × 256, r = 16, NF4" in out
    (file,) = tmp_path.glob("*.jsonl")
    lines = {
        (line["layer"], line["dropout"], line["pass"]): line
        for line in map(json.loads, file.open())
    }
    both = "forward + backward"
    for base, theirs in (("", "PEFT"), (", NF4", nf4.PEER)):
        for p in (0.0, 0.1):
            assert {BASE, theirs, LORA, OURS} <= set(lines[f"tiny{base}", p, both]["ms"])
        other = lines[f"tiny{base}, dropout_mode lora", 0.1, both]
        assert set(other["ms"]) == {BASE, LORA, OURS} and other["op"] == "lora_fwd + lora_bwd"
        assert lines[f"tiny{base}", 0.1, both]["op"] == "dora_drop + lora_fwd + lora_bwd"
        assert lines[f"tiny, one token{base}", 0.0, "forward"]["op"] == "lora_gemv"
        norm = lines[f"256 × 256, r = 16{base}", 0.0, "norm"]
        assert set(norm["ms"]) == {OURS, "torch", "PEFT", COPY} and norm["shape"] == [
            256,
            256,
            16,
        ]
    assert (
        max(error for line in lines.values() for error in line.get("error", {}).values())
        < peers.WRONG
    )
    assert lines[dora.HOST[0], 0.0, "forward, grad"]["op"] == "host"


def test_compare_takes_rows(capsys, monkeypatch, short):
    monkeypatch.setattr(compare, "check_out", lambda commit, tree: results.HERE.parent)
    monkeypatch.setattr(compare, "resolve", lambda name: "0123456789ab")
    argv = "HEAD", "nf4", "--quick", "--shape", "70,64,48,4", "--dropout", "0", "dora", "nf4"
    code, out, _ = run(capsys, "bench", "compare", *argv)
    names = ("nf4, as asked", "dora, as asked", "dora, as asked, NF4")
    wanted = [
        f"{name} (70, 64, 48, 4), p = 0.0, {kind}"
        for name in names
        for kind in ("forward", "forward + backward")
    ]
    assert code == 0 and [line.partition(": ")[0] for line in out.splitlines()] == wanted
    assert out.count("× 0123456789ab's time") == len(wanted)


def test_without_bitsandbytes_it_is_named(monkeypatch):
    monkeypatch.setattr(dora, "find_spec", lambda name: None)
    labels, absent = dora.contenders(replace(SMALL, base="nf4, double"), ["reference"])
    assert labels == [BASE, f"{OURS}, frozen", LORA, OURS, f"{OURS}, reference"]
    assert absent == {"bitsandbytes": "is not installed"}
    assert (
        set(dora.norms(64, 64, 4, CPU, True, named := {})) == {OURS, "torch", "PEFT", COPY}
        and named == absent
    )


@pytest.mark.parametrize("mode", ["peft", "lora"])
def test_a_gain_is_part_of_what_is_computed(mode):
    """The layer's magnitudes are those of its weight, its adapter is not zero, and so its gain is not 1."""
    for base in ("dense", "nf4, double"):
        for label in (BASE, "PEFT", LORA, OURS):
            if (label, base) != ("PEFT", "nf4, double"):
                assert (
                    peers.contender(label, replace(SMALL, base=base, dora=mode)).error
                    < peers.WRONG
                )
    dora_y, lora_y = (
        peers.contender(label, SMALL).calls["forward"][0]() for label in (OURS, LORA)
    )
    assert (dora_y - lora_y).abs().max() > 0.05


def test_norms_of_all_are_the_same():
    for packed in (False, True):
        found = {
            label: calls["norm"][0]()
            for label, calls in dora.norms(96, 64, 4, CPU, packed, {}).items()
        }
        exact = found.pop(OURS)
        found.pop(COPY)
        assert exact.dtype is torch.float32
        assert all(((norm - exact).abs() / exact).max() < 0.01 for norm in found.values())


def test_costs():
    """LoRA's and z; in PEFT's dropout another product, which reads the weight, and both halves of x again."""
    from peftops.bench import lora

    m, k, n, _ = SMALL.shape
    for backward in (False, True):
        (flops, moved), passes = lora.cost(SMALL, backward), 2 if backward else 1
        assert dora.cost(SMALL, backward) == (flops, moved + passes * 2 * m * n)
        dropped = replace(SMALL, p=0.1)
        assert dora.cost(dropped, backward)[0] == flops + passes * 2 * m * k * n
        assert dora.cost(replace(dropped, dora="lora"), backward) == dora.cost(SMALL, backward)
    packed = replace(SMALL, base="nf4, double")
    assert dora.cost(packed)[1] == nf4.cost(packed)[1] + 2 * m * n
    one = replace(SMALL, shape=(1, *SMALL.shape[1:]))
    assert dora.cost(one) == lora.cost(one)


@pytest.mark.parametrize("method", ["dora", "qdora"])
def test_model(capsys, tmp_path, tiny, monkeypatch, method):
    if method == "qdora":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(timing, "SHORTEST", 1e-4)
    monkeypatch.setattr(timing, "PATIENCE", 0.01)
    monkeypatch.setattr(measure, "unlawful", lambda *_: None)
    monkeypatch.setattr(model, "TOKENS", 2)
    code, _, _ = run(
        capsys,
        "bench",
        "model",
        "--method",
        method,
        "--quick",
        "--rank",
        "4",
        "--out",
        str(tmp_path),
    )
    (file,) = tmp_path.glob("*.jsonl")
    plain, dropped, other, generated = map(json.loads, file.open())
    stock = "PEFT" if method == "dora" else nf4.PEER
    assert code == 0 and set(plain["ms"]) == set(dropped["ms"]) == set(generated["ms"]) == {
        BASE,
        stock,
        LORA,
        OURS,
    }
    assert set(other["ms"]) == {BASE, LORA, OURS} and other["layer"].endswith(
        f"{method}, dropout_mode lora"
    )
    assert (plain["dropout"], dropped["dropout"], other["dropout"]) == (0.0, 0.1, 0.1)
    assert generated["pass"] == "generate 2 tokens" and all(
        map(readme.in_table, (plain, other, generated))
    )
    assert {results.family(line) for line in (plain, other, generated)} == {"dora"}


def test_the_other_dropout_mode_shares_the_adapters(tiny):
    base, _ = tiny.load_model(None, torch.float32, CPU)
    built = tiny.build("DoRA, peftops", base, 4, 0.5, 0).model
    before = {id(p) for p in built.parameters() if p.requires_grad}
    layers = [m for m in model.undropped_base(built).modules() if isinstance(m, LoRALinear)]
    assert len(layers) == 14 and all(layer.dropout_mode == "lora" for layer in layers)
    assert {id(p) for p in built.parameters() if p.requires_grad} == before


def test_readme_has_tables_of_dora_and_its_norm(tmp_path):
    target = tmp_path / "README.md"
    target.write_text(" ".join(readme.MARKS))
    ratio = {BASE: 1.2, "PEFT": 0.5, LORA: 1.05}
    results.append(tmp_path / "a.jsonl", result_line())
    results.append(tmp_path / "a.jsonl", result_line(row="dora", ratio=ratio))
    results.append(
        tmp_path / "a.jsonl",
        result_line(row="model", layer="m, all linear layers, qdora", ratio=ratio),
    )
    norm = {"layer": "64 × 32, r = 8", "shape": [64, 32, 8], "op": "dora_norm", "pass": "norm"}
    results.append(
        tmp_path / "a.jsonl",
        result_line(row="dora", ratio={COPY: 2.0, "PEFT": 0.25, "torch": 0.5}, **norm),
    )
    assert readme.rewrite(target, tmp_path) == 4
    plain, layers, norms = target.read_text().split("**DoRA")
    assert (
        LORA not in plain
        and "| pass | PEFT | peftops, LoRA | **peftops** | of PEFT's time | of our LoRA's"
        in layers
    )
    assert layers.count("| 2.40 | 1.14 | **1.20** | 0.50 | 1.05 |") == 2 and "qdora" in layers
    assert "| n, k, r |" in norms and "| norm | 4.00 | 8.00 | **2.00** | 0.25 |" in norms


def test_the_copy_is_of_what_a_norm_reads():
    calls = dora.norms(64, 32, 4, CPU, True, {})[COPY]["norm"]
    assert (
        calls[0]().dtype is torch.uint8
        and calls[0]().numel() == NF4Weight.quantize(torch.ones(64, 32)).codes.numel()
    )


def test_a_model_with_fused_mlps_stands_beside_ours_with_memory(
    capsys, tmp_path, tiny, monkeypatch
):
    monkeypatch.setattr(timing, "SHORTEST", 1e-4)
    monkeypatch.setattr(timing, "PATIENCE", 0.01)
    monkeypatch.setattr(measure, "unlawful", lambda *_: None)
    monkeypatch.setattr(model, "TOKENS", 2)
    code, out, _ = run(
        capsys,
        "bench",
        "model",
        "--fuse",
        "mlp",
        "--quick",
        "--rank",
        "4",
        "--out",
        str(tmp_path),
    )
    (file,) = tmp_path.glob("*.jsonl")
    plain, dropped, generated = map(json.loads, file.open())
    assert code == 0 and set(plain["ms"]) == set(generated["ms"]) == {BASE, "PEFT", OURS, FUSE}
    assert (
        plain["saved_mb"][FUSE]
        < plain["saved_mb"][OURS]
        < plain["saved_mb"]["PEFT"]
        < dropped["saved_mb"]["PEFT"]
    )
    assert out.count("  kept for backward: ") == 2 and out.count(f"MB {FUSE}") == 5
