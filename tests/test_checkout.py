"""A checkout that is not installed has the package, but no bench."""

import importlib
import shutil
import subprocess
import sys

import pytest
from tree import ROOT

UNINSTALLED = """
import sys

def is_editable(finder):
    return "Editable" in getattr(finder, "__name__", "")

sys.meta_path = [finder for finder in sys.meta_path if not is_editable(finder)]
"""


def run_uninstalled(code):
    """Runs Python in the checkout without the finder of an editable install."""
    command = [sys.executable, "-c", UNINSTALLED + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_bench_says_in_one_sentence_that_it_is_not_installed():
    code = "from peftops.__main__ import main; sys.exit(main(['bench', 'lora', '--quick']))"
    done = run_uninstalled(code)
    sentence = "peftops bench: bench is not installed here: pip install -e .\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence)


def test_the_bench_of_another_checkout_is_not_taken(tmp_path):
    copy = tmp_path / "peftops"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "peftops", copy, ignore=ignore)
    command = [sys.executable, "-m", "peftops", "bench"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done
    assert done.stderr.startswith("peftops bench: bench is not installed here"), done


def test_setup_is_no_module_of_the_package():
    """Otherwise an import would build, or print what setup.py thinks of its command line."""
    done = run_uninstalled("import peftops.setup")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.endswith(
        "ModuleNotFoundError: No module named 'peftops.setup'\n"
    )
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("peftops.setup")
