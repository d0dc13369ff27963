"""Translates PTX, as nvcc writes it, to C++ for the emulator.

An instruction becomes a statement, and a register becomes a variable. An unknown instruction raises
Unknown with its text. `#line` points into the .cu file, so that errors and sanitizers name its
lines. instructions.py translates instructions, and ptx.py reads types and operands.
"""

import re

from .instructions import Instructions
from .ptx import SIZES, Unknown, commas, identifier, literal

REGISTERS = {
    1: "bool",
    2: "u16",
    4: "u32",
    8: "u64",
}  # the variable for each size in bytes
ASYNCHRONOUS = re.compile(r"\b(?:mbarrier|wgmma|cp\.async\.bulk|fence\.proxy\.async)\b")
VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(global|const|shared|local)\s+"
    r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)"
    r"(\[\d*\])?(?:\s*=\s*(\{[^}]*\}|[^;]+))?\s*;"
)  # space, alignment, type, name, [count], initial values
PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr[\s.\w]*\s)?([\w$]+)(?:\[(\d+)\])?$"
)  # alignment, type, name, count
STATEMENT = re.compile(
    r"\s*(?:\.loc\s+([^\n]*)|\.pragma[^;]*;|([\w$]+):(?!:)|[{}]"
    r"|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)",
    re.S,
)  # a line of the source, or a label, or an instruction


def translate(ptx):
    """One C++ file that registers every kernel of the PTX."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", ptx, flags=re.S)
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text))
    text = re.sub(r"\.section\s[^{]*\{[^}]*\}", "", text, flags=re.S)
    kernels, outside = split(text)
    if ".func" in outside:
        raise Unknown(".func: every device function has to be inlined")
    symbols = {}
    lines = ['#include "hopper.h"', "using namespace emulator;"]
    for space, align, dtype, name, count, values in VARIABLE.findall(outside):
        if space == "shared" and count != "[]":
            raise Unknown(f"shared variable {name} outside of a kernel")
        if space == "shared":
            symbols[name] = "dynamic_shared"
            continue
        symbols[name] = f"u64(G_{identifier(name)})"
        values = ", ".join(literal(value) for value in commas(values.strip("{} ")))
        array = f"G_{identifier(name)}[{count.strip('[]') or 1}]"
        declared = f"static u{8 * SIZES[dtype]} {array}"
        lines.append(f"alignas({align or SIZES[dtype]}) {declared} = {{{values}}};")
    for kernel in kernels:
        lines += Kernel(*kernel, symbols, files).lines()
    return "\n".join(lines) + "\n"


def split(text):
    """The kernels, as (name, parameters, body), and the text outside of them."""
    kernels = []
    outside = ""
    while entry := re.search(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{;]*\{", text):
        depth = 1
        end = entry.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        kernels.append((entry[1], entry[2], text[entry.end() : end - 1]))
        outside += text[: entry.start()]
        text = text[end:]
    return kernels, outside + text


class Kernel(Instructions):
    """A kernel's C++: its shared variables, the function of one thread, and its registration.

    Args:
        name: as in PTX.
        parameters: the text between the parentheses.
        body: the text between the braces.
        symbols: C++ of the addresses of variables outside of kernels, by name.
        files: names of source files, by their numbers in .loc.
    """

    def __init__(self, name, parameters, body, symbols, files):
        self.name = name
        self.id = identifier(name)
        self.files = files
        self.site = '"?"'  # the instruction's file and line, as C++
        self.symbols = dict(symbols)
        self.registers = {}  # bytes, by name
        self.parameters = {}  # (offset, bytes), by name
        self.shared = []  # (name, alignment, bytes)
        self.memory = []  # declarations of local variables
        self.lay_out_parameters(parameters)
        self.declare_variables(body)
        body = VARIABLE.sub("", body)
        self.declare_registers(body)
        self.asynchronous = str(bool(ASYNCHRONOUS.search(body))).lower()
        body = re.sub(r"\.reg\s*\.\w+\s+[^;]+;", "", body)
        self.code = list(self.statements(body.rstrip()))

    def lay_out_parameters(self, parameters):
        offset = 0
        for parameter in commas(parameters):
            align, dtype, name, count = PARAMETER.match(parameter).groups()
            size = SIZES[dtype] * int(count or 1)
            align = int(align or SIZES[dtype])
            offset = -(-offset // align) * align
            self.parameters[name] = offset, size
            offset += size

    def declare_variables(self, body):
        for space, align, dtype, variable, count, _ in VARIABLE.findall(body):
            size = SIZES[dtype] * int(count.strip("[]") or 1)
            name = f"{self.id}_{identifier(variable)}"
            align = align or SIZES[dtype]
            if space == "shared":
                self.shared.append((name, align, size))
            else:
                self.memory.append(
                    f"  alignas({align}) unsigned char V_{name}[{size}];"
                )
            self.symbols[variable] = f"u64(V_{name})"

    def declare_registers(self, body):
        for dtype, names in re.findall(r"\.reg\s*\.(\w+)\s+([^;]+);", body):
            for declared in commas(names):
                stem, _, count = declared.rstrip(">").partition("<")
                registers = (
                    [f"{stem}{i}" for i in range(int(count))] if count else [stem]
                )
                for register in registers:
                    if (
                        self.registers.setdefault(register, SIZES[dtype])
                        != SIZES[dtype]
                    ):
                        raise Unknown(f"register {register} of two sizes")

    def statements(self, body):
        """The body's lines of C++."""
        start = 0
        while start < len(body):
            statement = STATEMENT.match(body, start)
            if not statement:
                raise Unknown(body[start : start + 80])
            start = statement.end()
            location, label, text = statement.groups()
            if location:
                file, line = self.source_line(location)
                file = self.files.get(file, "?")
                self.site = f'"{file.rsplit("/", 1)[-1]}:{line}"'
                yield f'#line {line} "{file}"'
            elif label:
                yield f"L_{identifier(label)}:;"
            elif text and text.strip():
                yield self.instruction(" ".join(text.split()))

    def source_line(self, location):
        """The file and line of a .loc. For a function of NVIDIA's headers, those of its call."""
        file, line = location.split()[:2]
        call = re.search(r"inlined_at (\d+) (\d+)", location)
        if call and "/include/" in self.files.get(file, ""):
            return call.groups()
        return file, line

    def lines(self):
        yield from (f"static u32 V_{name};" for name, _, _ in self.shared)
        yield f"static void K_{self.id}(const unsigned char* parameters) {{\n  (void)parameters;"
        for size, variable in REGISTERS.items():
            names = [name for name, bytes_ in self.registers.items() if bytes_ == size]
            if names:
                declared = ", ".join(f"R{identifier(name)} = 0" for name in names)
                yield f"  {variable} {declared};"
        yield from [*self.memory, *self.code, "}"]
        shared = ", ".join(
            f"{{.address = &V_{name}, .align = {align}, .size = {size}}}"
            for name, align, size in self.shared
        )
        parameters = ", ".join(
            f"{{.offset = {offset}, .size = {size}}}"
            for offset, size in self.parameters.values()
        )
        kernel = (
            f"{{.body = K_{self.id}, .shared = {{{shared}}}, "
            f".parameters = {{{parameters}}}, .asynchronous = {self.asynchronous}}}"
        )
        yield f'static const bool B_{self.id} = (kernels()["{self.name}"] = {kernel}, true);'
