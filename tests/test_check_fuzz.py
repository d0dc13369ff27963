"""peftops check on adapters that a fuzzer broke: soon an answer, or one printable line."""

import random
import signal

import pytest
from broken_adapters import (
    CONFIG,
    MUTATIONS,
    WEIGHTS_FILE,
    header_of,
    tensors,
    write,
    write_mutated,
)

from peftops.adapter_file import names
from peftops.cli import BadInput, check

safetensors = pytest.importorskip("safetensors")

CASES = 1200
SECONDS = 20  # of one case, on a busy machine


def run_check(folder, target=None):
    """(exit code, or None for a refusal; the refusal) of one call. Nothing else may be raised."""
    argv = [str(folder)]
    if target:
        argv += ["--for", target]
    try:
        return check.main(argv), ""
    except BadInput as error:
        return None, f"{error}\n"


def is_valid(path):
    """Whether safetensors takes a file."""
    try:
        with safetensors.safe_open(path, "numpy"):
            return True
    except (OSError, safetensors.SafetensorError):
        return False


@pytest.fixture
def bell():
    """Lets signal.alarm fail the test, wherever it hangs."""

    def ring(*_):
        pytest.fail(f"no answer after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_broken_adapters_get_an_answer(tmp_path, capsys, monkeypatch, bell):
    monkeypatch.setattr(names, "SECONDS", 0.2)
    header, size = header_of(tensors())
    write(tmp_path, CONFIG, header, b"\x3f" * size)
    run_check(tmp_path)  # imports what takes seconds
    capsys.readouterr()
    draw = random.Random(0)
    codes = {}  # mutation -> exit codes
    timed_out = 0
    for i in range(CASES):
        folder = tmp_path / str(i)
        folder.mkdir()
        mutation = write_mutated(draw, folder)
        case = i, mutation
        signal.alarm(SECONDS)
        code, refusal = run_check(folder, draw.choice([None, *check.TARGETS]))
        signal.alarm(0)
        out = capsys.readouterr().out
        assert (code is None) == (not out), case
        assert refusal.count("\n") == (code is None), case
        lines = (out or refusal).removesuffix("\n").split("\n")
        assert [line for line in lines if not line.isprintable()] == [], case
        for line in lines[1:]:
            assert line.startswith(("files ", "peft ", "vllm ", "sglang ")), case
        assert code is None or is_valid(folder / WEIGHTS_FILE), case
        codes.setdefault(mutation, set()).add(code)
        timed_out += "seconds" in refusal
    assert codes.keys() == {mutate.__name__ for mutate in MUTATIONS}
    assert set.union(*codes.values()) == {0, 1, None}
    assert timed_out >= 5
