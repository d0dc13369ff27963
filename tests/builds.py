"""Builds wheels for tests."""

import os
import subprocess
import sys

import pytest

TOOLS = ("setuptools", "pybind11", "ninja")


def command(*args, cwd, **changes):
    """The stdout of a command that must succeed; a failure shows stdout and stderr."""
    done = subprocess.run(
        args, cwd=cwd, env=os.environ | changes, text=True, capture_output=True
    )
    assert done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def make_wheel(source, target, **changes):
    """Makes a wheel by pip, in an isolated environment or, where no index answers, in this one.

    Args:
        source: the folder of a checkout, or an sdist.
        target: a folder for the wheel alone.
    """
    pip = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        target,
    )
    env = {"PEFTOPS_CUDA": "0"} | changes
    done = subprocess.run(
        [*pip, "--retries", "0", source],
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        for tool in TOOLS:
            pytest.importorskip(
                tool, reason=f"pip cannot fetch {tool}: {done.stderr[-300:]}"
            )
        command(*pip, "--no-build-isolation", source, cwd=target.parent, **env)
    (wheel,) = target.glob("*.whl")
    return wheel
