"""The examples, each run as a user runs it."""

import os
import subprocess
import sys

import pytest
from tree import ROOT

FOLDER = ROOT / "examples"
LAUNCHERS = {
    "fsdp2": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
}
NEEDS = {
    "lora_trainer": ["peft", "transformers", "accelerate"],
    "many_adapters": ["peft", "transformers", "accelerate"],
    "qlora_sft": ["peft", "transformers", "accelerate", "trl", "datasets"],
    "dora_loop": ["peft", "transformers"],
    "fsdp2": ["peft", "transformers"],
    "functional": [],
    "serve_adapters": ["peft", "transformers"],
}
FOLDERS = "lora_trainer", "many_adapters", "qlora_sft", "serve_adapters"
SAID = {
    "functional": "kernel and specification differ by",
    "serve_adapters": "35 requests answered",
}


def test_every_example_is_run():
    assert set(NEEDS) == {path.stem for path in FOLDER.glob("*.py")} - {"tiny"}


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_runs(name, tmp_path):
    for package in NEEDS[name]:
        pytest.importorskip(package)
    command = [sys.executable, *LAUNCHERS.get(name, []), str(FOLDER / f"{name}.py")]
    if name in FOLDERS:
        command.append(str(tmp_path))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert SAID.get(name, "14/14 LoRA layers fused") in done.stdout
