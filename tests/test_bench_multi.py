"""peftops bench multi: the peers of batches that mix adapters, what they compute, and the table."""

import json
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from commands import run
from fake_peers import FAKES, LORAFUSION, OTHERS, package
from law import error
from peftops.bench import (
    lora,
    measure,
    multi,
    peers,
    peers_gpu,
    peers_multi,
    readme,
    results,
    timing,
)
from peftops.bench.peers import BASE, LORA, OURS, Absent, Problem
from peftops.bench.worker import Remote
from result_lines import result_line

import peftops

pytest.importorskip("peft")
CPU = torch.device("cpu")
SMALL = Problem((72, 32, 48, 8), torch.float32, CPU, adapters=3, samples=3)
FEW = replace(SMALL, shape=(6, 32, 48, 8), samples=6)
MIXED = replace(SMALL, dtype=torch.bfloat16, uneven=True)
ONE = Problem((1, 32, 48, 4), torch.bfloat16, CPU)
BOTH = "forward + backward"
EVERYBODY = {BASE, *peers.MULTI, LORA}


@pytest.fixture
def short(monkeypatch, one_thread):
    """Makes the bench short: two small layers, one copy of each, in the shortest samples."""
    shapes = {"tiny": SMALL.shape, "tiny, 16 rows": (16, *SMALL.shape[1:])}
    monkeypatch.setattr(timing, "SHORTEST", 1e-4)
    monkeypatch.setattr(timing, "PATIENCE", 0.01)
    monkeypatch.setattr(timing, "ceilings", lambda *_: (1e10, 1e11))
    monkeypatch.setattr("peftops.bench.problem.copies", lambda *_: 1)
    monkeypatch.setattr(multi, "layers", lambda *_: shapes)
    monkeypatch.setattr(multi, "find_spec", lambda _: None)


def test_the_row_is_measured_and_kept(capsys, tmp_path, short):
    argv = ["multi", "--dtype", "fp32", "--out", str(tmp_path)]
    code, out, _ = run(capsys, "bench", *argv)
    assert code == 0
    assert "× torch, grouped_mm" in out
    (file,) = tmp_path.glob("*.jsonl")
    lines = {
        (line["layer"], line["dropout"], line["pass"]): line
        for line in map(json.loads, file.open())
    }
    for p in (0.0, 0.1):
        line = lines["tiny, 4 adapters", p, BOTH]
        assert set(line["ms"]) == EVERYBODY
        assert line["op"] == "multi_fwd + multi_bwd"
    assert lines["tiny, 16 rows, 1 adapter", 0.0, "forward"]["op"] == "lora_gemv"
    for adapters in (4, 16):
        few = lines[f"tiny, 16 rows, {adapters} adapters", 0.0, "forward"]
        assert set(few["ms"]) == EVERYBODY
        assert (few["op"], few["backend"]) == ("multi_gemv", "cpu")
    host = lines[multi.HOST[0], 0.0, "forward, grad"]
    assert set(host["ms"]) == {BASE, "PEFT", LORA, OURS}
    errors = [e for line in lines.values() for e in line.get("error", {}).values()]
    assert max(errors) < peers.WRONG


def test_packages_take_part_where_they_can(monkeypatch):
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(multi, "find_spec", lambda _: None)
    labels, absent = multi.contenders(on_gpu, [])
    assert set(labels) == EVERYBODY
    assert absent == dict.fromkeys(peers.MIXING, "is not installed")
    monkeypatch.setattr(multi, "find_spec", lambda label: label)
    labels, absent = multi.contenders(on_gpu, [])
    assert set(labels) == EVERYBODY | {"vllm", "sglang", "lorafusion"}
    assert absent == {}
    labels, absent = multi.contenders(SMALL, [])
    assert set(labels) == EVERYBODY | {"vllm"}
    assert absent == dict.fromkeys(["lorafusion", "sglang"], "runs on a GPU")


@pytest.mark.parametrize("uneven", [False, True])
def test_everybody_computes_the_same(uneven):
    """Our LoRA does so with the first adapter, whatever the sample's."""
    labels = [*EVERYBODY, f"{OURS}, reference"]
    assert labels[-1] in multi.contenders(SMALL, ["reference"])[0]
    for problem in (SMALL, FEW, replace(FEW, dtype=torch.bfloat16)):
        problem = replace(problem, uneven=uneven)
        for label in labels:
            assert peers.contender(label, problem).error < peers.WRONG, label
    ours, one = (
        peers.contender(label, SMALL).calls["forward"][0]() for label in (OURS, LORA)
    )
    differences = (ours - one).abs().amax((1, 2))
    assert differences[0] < 1e-5
    assert differences[1:].min() > 0.5


def test_everybody_has_the_same_gradients():
    """Of x and of each adapter, in equal runs and in turns."""
    for problem in (SMALL, replace(SMALL, samples=6)):
        weights, a, b, x, dy = problem.tensors
        x = x.clone().requires_grad_()
        gradients = {}
        for label, build in peers.MULTI.items():
            layer, trained = build(problem, weights[0], a, b)
            dx, *each = peers.both(layer, x, dy, trained, problem)()
            if len(each) > 2:  # PEFT's are apart: every A, then every B
                each = [torch.stack(each[:3]), torch.stack(each[3:])]
            if label == "peftops, gate":
                da, db = each
                each = [da.view_as(a), db.unflatten(1, (3, -1)).transpose(0, 1)]
            gradients[label] = [dx, *each]
        for label, ours in gradients.items():
            for gradient, exact in zip(ours, gradients["torch, bmm"], strict=True):
                assert error(gradient, exact) < 1e-5, label


@pytest.mark.parametrize("problem", [replace(SMALL, p=0.1), SMALL, FEW])
def test_ours_is_fused(problem, monkeypatch):
    layers = []
    patch = peftops.patch

    def kept(model):
        layers.append(patch(model))
        return layers[-1]

    monkeypatch.setattr(peftops, "patch", kept)
    peers.contender(OURS, problem)
    assert peftops.report(layers[0]).calls == {"fused": 1}


def test_a_peer_with_the_wrong_adapter_is_not_measured(monkeypatch):
    def swapped(t, w, a, b):
        return peers_multi.bmm(t, w, a.flip(0), b.flip(0))

    monkeypatch.setitem(peers.MULTI, "torch, bmm", swapped)
    for problem in (SMALL, FEW):
        absent = {}
        assert list(measure.build(["torch, bmm"], problem, absent)) == []
        assert "computes something else" in absent["torch, bmm"]


def test_grouped_mm_is_named_where_torch_has_none(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    with pytest.raises(Absent, match="this torch has none"):
        peers.contender("torch, grouped_mm", SMALL)


def test_another_process_builds_the_same_problem():
    for problem in (replace(SMALL, uneven=True), FEW):
        remote = Remote(OURS, problem)
        remote.close()
        assert remote.error == peers.contender(OURS, problem).error


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Makes packages importable from their code until the test ends."""
    monkeypatch.syspath_prepend(tmp_path)
    with patch.dict(sys.modules):
        yield partial(package, tmp_path)


@pytest.mark.parametrize("fakes", [FAKES, OTHERS])
@pytest.mark.parametrize("label", ["vllm", "sglang"])
def test_packages_that_serve_mixed_adapters(label, fakes, installed, monkeypatch):
    """In turns, with as many rows as are several of SGLang's chunks."""
    installed(label, fakes[label])
    if fakes is OTHERS:  # the CPU stands in for a GPU
        monkeypatch.setattr(peers_gpu, "vllm_torch", peers_gpu.vllm_triton)
    for samples in (60, 20, 3):
        problem = replace(MIXED, shape=(60, 32, 48, 8), samples=samples)
        contender = peers.contender(label, problem)
        assert contender.error < peers.WRONG
        assert list(contender.calls) == ["forward"]
    assert peers.contender(label, ONE).error < peers.WRONG
    with pytest.raises(Absent, match="made for serving"):
        peers.contender(label, MIXED)
    single = replace(problem, dtype=torch.float32)
    if fakes is OTHERS and label == "vllm":
        with pytest.raises(Absent, match="16 bits"):
            peers.contender(label, single)
    else:
        assert peers.contender(label, single).error < 1e-5


def test_lorafusion_trains_mixed_adapters(installed):
    installed("lorafusion", LORAFUSION)
    for problem in (MIXED, replace(MIXED, dtype=torch.float32, uneven=False)):
        contender = peers.contender("lorafusion", problem)
        assert contender.error < peers.WRONG
        weights, a, b, x, dy = problem.tensors
        wanted = {}
        for label in ("lorafusion", "torch, bmm"):
            layer, trained = peers.builders(problem)[label](problem, weights[0], a, b)
            x = x.clone().requires_grad_()
            wanted[label] = peers.both(layer, x, dy, trained, problem)()
        dx, da, db = wanted["torch, bmm"]
        theirs = wanted["lorafusion"]
        assert error(theirs[0], dx) < 0.02
        for slot, rank in enumerate(problem.ranks):
            assert error(theirs[1 + slot], da[slot, :rank]) < 0.02
            assert error(theirs[4 + slot], db[slot, :, :rank]) < 0.02


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"shape": (60, 32, 48, 8)}, "made for training"),
        ({"adapters": 6, "samples": 6}, "at most 4 adapters"),
        ({"p": 0.1}, "drops the frozen weight's input"),
        ({"samples": 6}, "one run"),
        ({"shape": (78, 32, 48, 8)}, "whole blocks of 8 rows"),
    ],
)
def test_lorafusion_names_what_it_lacks(settings, why, installed):
    installed("lorafusion", LORAFUSION)
    with pytest.raises(Absent, match=why):
        peers.contender("lorafusion", replace(MIXED, **settings))


def test_jobs_have_equal_runs_and_few_rows_have_turns():
    o = SimpleNamespace(dropout=None, shape=None, quick=False)
    jobs = list(multi.jobs(o, torch.float32, CPU))
    assert len({name for name, _ in jobs}) == 4 * (2 + 3) + 1
    named = dict(jobs)
    training = named["SmolLM2 q, o, 16 adapters"]
    assert training.slots == list(range(16))
    assert training.tensors[3].shape == (16, 32, 576)
    few = named["SmolLM2 q, o, 16 rows, 4 adapters"]
    assert few.slots == [0, 1, 2, 3] * 4
    assert few.tensors[3].shape == (16, 1, 576)
    mixed = named["SmolLM2 gate, up, 16 adapters of mixed ranks"]
    assert mixed.ranks == [16, 8, 4, 2] * 4
    assert mixed.tensors[1][1, 8:].abs().max() == 0
    o.quick = True
    assert {name for name, _ in multi.jobs(o, None, CPU)} == {
        "SmolLM2 k, v, 4 adapters"
    }
    o.layers = {"for a target": (8192, 8, 8, 2)}
    assert {name for name, _ in multi.jobs(o, None, CPU)} == {
        "for a target, 16 adapters"
    }
    for m, adapters in ((70, 2), (71, 1), (512, 4), (6, 2)):
        o.shape = m, 8, 8, 2
        name, problem = next(multi.jobs(o, torch.float32, CPU))
        assert problem.adapters == adapters and m % problem.samples == 0
        assert name.startswith(f"as asked, {adapters} adapter")


def test_costs_are_those_of_lora_and_of_more_adapters():
    m, k, n, r = SMALL.shape
    for backward in (False, True):
        flops, moved = lora.cost(SMALL, backward)
        assert multi.cost(replace(SMALL, adapters=1), backward) == (flops, moved)
        each = (12 if backward else 4) * r * (k + n)
        assert multi.cost(SMALL, backward) == (flops, moved + 2 * each)
    uneven = replace(SMALL, uneven=True)  # of ranks 8, 4 and 2
    assert multi.cost(SMALL)[0] - multi.cost(uneven)[0] == 2 * m * 10 // 3 * (k + n)
    assert multi.cost(SMALL)[1] - multi.cost(uneven)[1] == 4 * 10 * (k + n)


def test_readme_has_a_table_of_multi_lora(tmp_path):
    target = tmp_path / "README.md"
    target.write_text(" ".join(readme.MARKS))
    ratio = {BASE: 1.2, "PEFT": 0.5, "torch, bmm": 0.8, LORA: 1.05}
    results.append(tmp_path / "a.jsonl", result_line())
    results.append(tmp_path / "a.jsonl", result_line(row="multi", ratio=ratio))
    assert readme.rewrite(target, tmp_path) == 2
    plain, mixed = target.read_text().split("**Multi-LoRA**")
    assert LORA not in plain
    columns = "| pass | PEFT | torch, bmm | peftops, LoRA | **peftops** |"
    assert columns in mixed
    assert "| 2.40 | 1.50 | 1.14 | **1.20** | 0.50 | 1.05 |" in mixed
