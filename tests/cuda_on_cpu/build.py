"""From .cu files to a Python module that runs them on the CPU: nvcc makes the host code and PTX, g++ the rest."""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .translate import translate

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
KERNELS = ROOT / "csrc" / "cuda"
CALLS = [
    "--param=asan-instrumentation-with-call-threshold=0",
    "--param=asan-stack=0",
]  # a tenth of the compile time
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address", *CALLS],
    "thread": ["-fsanitize=thread"],
}
ARCH = "90a"  # its PTX is the same but for what older GPUs lack: launches that overlap, and Hopper's instructions


def missing():
    """What keeps this machine from building, or None."""
    for tool in ("nvcc", "g++"):
        if not shutil.which(tool):
            return f"there is no {tool}"
    return None if importlib.util.find_spec("pybind11") else "pybind11 is not installed"


def load(sources=None, sanitizer="", module=HERE / "module.cpp", include=KERNELS):
    """The Python module of these .cu files; what was built before is kept, by what it was made of."""
    return opened(link(sources, sanitizer, module, include))


def opened(library):
    name = f"{Path(library).parent.name}.emulated"  # of its own, else pybind11 hands out the first again
    spec = importlib.util.spec_from_file_location(name, library)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def link(sources=None, sanitizer="", module=HERE / "module.cpp", include=KERNELS):
    sources = sorted(include.glob("*.cu")) if sources is None else sources
    headers = sorted(
        [
            *include.glob("*.*h"),
            *(ROOT / "csrc").glob("*.h"),
            *HERE.glob("*.*h"),
            HERE / "translate.py",
        ]
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tasks = [
            pool.submit(kernel, source, headers, SANITIZERS[sanitizer], include)
            for source in sources
        ]
        for source in (HERE / "machine.cpp", HERE / "hopper.cpp", HERE / "runtime.cpp", module):
            tasks.append(pool.submit(support, source, headers, include))
        objects = [path for task in tasks for path in task.result()]

    def join(target):
        call("g++", "-shared", *SANITIZERS[sanitizer], "-Wl,-Bsymbolic", *objects, "-o", target)

    return made("emulated.so", [], [*map(str, objects), sanitizer], join)


def kernel(source, headers, sanitize, include):
    """The launchers as nvcc compiles them, and the kernels from the PTX that it leaves on the way."""
    target = f"arch=compute_{ARCH},code=compute_{ARCH}"
    nvcc = [
        "nvcc",
        "-std=c++17",
        "-O3",
        "-lineinfo",
        "-gencode",
        target,
        "-Xcompiler=-fPIC,-fvisibility=hidden",
    ]

    def host(target):
        kept = target.with_suffix(".kept")
        kept.mkdir(exist_ok=True)
        call(*nvcc, f"-I{include}", "--keep", "--keep-dir", kept, "-c", source, "-o", target)

    def device(target):
        (ptx,) = launchers.with_suffix(".kept").glob("*.ptx")
        translated = target.with_suffix(".cpp")
        translated.write_text(translate(ptx.read_text()))
        call(*cxx(include), "-Og", "-g1", *sanitize, "-c", translated, "-o", target)

    launchers = made(f"{source.stem}.host.o", [source, *headers], nvcc, host)
    return [launchers, made(f"{source.stem}.o", [source, *headers], sanitize, device)]


def support(source, headers, include):
    command = [*cxx(include), "-O2", "-c", source]
    return [
        made(
            f"{source.stem}.support.o",
            [source, *headers],
            [],
            lambda target: call(*command, "-o", target),
        )
    ]


def cxx(include):
    import pybind11

    systems = (
        Path(nvcc_home(), "include"),
        pybind11.get_include(),
        sysconfig.get_path("include"),
    )
    command = [
        "g++",
        "-std=c++20",
        "-fPIC",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-w",
        f"-I{HERE}",
        f"-I{include}",
    ]
    return [*command, *(f"-isystem{path}" for path in systems)]


def made(name, sources, words, make):
    """The file `name` in a folder of its own for these sources and words; make(target) makes it where it is missing."""
    digest = hashlib.sha256(
        "\0".join([*(path.read_text() for path in sources), *words]).encode()
    ).hexdigest()[:16]
    target = ROOT / "build" / "cuda_on_cpu" / digest / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of other processes that run tests
        if not target.exists():
            beside = target.with_suffix(".new")
            make(beside)
            os.replace(beside, target)
    return target


def nvcc_home():
    dry = subprocess.run(
        ["nvcc", "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True
    ).stderr
    return next(line.partition("TOP=")[2] for line in dry.splitlines() if "TOP=" in line)


def call(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [
            line[:300] for line in (done.stdout + done.stderr).splitlines() if "error" in line
        ][:10]
        raise RuntimeError("\n".join([" ".join(map(str, command)), *said]))
