"""peftops bench: that it measures what it says, names who is absent, loses nothing, and draws what it has."""

import json
import re
import time
import types
from pathlib import Path

import pytest
import torch
from peftops.bench import compare, dora, measure, nf4, peers, plot, readme, results, timing
from peftops.bench import lora as row
from peftops.bench.peers import BASE, OURS, Problem
from test_cli import refusal, run

from peftops import cli
from peftops._op import CONTRACTS
from peftops.testing import law

pytest.importorskip("peft")
CPU = torch.device("cpu")
SMALL = Problem((70, 32, 48, 4), torch.bfloat16, CPU)


@pytest.fixture
def short(monkeypatch, one_thread):
    """One small layer with many rows and one with one, in samples of no length; nobody who has to be compiled."""
    monkeypatch.setattr(timing, "SHORTEST", 1e-4)
    monkeypatch.setattr(timing, "PATIENCE", 0.01)
    monkeypatch.setattr(
        row,
        "layers",
        lambda device, quick=False: {"tiny": SMALL.shape, "tiny, one row": (1, 32, 48, 4)},
    )
    monkeypatch.setattr(
        peers,
        "HERE",
        {name: peer for name, peer in peers.HERE.items() if "compile" not in name},
    )


def test_a_row_is_measured_and_kept(capsys, tmp_path, short):
    for _ in range(2):
        code, out, _ = run(capsys, "bench", "lora", "--quick", "--out", str(tmp_path))
        assert (
            code == 0
            and "× PEFT" in out
            and "one row" in out
            and "of the roofline on cpu, fused" in out
        )
        assert "vllm (runs on a GPU)" in out.splitlines()[-1]
    (file,) = tmp_path.glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 2 * (2 * 2 + 1 + 2)
    first = lines[0]
    about = {"commit", "date", "device", "python", "versions", "row", "dtype"}
    what = {"layer", "shape", "dropout", "op", "backend", "path", "pass", "absent", "error"}
    numbers = {
        "ms",
        "ratio",
        "peak_mb",
        "gbps",
        "tflops",
        "roofline",
        "copy_gbps",
        "gemm_tflops",
        "flops",
        "bytes",
    }
    assert about | what | numbers <= set(first)
    assert first["ms"][OURS] == sorted(first["ms"][OURS]) and 0 < first["roofline"] < 2
    assert {BASE, "torch", "PEFT", "PEFT, narrow adapters", OURS} == set(first["ms"])
    assert first["absent"]["unsloth"] == "runs on a GPU" and set(peers.ABSENT) <= set(
        first["absent"]
    )
    assert [line["op"] for line in lines[:5]] == [
        "lora_fwd", "lora_fwd + lora_bwd", "lora_fwd", "lora_fwd + lora_bwd", "lora_gemv",
    ]  # fmt: skip
    assert max(first["error"].values()) < peers.WRONG and lines[-1]["op"] == "host"


def test_compiled_peers_stay_compiled_whatever_came_before():
    for k in (16, 24, 32, 40):
        with torch._dynamo.config.patch(recompile_limit=2), torch.profiler.profile() as profile:
            found = measure.build(
                ["torch.compile"], Problem((70, k, 48, 4), torch.bfloat16, CPU), {}
            )
            found["torch.compile"].calls["forward"][0]()
        assert any("Torch-Compiled Region" in event.key for event in profile.key_averages()), k


def test_other_backends_stand_beside_ours(capsys, short):
    argv = [
        "bench",
        "lora",
        "--quick",
        "--shape",
        "5,32,48,4",
        "--backend",
        "reference",
        "--peers",
        "PEFT",
    ]
    code, out, _ = run(capsys, *argv, "--dropout", "0.1")
    assert (
        code == 0 and "× peftops, reference" in out and "× PEFT" in out and "× torch" not in out
    )
    assert "× frozen" in out and "without dropout" in out and "Absent" not in out
    assert (
        "only shown, since a run with --quick and --shape and --peers and --backend is but a part"
        in out
    )


def test_what_is_wrong_is_not_timed(capsys, monkeypatch, short):
    monkeypatch.setattr(law, "error", lambda out, exact: float("nan"))
    code, out, _ = run(capsys, "bench", "lora", "--quick")
    assert code == 1 and "so it is not timed" in out


def test_every_op_is_held_to_the_law_before_it_is_timed():
    assert {op for one in (row, nf4, dora) for op in one.OPS} == set(CONTRACTS)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["nothing"], "no row 'nothing'; there are lora, nf4, dora and model, host, readme"),
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
        (["model", "--out", __file__], "peftops bench model: argument --out: cannot write to"),
        (["model", "--text", "/nowhere.txt"], "cannot read the text"),
        (["gpu", "--only", ""], "peftops bench gpu: --only must be of build"),
        (["plot", "--out", __file__], "Not a directory"),
        (["model", "--fuse", "qkv"], "argument --fuse: invalid choice: 'qkv'"),
        (
            ["model", "--method", "full"],
            "--method must be of lora, qlora, dora, qdora, got 'full'",
        ),
        (["compare", "no-such-commit"], "there is no commit 'no-such-commit'"),
        (["compare", "HEAD", "model"], "there is no row 'model'; there are lora, nf4, dora"),
        (["static", "--triton", "0.0.0.nonsense"], "pip cannot fetch triton 0.0.0.nonsense"),
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
def test_refusals(capsys, argv, words):
    assert words in refusal(capsys, "bench", *argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_without_a_gpu_says_so_in_one_line(capsys, tmp_path):
    assert "no device 'cuda' on this machine" in refusal(
        capsys, "bench", "gpu", "--out", str(tmp_path / "out")
    )
    assert not list(tmp_path.iterdir())


def test_contenders_take_turns():
    turns = []

    class Counting(timing.Contender):
        def sample(self, kind, mode):
            turns.append(self.error)
            return super().sample(kind, mode)

    calls = {"pass": [lambda: None]}
    found = {name: Counting(calls, CPU, name) for name in "ab"}
    seconds, absent = timing.race(found | {"c": timing.Contender({}, CPU)}, "pass", "eager", 6)
    assert turns == ["a", "b"] * 6 and {
        name: len(times) for name, times in seconds.items()
    } == {"a": 6, "b": 6}
    assert absent == {"c": "KeyError: 'pass'"}


def test_ratios_are_of_the_same_round():
    assert timing.ratios({"ours": [1.0, 2.0, 30.0], "theirs": [2.0, 4.0, 60.0]}, "ours") == {
        "theirs": 0.5
    }
    assert timing.spread([0.001, 0.002, 0.003]) == [1.4, 2.0, 2.6]


def test_a_sample_is_long_enough_and_of_one_call(monkeypatch):
    monkeypatch.setattr(timing, "SHORTEST", 0.02)
    contender = timing.Contender({"pass": [lambda: time.sleep(0.002)] * 2}, CPU)
    assert contender.prepare("pass", "eager") >= 8
    assert 0.002 <= contender.sample("pass", "eager") < 0.02


def test_weights_are_copied_until_no_cache_holds_them(monkeypatch):
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: types.SimpleNamespace(L2_cache_size=50 << 20),
    )
    gpu = torch.device("cuda")
    assert [timing.copies(size << 20, gpu) for size in (1, 32, 128, 400)] == [16, 7, 2, 1]
    assert (
        timing.copies(1, CPU) == 16
        and timing.copies(1 << 40, CPU) == 1
        and timing.cache(CPU) >= 1 << 15
    )


def test_peak_memory_is_that_of_the_call():
    kept = []

    def call():
        kept[:] = [torch.ones(8 << 20)]
        torch.ones(8 << 20)

    kept.clear()
    peak = timing.peak_bytes(lambda: torch.ones(16 << 20).sum(), CPU)
    assert peak is None or (64 << 20) * 0.9 < peak < (64 << 20) * 1.5


def test_ceilings_are_rates():
    copied, computed = timing.ceilings(CPU, torch.float32, quick=True)
    assert 1e8 < copied < 1e13 and 1e8 < computed < 1e15
    slow = measure.rate(
        row, SMALL, "forward", (1e9, 2e8)
    )  # as bf16 is on a CPU that does not multiply it
    assert slow["gemm_tflops"] == 2e-4 and slow["copy_gbps"] == 1


def test_costs():
    one, four = (Problem((m, 10, 20, 2), torch.bfloat16, CPU) for m in (1, 4))
    assert row.cost(one) == (2 * (200 + 20 + 40), 2 * (10 + 200 + 20) + 4 * 2 * 30)
    (flops, moved), (forward, read) = row.cost(four, backward=True), row.cost(four)
    assert (
        flops - forward == 2 * 4 * (200 + 40 + 80)
        and moved - read == 2 * (160 + 80 + 200) + 8 * 2 * 30
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_backend_that_cannot_run_here_is_refused(capsys):
    assert "--backend cuda cannot run here (lora_mask: not on cuda" in refusal(
        capsys, "bench", "lora", "--backend", "cuda"
    )


def test_compare(capsys, monkeypatch, short):
    monkeypatch.setattr(compare, "check_out", lambda commit, tree: results.HERE.parent)
    monkeypatch.setattr(compare, "resolve", lambda name: "0123456789ab")
    code, out, _ = run(
        capsys, "bench", "compare", "HEAD", "--shape", "70,32,48,4", "--dropout", "0"
    )
    assert code == 0 and out.count("× 0123456789ab's time") == 2


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

    asked = []
    monkeypatch.setattr(compare, "check_out", stop)
    monkeypatch.setattr(compare, "resolve", lambda name: "0123456789ab")
    monkeypatch.setattr(results, "git", lambda *args: asked.append(args))
    assert run(capsys, "bench", "compare", "HEAD")[0] == 130 and asked == [
        ("worktree", "prune")
    ]


def line_of(**changes):
    return {
        "commit": "c", "date": "2026-01-01", "device": "A B", "versions": {"torch": "2"}, "row": "lora",
        "dtype": "bf16", "layer": "q", "shape": [512, 64, 64, 8], "dropout": 0.0, "op": "lora_fwd", "backend": "cpu",
        "path": "fused",
        "pass": "forward + backward", "ms": {"frozen": [1, 1, 1], "PEFT": [2, 2, 2], OURS: [1, 1.1, 1.2]},
        "ratio": {"frozen": 1.1, "PEFT": 0.55}, "absent": {"unsloth": "runs on a GPU"}, "roofline": 0.5, "flops": 100,
        "bytes": 10, "tflops": 1, "gemm_tflops": 2.0, "copy_gbps": 50.0,
    } | changes  # fmt: skip


def test_readme_shows_the_newest_of_each_kind(tmp_path):
    file, target = tmp_path / "cpu.jsonl", tmp_path / "README.md"
    target.write_text(f"before {readme.MARKS[0]} old {readme.MARKS[1]} after")
    results.append(file, line_of(date="2026-01-02", ratio={"frozen": 1.3, "PEFT": 0.65}))
    results.append(file, line_of())
    results.append(file, line_of(layer="q, 16 rows"))
    results.append(file, line_of(**{"pass": "forward"}))
    graph = {"graph_ms": {OURS: [1, 2, 3]}, "graph_ratio": {"frozen": 1.02, "PEFT": 0.5}}
    results.append(tmp_path / "gpu.jsonl", line_of(device="GPU", driver="580", **graph))
    for _ in range(2):
        readme.rewrite(target, tmp_path)
    text = target.read_text()
    assert text.startswith("before ") and text.endswith(" after") and "old" not in text
    assert (
        "| q | 512, 64, 64, 8 | bf16 | 0.0 | forward + backward | 2.00 | **1.30** | 0.65 |"
        in text
    )
    assert (
        "| q | 512, 64, 64, 8 | bf16 | 0.0 | forward + backward | 2.04 | **1.02** | 0.50 | 2 | 50% | cpu, fused |"
        in text
    )
    assert (
        text.count("| q |") == 2
        and "16 rows" not in text
        and "Absent: unsloth (runs on a GPU)." in text
    )


def test_readme_has_a_table_of_the_4_bit_base(tmp_path):
    target = tmp_path / "README.md"
    target.write_text(" ".join(readme.MARKS))
    results.append(tmp_path / "a.jsonl", line_of())
    ratio = {
        "frozen": 1.2,
        "PEFT + bitsandbytes": 0.4,
        "bitsandbytes, frozen": 0.6,
        "peftops, frozen": 1.0,
    }
    few = {
        "row": "nf4",
        "layer": "q, 8 rows",
        "shape": [8, 64, 64, 8],
        "ratio": ratio,
        "pass": "forward",
    }
    results.append(tmp_path / "a.jsonl", line_of(**few))
    results.append(
        tmp_path / "a.jsonl",
        codec := line_of(row="nf4", layer="64 × 64", shape=[64, 64], ratio={"copy": 1.0}),
    )
    assert readme.rewrite(target, tmp_path) == 2
    first, second = target.read_text().split("**4-bit base**")
    assert "bitsandbytes" not in first and "| 2.00 | **1.10** | 0.55 |" in first
    assert (
        "| pass | bitsandbytes, frozen | PEFT + bitsandbytes | peftops, frozen | **peftops** |"
        in second
    )
    assert (
        "| forward | 2.00 | 3.00 | 1.20 | **1.20** | 0.40 |" in second
        and codec["layer"] not in second
    )


def test_readme_has_a_table_of_the_hosts_time(tmp_path):
    target = tmp_path / "README.md"
    target.write_text(" ".join(readme.MARKS))
    ratio = {"PEFT": 0.6, "PEFT, narrow adapters": 0.75}
    for kind in ("forward, with gradient", "one token"):
        results.append(
            tmp_path / "a.jsonl", line_of(row="host", op="host", ratio=ratio, **{"pass": kind})
        )
    assert readme.rewrite(target, tmp_path) == 2
    assert "| PEFT, narrow adapters | **peftops** |\n" in target.read_text()
    assert target.read_text().count("| 0.80 | **0.60** |") == 2


def test_readme_stays_where_there_is_nothing_to_show(tmp_path):
    target = tmp_path / "README.md"
    target.write_text(f"{readme.MARKS[0]} kept {readme.MARKS[1]}")
    results.append(tmp_path / "a.jsonl", line_of(**{"pass": "forward"}))
    with pytest.raises(cli.BadInput, match="README stays"):
        readme.rewrite(target, tmp_path)
    assert " kept " in target.read_text()


def test_results_of_the_time_before_are_still_read(tmp_path):
    old = {
        name: value
        for name, value in line_of().items()
        if name not in ("op", "path", "absent", "roofline")
    }
    results.append(tmp_path / "cpu.jsonl", old)
    (tmp_path / "README.md").write_text(" ".join(readme.MARKS))
    readme.rewrite(tmp_path / "README.md", tmp_path)
    assert "**1.10**" in (tmp_path / "README.md").read_text()


def test_two_kinds_of_one_cpu_share_no_file_and_no_table(tmp_path, monkeypatch):
    target = tmp_path / "README.md"
    target.write_text(" ".join(readme.MARKS))
    for isa, ours in {"AVX2": 1.3, "AVX-512": 1.2, "AVX-512 bf16": 1.1}.items():
        monkeypatch.setattr(cli, "cpu_kernels", lambda isa=isa: isa)
        monkeypatch.setattr(cli, "cpu_model", lambda: "AMD EPYC")
        device = results.describe(CPU)["device"]
        line = line_of(device=device, ratio={"frozen": ours, "PEFT": 0.5})
        results.append(tmp_path / f"{results.slug(device)}.jsonl", line)
    results.append(
        tmp_path / "amd-epyc.jsonl", line_of(device="AMD EPYC", ratio={"frozen": 1.4})
    )
    files = {file.name for file in tmp_path.glob("*.jsonl")}
    assert files == {
        f"amd-epyc{name}.jsonl" for name in ("", "-avx2", "-avx-512", "-avx-512-bf16")
    }
    readme.rewrite(target, tmp_path)
    tables = {
        table.partition(", commit")[0]: table
        for table in target.read_text().split("\n\nAMD EPYC")[1:]
    }
    assert {name: re.findall(r"\*\*(1\.\d+)\*\*", table) for name, table in tables.items()} == {
        "": ["1.40"], ", AVX2": ["1.30"], ", AVX-512": ["1.20"], ", AVX-512 bf16": ["1.10"]
    }  # fmt: skip


def test_the_lines_of_one_cpu_are_in_its_file():
    for file in results.RESULTS.glob("*.jsonl"):
        assert {results.slug(line["device"]) for _, line in results.read(file)} == {file.stem}


def test_a_damaged_results_file_is_named_and_kept(tmp_path):
    file, target = tmp_path / "cpu.jsonl", tmp_path / "README.md"
    file.write_text('{"device": ')
    target.write_text("kept")
    with pytest.raises(cli.BadInput, match=r"cpu\.jsonl, line 1 is damaged"):
        readme.rewrite(target, tmp_path)
    results.append(file, {"a": 1})
    assert file.read_text() == '{"device": \n{"a": 1}\n' and target.read_text() == "kept"
    good = json.dumps(line_of())
    for changes in (
        {"ms": None},
        {"shape": "512"},
        {"ratio": {"PEFT": 0}},
        {"ms": {OURS: 1}},
        {"date": 3},
    ):
        file.write_text(f"\n{good}\n{json.dumps(line_of(**changes))}\n")
        with pytest.raises(cli.BadInput, match="line 3 is damaged"):
            results.newest(tmp_path)
    file.write_bytes(b"\xff\n")
    with pytest.raises(cli.BadInput, match="line 1 is damaged"):
        results.newest(tmp_path)
    file.write_text(f"{good}\n\n")
    (tmp_path / results.EVENTS).write_text('{"part": "build"}\n')
    assert results.newest(tmp_path) == [line_of()]


def test_readme_has_room_for_the_table():
    text = (Path(__file__).parent.parent / "README.md").read_text()
    assert all(
        text.count(mark) == 1 for mark in (*readme.MARKS, "<!-- tests -->", "<!-- demo -->")
    )


def test_plots(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    for m in (1, 16, 256):
        results.append(
            tmp_path / "a.jsonl",
            line_of(layer=f"q, {m} rows", shape=[m, 64, 64, 8], **{"pass": "forward"}),
        )
    results.append(tmp_path / "a.jsonl", line_of())
    results.append(
        tmp_path / "a.jsonl",
        line_of(row="nf4", layer="q, 8 rows", ratio={"frozen": 1.2, "somebody": 0.6}),
    )
    results.append(
        tmp_path / "a.jsonl",
        line_of(row="nf4", layer="64 × 64", shape=[64, 64], ratio={"copy": 1.0}),
    )
    results.append(tmp_path / "a.jsonl", line_of(row="dora", layer="q, NF4"))
    assert plot.main(["--results", str(tmp_path), "--out", str(tmp_path / "plots")]) == 0
    made = {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert set(made) == {
        f"a-b-{name}.{kind}"
        for name in ("bars", "bars-nf4", "bars-dora", "roofline", "rows")
        for kind in ("png", "svg")
    }
    assert (
        made["a-b-bars.png"].startswith(b"\x89PNG")
        and b"PEFT" not in made["a-b-roofline.svg"][:100]
    )
    assert plot.multiple(line_of(), "PEFT") == 2 and plot.multiple(line_of(), OURS) == 1.1
    assert "somebody" in plot.colours([line_of(ratio={"somebody": 1.0})])


def test_a_dirty_tree_prints_only(monkeypatch):
    monkeypatch.setattr(
        results, "git", lambda *args: " M a.py" if args[0] == "status" else "abc"
    )
    if (results.HERE.parent / ".git").exists():
        assert results.place() == (None, "the git tree has changes; --out DIR keeps them")
        assert results.describe(CPU)["commit"] == "abc+changes"
        monkeypatch.setattr(results, "git", lambda *args: "" if args[0] == "status" else "abc")
        assert (
            results.place() == (results.RESULTS, None)
            and results.describe(CPU)["commit"] == "abc"
        )


def test_results_that_are_committed_can_be_read():
    assert len(results.newest(results.RESULTS)) > 10
