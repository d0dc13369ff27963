"""CUDA C++ kernels by nvcc, for every architecture that setup.py builds."""

import re
import subprocess
import tempfile
from pathlib import Path

from . import sass

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "-std=c++17", "-O3"
SHARED = 49152  # static bytes; a launcher asks the device before it takes more


def sources():
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def architectures():
    """Those of setup.py."""
    return re.search(r'^ARCHS = "(.*)"', (ROOT / "setup.py").read_text(), re.M)[
        1
    ].split()


def version():
    return re.search(
        r"release (\S+),",
        subprocess.check_output(["nvcc", "--version"], text=True),
    )[1]


def rows(source, arch):
    """A row for each kernel of a .cu file on one architecture."""
    target = f"sm_{arch}"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        command = [
            "nvcc",
            *FLAGS,
            f"-arch={target}",
            "-Xptxas",
            "-v",
            "-cubin",
            "-o",
            file.name,
            source,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            fault = (errors or ["nvcc failed"])[0]
            return [
                {"kernel": source.name, "target": target, "case": "", "faults": [fault]}
            ]
        machine_code = sass.disassemble(Path(file.name).read_bytes())
    said = dict(
        re.findall(
            r"Compiling entry function '(\S+)'[^\n]*\n(.*?Used [^\n]*)",
            done.stderr,
            re.S,
        )
    )
    text = source.read_text()
    names = demangled(said)
    return [
        row(names[name], target, *machine_code[name], said[name], text)
        for name in sorted(said)
    ]


def demangled(names):
    """{mangled: (kernel, arguments of its template)}"""
    done = subprocess.run(
        ["c++filt"],
        input="\n".join(names),
        capture_output=True,
        text=True,
        check=True,
    )
    plain = done.stdout.replace("__nv_", "").replace("(int)", "").splitlines()
    matches = [re.search(r"(\w+)(?:<(.*)>)?\(", line) for line in plain]
    return dict(zip(names, (match.groups("") for match in matches), strict=True))


def row(names, target, registers, stack, places, lines, said, source):
    """A row of one kernel, of what disassemble and ptxas (said) tell of it."""
    kernel, case = names
    shared = int((re.search(r"(\d+) bytes smem", said) or [0, 0])[1])
    spilled = max(stack, *map(int, re.findall(r"(\d+) bytes spill", said)))
    numbers = sass.measure(registers, shared, stack, places, lines) | {
        "spilled": spilled
    }
    faults = list(sass.faults(numbers, sass.limits(source, kernel, target), SHARED))
    if spilled:  # whatever stands above it
        faults.append(f"spills, or keeps in local memory, {spilled} bytes a thread")
    return {
        "kernel": kernel,
        "target": target,
        "case": case,
        "tile": "",
        **numbers,
        "faults": faults,
    }
