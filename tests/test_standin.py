"""The stand-in for a GPU: what replays launch on it, and how long the host takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peftops.bench import standin

HERE = Path(__file__).parent
OPS = "lora_fwd", "lora_bwd", "lora_gemv", "lora_mask", "nf4_quantize", "nf4_dequantize"
OPS += "dora_norm", "dora_drop", "dora_mix"


def run(*command):
    """The output of a Python process in which Triton does not interpret."""
    env = {
        name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
    }
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=env,
        cwd=HERE.parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built():
    pytest.importorskip("peftops._C")
    if why := standin.missing():
        pytest.skip(why)
    return standin.build()


def compare(shapes, ops, tma=False):
    arguments = json.dumps({"shapes": shapes, "ops": ops, "tma": tma})
    lines = run(str(HERE / "launches_on_standin.py"), arguments).splitlines()
    assert len(lines) >= 5 * len(shapes) * len(ops) // 2
    for label, planned, same, events in map(json.loads, lines):
        assert same and events and planned == 1, label


def test_replays_launch_what_launchers_launch(built):
    """The same functions, grids, parameters and products, in the same order."""
    compare([(256, 512, 384, 16)], ("lora_fwd", "lora_bwd", "lora_gemv", "dora_norm"))


def test_replays_give_kernels_their_workspace(built):
    """The workspace holds TMA's descriptors."""
    compare([(256, 512, 384, 16)], ("lora_fwd",), tma=True)


@pytest.mark.slow
def test_replays_launch_what_launchers_launch_for_every_op_and_shape(built):
    compare(
        [
            (256, 512, 384, 16),
            (200, 264, 520, 40),
            (1, 512, 384, 16),
            (8192, 4096, 4096, 16),
        ],
        OPS,
    )


def test_bench_host(built, tmp_path):
    """Each line of LoRA has the host's time for a layer of ours and of PEFT."""
    options = "--quick", "--dropout", "0.1", "--out", str(tmp_path)
    shown = run("-m", "peftops", "bench", "host", *options)
    (file,) = tmp_path.glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["pass"] for line in lines] == [
        "forward, with gradient",
        "backward",
        "forward + backward",
        "one token",
    ]
    for line in lines:
        assert line["row"] == "host" and set(line["ms"]) == {
            "PEFT",
            "PEFT, narrow adapters",
            "peftops",
        }
        assert 0 < line["ms"]["peftops"][1] < 10 and f"{line['pass']}: " in shown


def test_bench_host_does_not_run_where_triton_interprets(built):
    command = [sys.executable, "-m", "peftops", "bench", "host", "--quick"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=HERE.parent
    )
    assert done.returncode == 2 and "TRITON_INTERPRET must not be set" in done.stderr
