"""Builds a Python module that runs .cu files on the CPU.

nvcc compiles the host code and leaves the PTX of the kernels. translate.py makes C++ of the PTX.
g++ compiles the C++ and the emulator.
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
# Calls of functions instead of inlined checks make compiling ten times as fast.
ASAN_CALLS = [
    "--param=asan-instrumentation-with-call-threshold=0",
    "--param=asan-stack=0",
]
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address", *ASAN_CALLS],
    "thread": ["-fsanitize=thread"],
}
EMULATOR = ["machine.cpp", "warps.cpp", "hopper.cpp", "wgmma.cpp", "runtime.cpp"]
# PTX of older architectures is the same, but lacks overlapping launches and Hopper's instructions.
ARCH = "90a"


def missing():
    """Why this machine cannot build the emulator, or None."""
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
    """The Python module in a library.

    Each library gets another module name, since pybind11 returns a module that has been loaded.
    """
    name = f"{Path(library).parent.name}.emulated"
    spec = importlib.util.spec_from_file_location(name, library)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def serve(emulator, put=setattr):
    """Lets the backend "cuda" take tensors of the CPU: its launchers and kernels run in emulation.

    Args:
        emulator: the Python module of the project's kernels.
        put: sets an attribute, as setattr does.
    """
    from peftops import cuda
    from peftops.cuda import _device, dora, lora, multi, nf4

    class Emulated:
        def __getattr__(self, op):
            def run(*args):
                getattr(emulator, op)(*args)
                emulator.finish()

            return run

    for row in (dora, lora, multi, nf4):
        put(row, "_C", Emulated())
    put(cuda, "runs", lambda device: True)
    put(_device, "processors", lambda device: 4)
    put(_device, "stream", lambda device: 0)


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
        for source in (*(HERE / name for name in EMULATOR), module):
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


def kernel(source, headers, sanitizer_options, include):
    """Two object files: nvcc's of the launchers, and g++'s of the kernels, translated from PTX."""
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
        intermediate = target.with_suffix(".kept")
        intermediate.mkdir(exist_ok=True)
        call(
            *nvcc,
            f"-I{include}",
            "--keep",
            "--keep-dir",
            intermediate,
            "-c",
            source,
            "-o",
            target,
        )

    def device(target):
        (ptx,) = launchers.with_suffix(".kept").glob("*.ptx")
        translated = target.with_suffix(".cpp")
        translated.write_text(translate(ptx.read_text()))
        call(
            *cxx(include),
            "-Og",
            "-g1",
            *sanitizer_options,
            "-c",
            translated,
            "-o",
            target,
        )

    launchers = made(f"{source.stem}.host.o", [source, *headers], nvcc, host)
    return [
        launchers,
        made(f"{source.stem}.o", [source, *headers], sanitizer_options, device),
    ]


def support(source, headers, include):
    """The object file of one of the emulator's own sources, compiled without sanitizers."""
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
    """The command that calls g++ without its sources."""
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


def made(name, sources, options, make):
    """The file `name` of these sources and options. make(target) makes it if it is missing."""
    text = "\0".join([*(source.read_text() for source in sources), *options])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    target = ROOT / "build" / "cuda_on_cpu" / digest / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes run tests at the same time
        if not target.exists():
            unfinished = target.with_suffix(".new")
            make(unfinished)
            os.replace(unfinished, target)
    return target


def nvcc_home():
    """The folder that nvcc takes its headers from."""
    dry_run = subprocess.run(
        ["nvcc", "--dryrun", "-c", "-x", "cu", "/dev/null"],
        capture_output=True,
        text=True,
    ).stderr
    return next(
        line.partition("TOP=")[2] for line in dry_run.splitlines() if "TOP=" in line
    )


def call(*command):
    """Runs a compiler. Raises RuntimeError with its first errors."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        output = (done.stdout + done.stderr).splitlines()
        errors = [line[:300] for line in output if "error" in line]
        raise RuntimeError("\n".join([" ".join(map(str, command)), *errors[:10]]))
