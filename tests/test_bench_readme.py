"""bench readme and bench plot: what they show of the results, and that no result is ever lost."""

import json
import re
from pathlib import Path

import pytest
import torch
from peftops.bench import chart, plot, readme, results
from peftops.bench.peers import OURS
from result_lines import result_line

from peftops import cli

CPU = torch.device("cpu")


@pytest.fixture
def target(tmp_path):
    """A README with a place for the tables, in the folder of the results."""
    file = tmp_path / "README.md"
    file.write_text(" ".join(readme.MARKS))
    return file


def test_readme_shows_the_newest_line_of_each_pass(tmp_path, target):
    file = tmp_path / "cpu.jsonl"
    target.write_text(f"before {readme.MARKS[0]} old {readme.MARKS[1]} after")
    results.append(
        file, result_line(date="2026-01-02", ratio={"frozen": 1.3, "PEFT": 0.65})
    )
    results.append(file, result_line())
    results.append(file, result_line(layer="q, 16 rows"))
    results.append(file, result_line(**{"pass": "forward"}))
    graph = {
        "graph_ms": {OURS: [1, 2, 3]},
        "graph_ratio": {"frozen": 1.02, "PEFT": 0.5},
    }
    results.append(
        tmp_path / "gpu.jsonl", result_line(device="GPU", driver="580", **graph)
    )
    for _ in range(2):
        readme.rewrite(target, tmp_path)
    text = target.read_text()
    assert text.startswith("before ")
    assert text.endswith(" after")
    assert "old" not in text
    start = "| q | 512, 64, 64, 8 | bf16 | 0.0 | forward + backward |"
    assert f"{start} 2.00 | **1.30** | 0.65 |" in text
    assert f"{start} 2.04 | **1.02** | 0.50 | 2 | 50% | cpu, fused |" in text
    assert text.count("| q |") == 2
    assert "16 rows" not in text
    assert "Absent: unsloth (runs on a GPU)." in text


def test_readme_has_a_table_of_the_4_bit_base(tmp_path, target):
    file = tmp_path / "a.jsonl"
    packed = {
        "row": "nf4",
        "layer": "q, 8 rows",
        "shape": [8, 64, 64, 8],
        "pass": "forward",
        "ratio": {
            "frozen": 1.2,
            "PEFT + bitsandbytes": 0.4,
            "bitsandbytes, frozen": 0.6,
            "peftops, frozen": 1.0,
        },
    }
    codec = {
        "row": "nf4",
        "layer": "64 × 64",
        "shape": [64, 64],
        "ratio": {"copy": 1.0},
    }
    results.append(file, result_line())
    results.append(file, result_line(**packed))
    results.append(file, result_line(**codec))
    assert readme.rewrite(target, tmp_path) == 2
    dense_table, packed_table = target.read_text().split("**4-bit base**")
    assert "bitsandbytes" not in dense_table
    assert "| 2.00 | **1.10** | 0.55 |" in dense_table
    peers = "bitsandbytes, frozen | PEFT + bitsandbytes | peftops, frozen"
    assert f"| pass | {peers} | **peftops** |" in packed_table
    assert "| forward | 2.00 | 3.00 | 1.20 | **1.20** | 0.40 |" in packed_table
    assert codec["layer"] not in packed_table


def test_readme_has_a_table_of_the_hosts_time(tmp_path, target):
    host = {
        "row": "host",
        "op": "host",
        "ratio": {"PEFT": 0.6, "PEFT, narrow adapters": 0.75},
    }
    for name in ("forward, with gradient", "one token"):
        results.append(tmp_path / "a.jsonl", result_line(**host, **{"pass": name}))
    assert readme.rewrite(target, tmp_path) == 2
    text = target.read_text()
    assert "| PEFT, narrow adapters | **peftops** |\n" in text
    assert text.count("| 0.80 | **0.60** |") == 2


def test_readme_stays_where_there_is_nothing_to_show(tmp_path, target):
    target.write_text(f"{readme.MARKS[0]} kept {readme.MARKS[1]}")
    results.append(tmp_path / "a.jsonl", result_line(**{"pass": "forward"}))
    with pytest.raises(cli.BadInput, match="the tables stay"):
        readme.rewrite(target, tmp_path)
    assert " kept " in target.read_text()


def test_results_without_the_newer_fields_are_still_read(tmp_path, target):
    line = result_line()
    for name in ("op", "path", "absent", "roofline"):
        del line[name]
    results.append(tmp_path / "cpu.jsonl", line)
    readme.rewrite(target, tmp_path)
    assert "**1.10**" in target.read_text()


def test_a_cpu_with_other_instructions_has_a_file_and_a_table_of_its_own(
    tmp_path, target, monkeypatch
):
    monkeypatch.setattr(cli, "cpu_model", lambda: "AMD EPYC")
    for isa, ratio in {"AVX2": 1.3, "AVX-512": 1.2, "AVX-512 bf16": 1.1}.items():
        monkeypatch.setattr(cli, "cpu_kernels", lambda isa=isa: isa)
        device = results.describe(CPU)["device"]
        line = result_line(device=device, ratio={"frozen": ratio, "PEFT": 0.5})
        results.append(tmp_path / f"{results.slug(device)}.jsonl", line)
    unnamed = result_line(device="AMD EPYC", ratio={"frozen": 1.4})
    results.append(tmp_path / "amd-epyc.jsonl", unnamed)
    endings = ("", "-avx2", "-avx-512", "-avx-512-bf16")
    files = {file.name for file in tmp_path.glob("*.jsonl")}
    assert files == {f"amd-epyc{ending}.jsonl" for ending in endings}
    readme.rewrite(target, tmp_path)
    tables = target.read_text().split("\n\nAMD EPYC")[1:]
    ratios = {
        table.partition(", commit")[0]: re.findall(r"\*\*(1\.\d+)\*\*", table)
        for table in tables
    }
    assert ratios == {
        "": ["1.40"],
        ", AVX2": ["1.30"],
        ", AVX-512": ["1.20"],
        ", AVX-512 bf16": ["1.10"],
    }


def test_the_lines_of_one_cpu_are_in_its_file():
    for file in results.RESULTS.glob("*.jsonl"):
        assert {results.slug(line["device"]) for _, line in results.read(file)} == {
            file.stem
        }


def test_a_damaged_results_file_is_named_and_kept(tmp_path):
    file = tmp_path / "cpu.jsonl"
    target = tmp_path / "README.md"
    file.write_text('{"device": ')
    target.write_text("kept")
    with pytest.raises(cli.BadInput, match=r"cpu\.jsonl, line 1 is damaged"):
        readme.rewrite(target, tmp_path)
    results.append(file, {"a": 1})
    assert file.read_text() == '{"device": \n{"a": 1}\n'
    assert target.read_text() == "kept"
    good = json.dumps(result_line())
    for changes in (
        {"ms": None},
        {"shape": "512"},
        {"ratio": {"PEFT": 0}},
        {"ms": {OURS: 1}},
        {"date": 3},
    ):
        file.write_text(f"\n{good}\n{json.dumps(result_line(**changes))}\n")
        with pytest.raises(cli.BadInput, match="line 3 is damaged"):
            results.newest(tmp_path)
    file.write_bytes(b"\xff\n")
    with pytest.raises(cli.BadInput, match="line 1 is damaged"):
        results.newest(tmp_path)
    file.write_text(f"{good}\n\n")
    (tmp_path / results.EVENTS).write_text('{"part": "build"}\n')
    assert results.newest(tmp_path) == [result_line()]


def test_the_pages_have_room_for_what_is_put_and_read_there():
    root = Path(__file__).parent.parent
    places = dict.fromkeys(readme.MARKS, root / "docs/benchmarks.md")
    places |= dict.fromkeys(("<!-- tests -->", "<!-- demo -->"), root / "README.md")
    for mark, page in places.items():
        assert page.read_text().count(mark) == 1


def test_the_chart_of_readme_shows_the_newest_results():
    root = Path(__file__).parent.parent
    assert "(docs/speed.svg)" in (root / "README.md").read_text()
    drawing = (root / "docs/speed.svg").read_text()
    values = chart.shares(results.newest(results.RESULTS))
    assert [*values] == [*chart.BARS]
    for bar, share in values.items():
        assert f">{bar.label}<" in drawing
        assert f">{share:.2f}<" in drawing
    assert max(values.values()) > 1 or "red bar" not in (root / "README.md").read_text()


def test_plots_are_drawn_of_what_there_is(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    file = tmp_path / "a.jsonl"
    for m in (1, 16, 256):
        rows = {"layer": f"q, {m} rows", "shape": [m, 64, 64, 8], "pass": "forward"}
        results.append(file, result_line(**rows))
    packed = {"layer": "q, 8 rows", "ratio": {"frozen": 1.2, "somebody": 0.6}}
    codec = {"layer": "64 × 64", "shape": [64, 64], "ratio": {"copy": 1.0}}
    results.append(file, result_line())
    results.append(file, result_line(row="nf4", **packed))
    results.append(file, result_line(row="nf4", **codec))
    results.append(file, result_line(row="dora", layer="q, NF4"))
    results.append(file, result_line(row="multi", layer="q, 4 adapters"))
    bar = chart.Bar("a layer", "A B", "lora", "q", "bf16", 0.0, "forward + backward")
    monkeypatch.setattr(
        chart,
        "BARS",
        (
            bar,
            bar._replace(
                label="not measured", row="nf4", layer="q, 8 rows", dropout=0.5
            ),
        ),
    )
    assert (
        plot.main(["--results", str(tmp_path), "--out", str(tmp_path / "plots")]) == 0
    )
    images = {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert set(images) == {
        f"a-b-{name}.{suffix}"
        for name in ("bars", "bars-nf4", "bars-dora", "bars-multi", "roofline", "rows")
        for suffix in ("png", "svg")
    } | {"speed.png", "speed.svg"}
    assert b">a layer<" in images["speed.svg"]
    assert b"not measured" not in images["speed.svg"]
    assert images["a-b-bars.png"].startswith(b"\x89PNG")
    assert b"PEFT" not in images["a-b-roofline.svg"][:100]
    assert plot.multiple(result_line(), "PEFT") == 2
    assert plot.multiple(result_line(), OURS) == 1.1
    assert "somebody" in plot.colours([result_line(ratio={"somebody": 1.0})])


def test_a_dirty_tree_prints_only(monkeypatch):
    if not (results.HERE.parent / ".git").exists():
        return
    status = {"status": " M a.py"}
    monkeypatch.setattr(results, "git", lambda *args: status.get(args[0], "abc"))
    assert results.place() == (None, "the git tree has changes; --out DIR keeps them")
    assert results.describe(CPU)["commit"] == "abc+changes"
    status["status"] = ""
    assert results.place() == (results.RESULTS, None)
    assert results.describe(CPU)["commit"] == "abc"


def test_results_that_are_committed_can_be_read():
    assert len(results.newest(results.RESULTS)) > 10
