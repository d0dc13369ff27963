"""peftops demo --adapters N: what it trains, serves, checks, prints and refuses."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from commands import refusal, run

pytest.importorskip("peft")
adapters = pytest.importorskip("peftops.cli.demo_adapters")
servers = pytest.importorskip("peftops.cli.demo_servers")
serving = pytest.importorskip("peftops.cli.demo_serving")
# Bytes of a page in the fixture's model, without the gain of its slot.
PAGE = 8 * 4 * 2 * (4 * (64 + 64) + 3 * (64 + 128))
FEW = "--adapters", "7", "--requests", "13", "--steps", "2", "--rank", "4"


@pytest.fixture
def short(monkeypatch, tiny):
    """Makes the demo short: batches of four requests, and four new tokens for each."""
    monkeypatch.setattr(serving, "BATCH", 4)
    for module in (serving, servers):
        monkeypatch.setattr(module, "NEW", 4)


def serve(capsys, folder, *argv):
    """(exit code, stdout, result.json) of `peftops demo` with few adapters."""
    code, out, _ = run(capsys, "demo", *FEW, *argv, "--out", str(folder))
    return code, out, json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_every_sample_is_answered_as_by_peft_with_its_adapter_alone(
    capsys, tmp_path, short, method
):
    argv = ["--method", method, "--dtype", "fp32"]
    code, out, result = serve(capsys, tmp_path, *argv)
    assert code == 0
    check = result["check"]
    assert (check["samples"], check["wrong"]) == (13, 0)
    assert check["tokens"] == check["equal"] == 13 * 4
    assert 0 < check["error"] < 1e-5
    assert "13 of 13 samples have the logits of PEFT" in out
    assert ("one by one" in out) == (method == "dora")
    alone, stock, ours = result["servers"].values()
    assert alone["mounts"] == alone["bytes"] == 0 < ours["bytes"]
    asked = requested(result["asked"])
    assert ours["mounts"] == stock["mounts"] == len(asked - {"0000", "0001", "0002"})
    assert ours["evictions"] == stock["evictions"] == 0
    assert 0 < ours["mount_p50_s"] <= ours["mount_p99_s"]


def requested(count):
    """The names that the requests of these tests ask for."""
    ids = torch.zeros(9, 32, dtype=torch.long)
    names, _ = adapters.requests([*map(adapters.called, range(7))], ids, 13, 32, 0)
    asked = {*names} - {adapters.BASE}
    assert len(asked) == count > 3
    return asked


def test_adapters_make_room(capsys, tmp_path, short):
    """Four fit into memory at once, and all samples are still answered right."""
    argv = ["--memory", str(5 * PAGE), "--dtype", "fp32"]
    code, _, result = serve(capsys, tmp_path, *argv)
    assert code == result["check"]["wrong"] == 0
    _, stock, ours = result["servers"].values()
    assert ours["evictions"] > 0
    assert ours["bytes"] <= 5 * PAGE
    assert stock["bytes"] <= 5 * PAGE


def test_peft_lets_those_go_that_were_not_used_for_the_longest_time():
    deleted = []
    model = SimpleNamespace(delete_adapter=deleted.append)
    stock = servers.Stock(model, sizes=dict.fromkeys("abcde", 1), memory=3)
    stock.load = lambda name: stock.loaded.update({name: stock.sizes[name]})
    for name in "abcabd":
        stock.mount(name, [name], None)
    assert deleted == ["c"]
    stock.mount("e", ["a", "e"], None)
    assert deleted == ["c", "b"]


@pytest.mark.parametrize("fault", ["another adapter", "no adapter"])
def test_a_wrong_adapter_is_noticed(capsys, tmp_path, short, monkeypatch, fault):
    logits = servers.Pooled.logits

    def wrong(self, names, tokens):
        if fault == "no adapter":
            return logits(self, [adapters.BASE] * len(names), tokens)
        return logits(self, names[1:] + names[:1], tokens)

    monkeypatch.setattr(servers.Pooled, "logits", wrong)
    code, out, result = serve(capsys, tmp_path, "--dtype", "fp32")
    assert code == 1
    assert result["check"]["wrong"] > 5
    assert f"{13 - result['check']['wrong']} of 13 samples have" in out


def test_trained_adapters_are_kept_and_copies_are_not(capsys, tmp_path, short):
    _, out, result = serve(capsys, tmp_path)
    kept = sorted(folder.name for folder in (tmp_path / "adapters").glob("0*"))
    assert kept == ["0000", "0001", "0002"]
    configs = [
        json.loads((tmp_path / "adapters" / name / adapters.CONFIG).read_text())
        for name in kept
    ]
    assert [config["r"] for config in configs] == result["ranks"] == [4, 2, 8]
    assert not list(tmp_path.glob("copies-*"))
    losses = result["training_losses"]
    assert (
        f"loss {losses[0]:.3f} → {losses[-1]:.3f}. The other 4 are perturbed copies"
        in out
    )


def test_copies_differ_from_each_other_and_from_their_parents(tmp_path, tiny):
    base, _ = tiny.load_model(None, torch.float32, torch.device("cpu"))
    ids = torch.arange(9 * 32).view(9, 32) % 256
    stage = SimpleNamespace(advance=lambda: None)
    adapted, losses = adapters.train(
        base,
        {"0000": 4, "0001": 2},
        ids,
        6,
        torch.float32,
        False,
        lambda loss: None,
    )
    assert losses[-1] < losses[0]
    (tmp_path / "copies").mkdir()
    folders = adapters.write(
        adapted,
        tmp_path,
        tmp_path / "copies",
        6,
        0,
        stage,
    )
    assert [*folders] == [f"000{i}" for i in range(6)]
    tensors = [adapters.read(folder) for folder in folders.values()]
    for i in range(2, 6):
        parent = tensors[i % 2]
        assert tensors[i].keys() == parent.keys()
        for key, tensor in tensors[i].items():
            assert tensor.dtype == torch.bfloat16
            product = (tensor.double() * parent[key]).sum()
            cosine = product / tensor.double().norm() / parent[key].norm()
            assert abs(abs(cosine) - 1) < 1e-4, key
    assert not torch.equal(tensors[2][key], tensors[4][key])


def test_the_first_adapter_is_asked_for_twice_as_often_as_the_second():
    ids = torch.arange(10 * 32).view(10, 32)
    names, prompts = adapters.requests(["a", "b", "c", "d"], ids, 4000, 16, 0)
    counts = Counter(names)
    assert abs(counts[adapters.BASE] - 4000 / 16) < 50
    served = 4000 - counts[adapters.BASE]
    for i, name in enumerate("abcd"):
        expected = served / (i + 1) / (1 + 1 / 2 + 1 / 3 + 1 / 4)
        assert abs(counts[name] - expected) < 0.1 * expected + 50, name
    assert prompts.shape == (4000, 16)
    assert torch.equal(prompts[:, 1:], prompts[:, :-1] + 1)
    batches = adapters.in_batches(names, prompts, 96)
    assert [name for chosen, _ in batches for name in chosen] == names
    assert torch.equal(torch.cat([rows for _, rows in batches]), prompts)


def test_percentiles_are_values_that_were_measured():
    values = [float(i) for i in range(1, 201)]
    assert serving.percentile(values, 50) == 100
    assert serving.percentile(values, 99) == 198
    assert serving.percentile([3.0], 99) == serving.percentile([3.0], 50) == 3
    assert serving.percentile([], 50) is None


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--compare", "lora,dora"], "goes with --method lora or dora"),
        (["--method", "qlora"], "goes with --method lora or dora"),
        (["--dropout", "0.1"], "--adapters goes without --dropout"),
        (["--memory", "much"], "--memory must be bytes or a text like"),
        (["--memory", "100kB"], "has room for 1 adapters of rank 8"),
        (["--memory", "1kB"], "--memory "),
        (["--adapters", "0"], "must be a whole number from 1 on"),
    ],
)
def test_what_does_not_go_together_is_refused(capsys, tmp_path, short, argv, message):
    out = str(tmp_path / "out")
    assert message in refusal(capsys, "demo", *FEW, *argv, "--out", out)


def test_adapters_for_which_the_disk_has_no_room_are_refused(
    capsys, tmp_path, short, monkeypatch
):
    usage = SimpleNamespace(free=10)
    monkeypatch.setattr(adapters.shutil, "disk_usage", lambda folder: usage)
    error = refusal(capsys, "demo", *FEW, "--out", str(tmp_path / "out"))
    assert "7 adapters take 0.0 GB of disk, and 0.0 GB are free in" in error
    assert not list(tmp_path.rglob("copies-*"))
