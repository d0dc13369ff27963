"""Two ranks compute and save what one process does. If one dies, both end, and training resumes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from tiny import TOKENS, pair

import peftops

pytest.importorskip("accelerate")

PAGE = Path(__file__).parent.parent.parent / "docs" / "distributed.md"
ZERO3 = "ZeRO-3"


@pytest.mark.parametrize("case", ["ddp", "fsdp2", "saved", "checkpoints", "fallbacks"])
def test_on_two_ranks(case, tmp_path):
    assert (
        ranks.run(f"from on_ranks import {case} as work\n", tmp_path, str(tmp_path))
        == ""
    )


def test_mixed_batches_on_two_ranks(tmp_path):
    work = "from mixed import on_two_ranks as work\n"
    assert ranks.run(work, tmp_path) == ""


def launch(folder, *args):
    """Runs launched.py on two ranks under accelerate, with the documented configuration."""
    (config,) = re.findall(
        r"^```yaml\n(# fsdp2.yaml\n.*?)^```$", PAGE.read_text(), re.M | re.S
    )
    (folder / "fsdp2.yaml").write_text(config)
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(folder / "fsdp2.yaml"),
    ]
    script = [str(Path(__file__).with_name("launched.py")), str(folder), *args]
    port = "29" + str(os.getpid() % 1000).zfill(3)
    options = ["--num_processes", "2", "--main_process_port", port]
    env = os.environ | {"PYTHONPATH": ranks.python_path(), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *options, *script],
        capture_output=True,
        text=True,
        timeout=200,
        env=env,
    )


def test_a_rank_that_is_killed_ends_the_other_and_training_goes_on(tmp_path):
    died = launch(tmp_path, "dies")
    assert died.returncode and "SIGKILL" in died.stderr, died.stderr[-3000:]
    resumed = launch(tmp_path, "goes on")
    assert resumed.returncode == 0, resumed.stderr[-3000:]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("first", [True, False], ids=["patched first", "marked first"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_zero3_is_pefts_own(method, first):
    """Parameters are marked and emptied as DeepSpeed does, whose hooks fill them for a call."""
    stock, ours = pair(method)
    if first:
        peftops.patch(ours, strict=True)
    whole = {p: p.data for p in ours.parameters()}
    norms = peftops.report(ours).norms
    for p in whole:
        p.ds_id = 0
        p.data = p.data.new_empty(0)
    report = peftops.report(peftops.refresh(peftops.patch(ours)))
    assert report.reasons == {ZERO3: 14}
    assert report.norms == norms
    for p, data in whole.items():
        p.data = data
    with torch.no_grad():
        out, expected = (model(input_ids=TOKENS).logits for model in (ours, stock))
    assert torch.equal(out, expected)
    assert peftops.report(ours).calls == {ZERO3: 14}
