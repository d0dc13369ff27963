"""What pip installs works: a wheel without CUDA, and an sdist, outside the checkout."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from builds import TOOLS, command, make_wheel
from tree import ROOT

FOLDERS = ("peftops", "bench", "csrc", "tests", ".ci")
FILES = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    ".clang-format",
    ".pre-commit-config.yaml",
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the checkout without build outputs, which could hide what is missing."""
    folder = tmp_path_factory.mktemp("tree")
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name,
            folder / name,
            ignore=shutil.ignore_patterns("*.so*", "__pycache__", "results"),
        )
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


def run_there(target, *args):
    """Runs `peftops ARGS` of what is installed in target, not of the editable install."""
    code = """
import sys

def is_editable(finder):
    return "Editable" in getattr(finder, "__name__", "")

sys.meta_path = [finder for finder in sys.meta_path if not is_editable(finder)]
sys.path.insert(0, sys.argv.pop(1))
from peftops.__main__ import main
sys.exit(main())
"""
    return subprocess.run(
        [sys.executable, "-c", code, target, *args],
        cwd=target,
        text=True,
        capture_output=True,
        timeout=60,
    )


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_a_wheel_imports_and_passes_doctor(tree, tmp_path):
    wheel = make_wheel(tree, tmp_path / "wheels")
    names = zipfile.ZipFile(wheel).namelist()
    python = {str(file.relative_to(tree)) for file in (tree / "peftops").rglob("*.py")}
    for file in (tree / "bench").rglob("*.py"):
        python.add(f"peftops/{file.relative_to(tree)}")
    assert python | {"peftops/cli/unrelated.txt"} <= set(names)
    assert any(name.startswith("peftops/_C.") for name in names)
    assert not any(
        name.startswith(("tests", "csrc", "bench", "build")) for name in names
    )

    target = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    done = run_there(target, "doctor")
    assert done.returncode == 0, done
    assert "all is well" in done.stdout, done
    assert "reference" not in done.stdout, done


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_touching_a_kernel_rebuilds_its_objects_alone(tree, tmp_path):
    def objects():
        return {file: file.stat().st_mtime_ns for file in (tree / "build").rglob("*.o")}

    make_wheel(tree, tmp_path / "before")
    before = objects()
    (tree / "csrc/cpu/lora_few.cpp").touch()
    make_wheel(tree, tmp_path / "after")
    rebuilt = {
        file.name.partition(".")[0]
        for file, time in objects().items()
        if before.get(file) != time
    }
    assert before
    assert rebuilt == {"lora_few"}


def test_without_a_compiler_it_installs_as_pure_python_and_says_so(tree, tmp_path):
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    wheel = make_wheel(copy, tmp_path / "wheels", CXX="no-such-compiler")
    assert not any("/_C." in name for name in zipfile.ZipFile(wheel).namelist())
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    done = run_there(tmp_path / "installed", "doctor")
    assert done.returncode == 1, done
    assert "install a C++ compiler" in done.stdout, done
    assert "lora_fwd   on cpu: reference" in done.stdout


def test_an_sdist_contains_everything(tree, tmp_path):
    for tool in TOOLS:
        pytest.importorskip(tool)
    command(
        sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path, cwd=tree
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    files = {*FILES, ".ci/run"}
    for name in FOLDERS:
        files.update(str(file.relative_to(tree)) for file in (tree / name).rglob("*.*"))
    assert files <= inside


@pytest.mark.skipif(not shutil.which("readelf"), reason="no binutils")
def test_the_kernels_need_openmp_and_what_every_linux_has_alone():
    compiled = pytest.importorskip("peftops._C")
    listing = command("readelf", "--dynamic", compiled.__file__, cwd=ROOT)
    needed = set(re.findall(r"NEEDED.*\[(?:lib)?([\w+-]+)\.so", listing))
    linux = {"stdc++", "gcc_s", "m", "c", "dl", "rt", "pthread", "ld-linux-x86-64"}
    assert "gomp" in needed
    assert needed <= {"gomp", *linux}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_torch_and_the_kernels_share_one_openmp_runtime():
    """A wheel must not bring a second runtime, which would start threads of its own."""
    pytest.importorskip("peftops._C")
    code = "import torch, peftops._C; print(open('/proc/self/maps').read())"
    maps = command(sys.executable, "-c", code, cwd=ROOT)
    assert len(set(re.findall(r"/\S*/lib(?:g|i)?omp[^/]*\.so\S*", maps))) == 1
