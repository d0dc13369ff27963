"""Builds a Python module that runs .cu files on the CPU.

nvcc compiles the host code and leaves the kernels' PTX, translate.py makes C++ of the PTX, and
g++ compiles that together with the emulator.
"""

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

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "csrc" / "cuda"
CALLS = [  # they make compiling ten times as fast
    "--param=asan-instrumentation-with-call-threshold=0",
    "--param=asan-stack=0",
]
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address", *CALLS],
    "thread": ["-fsanitize=thread"],
}
# Its PTX differs from that of older GPUs only in what these lack: launches that overlap, and
# Hopper's instructions.
ARCH = "90a"


def missing():
    """What keeps this machine from building, or None."""
    for tool in ("nvcc", "g++"):
        if not shutil.which(tool):
            return f"there is no {tool}"
    return None if importlib.util.find_spec("pybind11") else "pybind11 is not installed"


def load(sources=None, sanitizer="", module=HERE / "module.cpp", include=KERNELS):
    """The Python module of these .cu files, built unless its sources were built before.

    Args:
        sources: paths; None: all .cu files of `include`.
        sanitizer: a key of SANITIZERS.
        module: the C++ file that defines the Python module.
        include: a folder of headers.
    """
    return opened(link(sources, sanitizer, module, include))


def opened(library):
    """The module in a library. It has a name of its own, else pybind11 returns the first again."""
    name = f"{Path(library).parent.name}.emulated"
    spec = importlib.util.spec_from_file_location(name, library)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def link(sources=None, sanitizer="", module=HERE / "module.cpp", include=KERNELS):
    """The path of the shared library; arguments as for `load`."""
    sources = sorted(include.glob("*.cu")) if sources is None else sources
    headers = sorted(
        [
            *include.glob("*.*h"),
            *(ROOT / "csrc").glob("*.h"),
            *HERE.glob("*.*h"),
            *(HERE / name for name in ("translate.py", "instructions.py", "ptx.py")),
        ]
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tasks = [
            pool.submit(kernel, source, headers, SANITIZERS[sanitizer], include)
            for source in sources
        ]
        machine = [
            HERE / name
            for name in ("machine.cpp", "warps.cpp", "hopper.cpp", "runtime.cpp")
        ]
        for source in (*machine, module):
            tasks.append(pool.submit(support, source, headers, include))
        objects = [built for task in tasks for built in task.result()]

    def join(target):
        call(
            "g++",
            "-shared",
            *SANITIZERS[sanitizer],
            "-Wl,-Bsymbolic",
            *objects,
            "-o",
            target,
        )

    return made("emulated.so", [], [*map(str, objects), sanitizer], join)


def kernel(source, headers, sanitize, include):
    """Two object files: the launchers as nvcc compiles them, and the kernels from nvcc's PTX."""
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
        call(
            *nvcc,
            f"-I{include}",
            "--keep",
            "--keep-dir",
            kept,
            "-c",
            source,
            "-o",
            target,
        )

    def device(target):
        (ptx,) = launchers.with_suffix(".kept").glob("*.ptx")
        translated = target.with_suffix(".cpp")
        translated.write_text(translate(ptx.read_text()))
        call(*cxx(include), "-Og", "-g1", *sanitize, "-c", translated, "-o", target)

    launchers = made(f"{source.stem}.host.o", [source, *headers], nvcc, host)
    return [launchers, made(f"{source.stem}.o", [source, *headers], sanitize, device)]


def support(source, headers, include):
    """The object file of a part of the emulator. It is compiled without sanitizers."""
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
    """How g++ is called."""
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
    return [*command, *(f"-isystem{folder}" for folder in systems)]


def made(name, sources, words, make):
    """The file `name` of these sources and words. make(target) makes it if it is missing."""
    text = "\0".join([*(source.read_text() for source in sources), *words])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    target = ROOT / "build" / "cuda_on_cpu" / digest / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes run tests, too
        if not target.exists():
            beside = target.with_suffix(".new")
            make(beside)
            os.replace(beside, target)
    return target


def nvcc_home():
    """The folder that nvcc takes its headers from."""
    dry = subprocess.run(
        ["nvcc", "--dryrun", "-c", "-x", "cu", "/dev/null"],
        capture_output=True,
        text=True,
    ).stderr
    return next(
        line.partition("TOP=")[2] for line in dry.splitlines() if "TOP=" in line
    )


def call(*command):
    """Runs a compiler. Raises RuntimeError with its first errors."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr).splitlines()
        errors = [line[:300] for line in said if "error" in line]
        raise RuntimeError("\n".join([" ".join(map(str, command)), *errors[:10]]))
