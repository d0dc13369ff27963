"""peftops bench: what it measures and keeps, whom it names as absent, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from commands import refusal, run
from peftops.bench import (
    compare,
    dora,
    lora,
    measure,
    merge,
    multi,
    nf4,
    peers,
    results,
    timing,
)
from peftops.bench.peers import BASE, OURS, Problem

from peftops import cli
from peftops._op import CONTRACTS
from peftops.testing import law

pytest.importorskip("peft")
CPU = torch.device("cpu")
SMALL = Problem((70, 32, 48, 4), torch.bfloat16, CPU)


@pytest.fixture
def short(monkeypatch, one_thread):
    """Makes the benches short.

    They measure a small layer with many rows and one with one row, in the shortest samples, and no
    peer that has to be compiled.
    """
    shapes = {"tiny": SMALL.shape, "tiny, one row": (1, 32, 48, 4)}
    uncompiled = {
        name: peer for name, peer in peers.HERE.items() if "compile" not in name
    }
    monkeypatch.setattr(timing, "SHORTEST", 1e-4)
    monkeypatch.setattr(timing, "PATIENCE", 0.01)
    monkeypatch.setattr(lora, "layers", lambda device, quick=False: shapes)
    monkeypatch.setattr(peers, "HERE", uncompiled)


FIELDS = {
    *("commit", "date", "device", "python", "versions", "row", "dtype"),
    *("layer", "shape", "dropout", "op", "backend", "path", "pass", "absent", "error"),
    *("ms", "ratio", "peak_mb", "gbps", "tflops", "roofline"),
    *("copy_gbps", "gemm_tflops", "flops", "bytes"),
}


def test_a_row_is_measured_and_kept(capsys, tmp_path, short):
    for _ in range(2):
        code, out, _ = run(capsys, "bench", "lora", "--quick", "--out", str(tmp_path))
        assert code == 0
        assert "× PEFT" in out
        assert "one row" in out
        assert "of the roofline on cpu, fused" in out
        assert "vllm (runs on a GPU)" in out.splitlines()[-1]
    (file,) = tmp_path.glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 2 * (2 * 2 + 1 + 2)
    first = lines[0]
    assert set(first) >= FIELDS
    assert first["ms"][OURS] == sorted(first["ms"][OURS])
    assert 0 < first["roofline"] < 2
    assert set(first["ms"]) == {BASE, "torch", "PEFT", "PEFT, narrow adapters", OURS}
    assert first["absent"]["unsloth"] == "runs on a GPU"
    assert set(peers.ABSENT) <= set(first["absent"])
    assert [line["op"] for line in lines[:5]] == [
        "lora_fwd",
        "lora_fwd + lora_bwd",
        "lora_fwd",
        "lora_fwd + lora_bwd",
        "lora_gemv",
    ]
    assert max(first["error"].values()) < peers.WRONG
    assert lines[-1]["op"] == "host"


def test_compiled_peers_stay_compiled_whatever_came_before():
    for k in (16, 24, 32, 40):
        with (
            torch._dynamo.config.patch(recompile_limit=2),
            torch.profiler.profile() as profile,
        ):
            problem = Problem((70, k, 48, 4), torch.bfloat16, CPU)
            contenders = measure.build(["torch.compile"], problem, {})
            contenders["torch.compile"].calls["forward"][0]()
        assert any(
            "Torch-Compiled Region" in event.key for event in profile.key_averages()
        ), k


def test_other_backends_stand_beside_ours(capsys, short):
    argv = ["lora", "--quick", "--shape", "5,32,48,4", "--dropout", "0.1"]
    argv += ["--backend", "reference", "--peers", "PEFT"]
    code, out, _ = run(capsys, "bench", *argv)
    assert code == 0
    assert "× peftops, reference" in out
    assert "× PEFT" in out
    assert "× torch" not in out
    assert "× frozen" in out
    assert "without dropout" in out
    assert "Absent" not in out
    options = "--quick and --shape and --peers and --backend"
    assert f"only shown, since a run with {options} is but a part" in out


def test_what_is_wrong_is_not_timed(capsys, monkeypatch, short):
    monkeypatch.setattr(law, "error", lambda out, exact: float("nan"))
    code, out, _ = run(capsys, "bench", "lora", "--quick")
    assert code == 1
    assert "so it is not timed" in out


def test_every_op_is_held_to_the_law_before_it_is_timed():
    assert {op for row in (lora, nf4, dora, multi, merge) for op in row.OPS} == set(
        CONTRACTS
    )


@pytest.mark.parametrize(
    "argv, words",
    [
        (
            ["nothing"],
            "no row 'nothing'; there are lora, nf4, dora, multi, merge and model, host, readme",
        ),
        (["lora", "--shape", "1,2,3"], "four whole numbers"),
        (["lora", "--shape", "1,2,3,0"], "four whole numbers"),
        (["lora", "--device", "cuda:77"], "no device 'cuda:77'"),
        (["lora", "--device", "toaster"], "no device 'toaster'"),
        (["lora", "--dtype", "int4"], "invalid choice"),
        (["lora", "--backend", "opencl"], "--backend must be of"),
        (["lora", "--peers", "nobody"], "'PEFT, compiled'; 'peftops'"),
        (["lora", "--peers", ""], "got ''"),
        (["lora", "--shape", "99999999,99999999,9,9"], "GB are free"),
        (["lora", "--device", ""], "no device ''"),
        (["lora", "--out", ""], "must name a folder"),
        (["lora", "--out", f"{__file__}/sub"], "test_bench.py/sub: Not a directory"),
        (
            ["model", "--out", __file__],
            "peftops bench model: argument --out: cannot write to",
        ),
        (["model", "--text", "/nowhere.txt"], "cannot read the text"),
        (["gpu", "--only", ""], "peftops bench gpu: --only must be of build"),
        (["plot", "--out", __file__], "Not a directory"),
        (["model", "--fuse", "qkv"], "argument --fuse: invalid choice: 'qkv'"),
        (
            ["model", "--method", "full"],
            "--method must be of lora, qlora, dora, qdora, got 'full'",
        ),
        (["compare", "no-such-commit"], "there is no commit 'no-such-commit'"),
        (
            ["compare", "HEAD", "model"],
            "there is no row 'model'; there are lora, nf4, dora, multi, merge",
        ),
        (
            ["static", "--triton", "0.0.0.nonsense"],
            "pip cannot fetch triton 0.0.0.nonsense",
        ),
        (["gpu", "--only", "magic"], "--only must be of build"),
        (["check"], "peftops bench: check is now called gpu: peftops bench gpu"),
        (
            ["check", "--device", "cpu", "--tune"],
            "peftops bench: check is now called gpu: peftops bench gpu",
        ),
        (["plot", "--results", "/nowhere"], "there are no results in /nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused_in_one_sentence(capsys, argv, words):
    assert words in refusal(capsys, "bench", *argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_without_a_gpu_says_so_in_one_line(capsys, tmp_path):
    error = refusal(capsys, "bench", "gpu", "--out", str(tmp_path / "out"))
    assert "no device 'cuda' on this machine" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_backend_that_cannot_run_here_is_refused(capsys):
    error = refusal(capsys, "bench", "lora", "--backend", "cuda")
    assert "--backend cuda cannot run here (lora_mask: not on cuda" in error


def test_compare_shows_both_commits_times(capsys, monkeypatch, short):
    monkeypatch.setattr(compare, "check_out", lambda commit, tree: results.HERE.parent)
    monkeypatch.setattr(compare, "resolve", lambda name: "0123456789ab")
    argv = "HEAD", "--shape", "70,32,48,4", "--dropout", "0"
    code, out, _ = run(capsys, "bench", "compare", *argv)
    assert code == 0
    assert out.count("× 0123456789ab's time") == 2


def test_compare_checks_another_commit_out_and_builds_it(tmp_path):
    if not (results.HERE.parent / ".git").exists():
        pytest.skip("not a git checkout")
    commit = compare.resolve("HEAD")
    assert len(commit) == 12
    with pytest.raises(cli.BadInput, match=f"git cannot check {commit} out"):
        compare.check_out(commit, Path("/proc/nowhere"))


def test_compare_that_is_stopped_leaves_no_worktree(capsys, monkeypatch):
    def stop(commit, tree):
        raise KeyboardInterrupt

    git_calls = []
    monkeypatch.setattr(compare, "check_out", stop)
    monkeypatch.setattr(compare, "resolve", lambda name: "0123456789ab")
    monkeypatch.setattr(results, "git", lambda *args: git_calls.append(args))
    assert run(capsys, "bench", "compare", "HEAD")[0] == 130
    assert git_calls == [("worktree", "prune")]
