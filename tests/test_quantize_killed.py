"""peftops quantize, killed at any point: the next run writes the same bytes and cleans up."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from checkpoints import files, tiny_llama

from peftops.__main__ import main

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

KILLS = 50
SAVES = 5
UNFINISHED = {"unfinished.json", "unfinished.files"}
TEMPORARY = ".tmp7Qx1aB"  # named as safetensors names the file that it is writing


class Steps:
    """Counts the lines that the command runs, and kills its process at one of them.

    A save of safetensors has one more step, in the middle of the file.
    """

    def __init__(self, last=None):
        from peftops.cli import quantize
        from peftops.integrations.transformers import output, shards

        self.watched = {
            quantize.__file__: "quantize",
            shards.__file__: "quantize",
            output.__file__: "output",
        }
        self.places = []  # of each step: "quantize", "output", or "save"
        self.last = last
        self.save = safetensors.save_file

    def step(self, place):
        if len(self.places) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.places.append(place)

    def trace(self, frame, event, _):
        place = self.watched.get(frame.f_code.co_filename)
        if place and event == "line":
            self.step(place)
        return self.trace if place else None

    def save_in_two_steps(self, tensors, file, metadata):
        temporary = Path(file).parent / TEMPORARY
        temporary.write_bytes(b"half of it")
        self.step("save")
        temporary.unlink()
        self.save(tensors, file, metadata)


def in_fork(model, out, last=None, places=None):
    """Runs the command in a fork of this process, and returns its exit status.

    Args:
        last: The step at which the fork is killed; None runs to the end.
        places: A file for the places of all steps.
    """
    child = os.fork()
    if not child:
        steps = Steps(last)
        if last is not None or places:
            safetensors.save_file = steps.save_in_two_steps
            sys.settrace(steps.trace)
        code = main(["quantize", str(model), str(out)])
        if places:
            places.write_text(json.dumps(steps.places))
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def prepare(model):
    """Does once what every fork would do again: imports, and reading the headers."""
    from peftops.integrations.transformers import checkpoint

    torch.set_num_threads(1)
    read = checkpoint.load(model)
    checkpoint.load = lambda folder: read
    assert transformers.BitsAndBytesConfig and import_module("rich.progress")
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115


def killed_at_steps(model, folder):
    """Kills KILLS runs at a random step, every fourth of them twice, and runs each to its end."""
    prepare(model)
    draw = random.Random(0)
    runs = [[in_fork(model, folder / "whole", places=folder / "places")]]
    places = json.loads((folder / "places").read_text())
    steps = {
        place: [i for i, other in enumerate(places) if other == place]
        for place in ("output", "quantize", "save")
    }
    for i in range(KILLS):
        out = folder / str(i)
        killed = folder / f"{i} killed"
        codes = [in_fork(model, out, draw.choice(steps[draw.choice([*steps])]))]
        if out.exists():
            shutil.copytree(out, killed)
        else:
            killed.mkdir()
        if i % 4 == 0:
            codes.append(in_fork(model, out, draw.choice(steps["output"])))
        runs.append([*codes, in_fork(model, out)])
    (folder / "codes").write_text(json.dumps(runs))


def spawn(function, *args):
    """Runs in a process of its own, as one that has run kernels in threads must not fork."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_killed_at_any_step_it_goes_on_to_the_same_bytes(tmp_path):
    tiny_llama(tmp_path / "model")
    source = files(tmp_path / "model")
    spawn(killed_at_steps, tmp_path / "model", tmp_path)
    uninterrupted, *runs = json.loads((tmp_path / "codes").read_text())
    assert uninterrupted == [0] and len(runs) == KILLS
    expected = files(tmp_path / "whole")
    assert UNFINISHED.isdisjoint(expected) and source.keys() == expected.keys()
    halves = 0
    for i, (first, *_, last) in enumerate(runs):
        left = files(tmp_path / f"{i} killed")
        halves += f"unfinished.files/{TEMPORARY}" in left
        finished = {
            name: content
            for name, content in left.items()
            if name.partition("/")[0] not in UNFINISHED
        }
        assert first == -signal.SIGKILL
        assert finished.items() <= expected.items(), (
            "a file under its own name is whole"
        )
        assert last in (0, 2), "it went on, or all was there"
        assert files(tmp_path / str(i)) == expected
        assert not [entry for entry in (tmp_path / str(i)).iterdir() if entry.is_dir()]
    assert halves > KILLS // 5, "they died in the middle of a file"


def temporary(out):
    """The files that safetensors is writing, in OUT or in its folder unfinished.files."""
    names = []
    for folder in ("", "unfinished.files/"):
        with contextlib.suppress(FileNotFoundError):
            names += [folder + name for name in os.listdir(out / folder)]
    return [name for name in names if name.rpartition("/")[2].startswith(".tmp")]


def killed_in_a_save(model, folder):
    """Kills the command while safetensors writes a file, lists what is left, and runs it again."""
    prepare(model)
    left = []
    codes = []
    for i in range(SAVES):
        out = folder / str(i)
        child = os.fork()
        if not child:
            os._exit(main(["quantize", str(model), str(out)]))
        while not temporary(out) and not (out / "config.json").exists():
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left.append(temporary(out))
        codes.append(main(["quantize", str(model), str(out)]))
    (folder / "seen").write_text(json.dumps([left, codes]))


def test_what_a_killed_save_leaves_is_cleared(tmp_path):
    tiny_llama(tmp_path / "model", vocab_size=200_000, num_hidden_layers=1)
    spawn(killed_in_a_save, tmp_path / "model", tmp_path)
    left, codes = json.loads((tmp_path / "seen").read_text())
    names = [name for names in left for name in names]
    assert names and all(name.startswith("unfinished.files/.tmp") for name in names)
    assert main(["quantize", str(tmp_path / "model"), str(tmp_path / "whole")]) == 0
    for i, code in enumerate(codes):
        assert code == 0 and files(tmp_path / str(i)) == files(tmp_path / "whole")
