"""Registers, memory and instructions of a compiled kernel, and the limits beside its source."""

import re
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

COUNTED = {  # instructions of NVIDIA's machine code, and of AMD's
    "mma": r"\b(HMMA|HGMMA|UTC\w*MMA)|\bv_mfma",
    "ldsm": r"\bLDSM|\bds_read_\w*tr",
    "async": r"\b(LDGSTS|UTMALDG|UBLKCP)|buffer_load_\w*lds",
    "wide": r"LDGSTS\S*\.128|\bLDG\.\S*128|UTMALDG|(global|buffer)_load_(dwordx4|lds_dwordx4)",
    "fma": r"\bFFMA|\bv_(fma|fmac|pk_fma)_f32",
}
# loop: instructions of the hottest loop
NUMBERS = ("registers", "shared", "spilled", "loop", "waits", "reloads", *COUNTED)
SMALLEST = 20  # instructions of a kernel that was not compiled away


def measure(registers, shared, stack, places, lines):
    """The numbers of one kernel.

    spilled is 0 where nothing uses the stack, which is then ptxas' own. reloads are those of
    spills within loops.
    """
    loops = list(innermost(places, lines))

    def count(what, where=lines):
        return sum(bool(re.search(what, line)) for line in where)

    used = count(r"\b(LDL|STL)|scratch_")
    hot = max(
        loops, key=lambda loop: (count(COUNTED["mma"], loop), -len(loop)), default=()
    )
    return {
        "registers": registers,
        "shared": shared,
        "spilled": stack if used else 0,
        "loop": len(hot),
        "waits": count(r"WARPGROUP\.DEPBAR", hot),
        "reloads": sum(count(r"\b(LDL|STL)", loop) for loop in loops),
        "instructions": len(lines),
        **{name: count(what) for name, what in COUNTED.items()},
    }


def innermost(places, lines):
    """The instructions of each loop that holds no other.

    A loop goes from the target of a branch backwards to that branch.
    """
    index = {place: i for i, place in enumerate(places)}
    loops = []
    for i, line in enumerate(lines):
        if branch := re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", line):
            start = index.get(int(branch[1], 16), i)
            if start < i:
                loops.append((start, i))
    for start, stop in loops:
        others = [loop for loop in loops if loop != (start, stop)]
        if not any(start <= first and last <= stop for first, last in others):
            yield lines[start : stop + 1]


def disassemble(cubin):
    """{function: (registers, bytes of stack, places, lines)}"""
    text = cuobjdump(cubin, "-sass")
    usage = cuobjdump(cubin, "-res-usage")
    functions = {}
    for name, numbers in re.findall(r"Function (\S+):\n\s*(.*)", usage):
        functions[name] = tuple(
            int(re.search(rf"{what}:(\d+)", numbers)[1]) for what in ("REG", "STACK")
        )
    for block in re.split(r"Function : ", text)[1:]:
        name, body = block.split(maxsplit=1)
        code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", body)
        functions[name] += (
            [int(place, 16) for place, _ in code],
            [line for _, line in code],
        )
    return functions


def cuobjdump(cubin, flag):
    """What NVIDIA's tool, which triton brings along, says of machine code."""
    folder = Path(find_spec("triton").submodule_search_locations[0])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [folder / "backends/nvidia/bin/cuobjdump", flag, file.name]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)


def limits(source, kernel, target, absent=()):
    """{number: (least, most)} from the comments directly above a kernel, or None without any.

    In Python and CUDA C++ alike: `limits: registers 24-128, mma 8-, spilled 0`. A line
    `limits sm_90 -GAIN: …` is only for that target, and only where the argument GAIN is absent.
    """
    above = re.search(
        rf"((?:(?:#|//) limits\b.*\n)+)(?:.*\n){{0,2}}?.*\b{kernel}\(", source
    )
    if not above:
        return None
    ranges = {}
    for words, numbers in re.findall(r"limits\b(.*?):(.*)", above[1]):
        targets = [word for word in words.split() if word[0] != "-"]
        without = {word[1:] for word in words.split() if word[0] == "-"}
        if (targets and target not in targets) or not without <= set(absent):
            continue
        for name, least, dash, most in re.findall(r"(\w+) (\d+)(-?)(\d*)", numbers):
            endless = dash and not most
            ranges[name] = int(least), float("inf") if endless else int(most or least)
    return ranges


def faults(numbers, limits, shared_limit, fast=True):
    """What is wrong with a kernel, in words. Only fast kernels must keep their limits."""
    if numbers["shared"] > shared_limit:
        yield f"shared memory {numbers['shared']} > {shared_limit} of the target"
    if limits is None:
        yield "no limits stand above it"
        return
    if numbers["instructions"] < SMALLEST and "instructions" not in limits:
        yield f"an empty kernel: {numbers['instructions']} instructions"
    if not fast:
        return
    for name, (least, most) in limits.items():
        if not least <= numbers[name] <= most:
            yield f"{name} {numbers[name]}, allowed {least}-{most}"
