"""PTX, as nvcc writes it, to C++ that machine.cpp runs: an instruction becomes a statement, a register a variable.

An instruction this does not know stops the translation with its text. `#line` points into the .cu file, so that errors
and sanitizers name its lines. What an instruction computes is in machine.h, under the instruction's name.
"""

import re

SIZES = {"pred": 1} | {
    f"{kind}{bits}": bits // 8 for kind in "bsuf" for bits in (8, 16, 32, 64)
}
SIZES |= {"bf16": 2, "f16x2": 4, "bf16x2": 4}
REGISTERS = {1: "bool", 2: "u16", 4: "u32", 8: "u64"}
SPECIAL = {
    "%tid": "self->tid",
    "%ntid": "launch.threads",
    "%ctaid": "launch.block",
    "%nctaid": "launch.blocks",
}
LONE = {"%laneid": "self->lane", "%warpid": "self->warp", "WARP_SZ": "32u"}
PLAIN = {  # opcode: the modifiers that it may carry besides its type
    **dict.fromkeys(("add", "sub", "div", "fma", "sqrt", "rcp", "rsqrt", "ex2", "lg2"), "rn approx full"),
    **dict.fromkeys(("rem", "min", "max", "and", "or", "xor", "not", "neg", "abs", "shl", "shr"), ""),
    **dict.fromkeys(("selp", "bfe", "bfi", "popc", "clz", "brev", "prmt", "lop3", "copysign"), ""),
    "mul": "lo hi wide rn", "mad": "lo hi wide", "shf": "l r wrap clamp", "cvt": "rn rzi rni rmi rpi",
}  # fmt: skip
IGNORED = {
    "rn",
    "approx",
    "full",
}  # C++ rounds to nearest, and is more exact than approximations
SPACES = {
    "global": "global",
    "const": "global",
    "shared": "shared",
    "shared::cta": "shared",
    "local": "local",
}
SHARED = ("shared::cta", "shared::cluster")  # the same in a cluster of one block
QUALIFIERS = {
    "nc",
    "ca",
    "cg",
    "cs",
    "volatile",
    "relaxed",
    "gpu",
    "cta",
    "v2",
    "v4",
    "L1::no_allocate",
    *SPACES,
}
NOTHING = {
    "membar",
    "prefetch",
    "nanosleep",
    "setmaxnreg",
}  # blocks run one after another, and memory is one
ASYNCHRONOUS = re.compile(r"\b(?:mbarrier|wgmma|cp\.async\.bulk|fence\.proxy\.async)\b")
MBARRIER = {
    "shared",
    "shared::cta",
    "shared::cluster",
    "b64",
    "release",
    "acquire",
    "cta",
    "cluster",
}
VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(global|const|shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)"
    r"(\[\d*\])?(?:\s*=\s*(\{[^}]*\}|[^;]+))?\s*;"
)
PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr[\s.\w]*\s)?([\w$]+)(?:\[(\d+)\])?$"
)
STATEMENT = re.compile(
    r"\s*(?:\.loc\s+([^\n]*)|\.pragma[^;]*;|([\w$]+):(?!:)|[{}]|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)",
    re.S,
)


class Unknown(Exception):
    """What stopped the translation."""


def identifier(name):
    return re.sub(r"\W", "_", name)


def commas(text):
    """The operands of an instruction: commas inside brackets do not part."""
    return [
        part.strip()
        for part in re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,\[{])+", text)
        if part.strip()
    ]


def vector(operand):
    return commas(operand.strip("{} ")) if operand.startswith("{") else [operand]


def literal(text):
    """An immediate as the bits of a register."""
    if text[:2].lower() in ("0f", "0d"):
        return f"0x{text[2:]}ull"
    return f"{text.rstrip('U')}{'ll' if text[0] == '-' else 'ull'}"


def translate(ptx):
    """One C++ file that registers every kernel of the PTX."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", ptx, flags=re.S)
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text))
    text = re.sub(r"\.section\s[^{]*\{[^}]*\}", "", text, flags=re.S)
    outside, kernels = "", []
    while entry := re.search(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{;]*\{", text):
        depth, end = 1, entry.end()
        while depth:
            depth, end = depth + {"{": 1, "}": -1}.get(text[end], 0), end + 1
        kernels.append((entry[1], entry[2], text[entry.end() : end - 1]))
        outside, text = outside + text[: entry.start()], text[end:]
    if ".func" in (outside := outside + text):
        raise Unknown(".func: every device function has to be inlined")
    symbols, lines = {}, ['#include "machine.h"', "using namespace emulator;"]
    for space, align, kind, name, count, init in VARIABLE.findall(outside):
        if space == "shared" and count != "[]":
            raise Unknown(f"shared variable {name} outside of a kernel")
        symbols[name] = "dynamic_shared" if space == "shared" else f"u64(G_{identifier(name)})"
        if space != "shared":
            values = ", ".join(literal(v) for v in commas(init.strip("{} ")))
            declared = (
                f"static u{8 * SIZES[kind]} G_{identifier(name)}[{count.strip('[]') or 1}]"
            )
            lines.append(f"alignas({align or SIZES[kind]}) {declared} = {{{values}}};")
    for kernel in kernels:
        lines += Kernel(*kernel, symbols, files).lines()
    return "\n".join(lines) + "\n"


class Kernel:
    def __init__(self, name, parameters, body, symbols, files):
        self.name, self.id, self.files, self.site = name, identifier(name), files, '"?"'
        self.symbols, self.registers, self.shared, self.memory = dict(symbols), {}, [], []
        self.parameters, at = {}, 0
        for parameter in commas(parameters):
            align, kind, parameter_name, count = PARAMETER.match(parameter).groups()
            size, align = SIZES[kind] * int(count or 1), int(align or SIZES[kind])
            at = -(-at // align) * align
            self.parameters[parameter_name] = at, size
            at += size
        for space, align, kind, variable, count, _ in VARIABLE.findall(body):
            size, own = (
                SIZES[kind] * int(count.strip("[]") or 1),
                f"{self.id}_{identifier(variable)}",
            )
            if space == "shared":
                self.shared.append((own, align or SIZES[kind], size))
            else:
                self.memory.append(
                    f"  alignas({align or SIZES[kind]}) unsigned char V_{own}[{size}];"
                )
            self.symbols[variable] = f"u64(V_{own})"
        body = VARIABLE.sub("", body)
        for kind, names in re.findall(r"\.reg\s*\.(\w+)\s+([^;]+);", body):
            for declared in commas(names):
                stem, _, count = declared.rstrip(">").partition("<")
                for register in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
                    if self.registers.setdefault(register, SIZES[kind]) != SIZES[kind]:
                        raise Unknown(f"register {register} of two sizes")
        self.asynchronous = str(bool(ASYNCHRONOUS.search(body))).lower()
        self.code = list(self.statements(re.sub(r"\.reg\s*\.\w+\s+[^;]+;", "", body).rstrip()))

    def statements(self, body):
        at = 0
        while at < len(body):
            if not (found := STATEMENT.match(body, at)):
                raise Unknown(body[at : at + 80])
            at, (place, label, text) = found.end(), found.groups()
            if place:
                file, line = self.place(place)
                path = self.files.get(file, "?")
                self.site = f'"{path.rsplit("/", 1)[-1]}:{line}"'
                yield f'#line {line} "{path}"'
            elif label:
                yield f"L_{identifier(label)}:;"
            elif text and text.strip():
                yield self.instruction(" ".join(text.split()))

    def place(self, text):
        """File and line; for a function of NVIDIA's headers, of its call."""
        (file, line), called = text.split()[:2], re.search(r"inlined_at (\d+) (\d+)", text)
        return (
            called.groups()
            if called and "/include/" in self.files.get(file, "")
            else (file, line)
        )

    def lines(self):
        """The kernel's shared variables, the function of one thread, and its registration."""
        yield from (f"static u32 V_{own};" for own, _, _ in self.shared)
        yield f"static void K_{self.id}(const unsigned char* parameters) {{\n  (void)parameters;"
        for size, kind in REGISTERS.items():
            if names := [
                f"R{identifier(name)} = 0" for name, s in self.registers.items() if s == size
            ]:
                yield f"  {kind} {', '.join(names)};"
        yield from [*self.memory, *self.code, "}"]
        shared = ", ".join(f"{{&V_{own}, {align}, {size}}}" for own, align, size in self.shared)
        parameters = ", ".join(f"{{{at}, {size}}}" for at, size in self.parameters.values())
        kernel = f"{{K_{self.id}, {{{shared}}}, {{{parameters}}}, {self.asynchronous}}}"
        yield f'static const bool B_{self.id} = (kernels()["{self.name}"] = {kernel}, true);'

    def value(self, operand):
        stem, _, axis = operand.partition(".")
        if operand in self.registers:
            return f"R{identifier(operand)}"
        if stem in SPECIAL:
            return f"{SPECIAL[stem]}.{axis}"
        if operand in self.parameters:
            return f"u64(parameters + {self.parameters[operand][0]})"
        if found := LONE.get(operand) or self.symbols.get(operand):
            return found
        if re.match(r"-?\d", operand):
            return literal(operand)
        raise Unknown(f"operand {operand}")

    def values(self, operands):
        return ", ".join(map(self.value, operands))

    def address(self, operand):
        base, offset = re.match(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]$", operand).groups()
        return f"Any({self.value(base)}).bits" + (f" + ({offset})" if offset else "")

    def space(self, modifiers):
        """The state space, or None where there is a modifier that might mean something."""
        named = [SPACES[m] for m in modifiers if m in SPACES]
        return "Space::" + (named or ["generic"])[0] if set(modifiers) <= QUALIFIERS else None

    def set(self, destination, expression):
        return (
            f"{expression};"
            if destination == "_"
            else f"set({self.value(destination)}, {expression});"
        )

    def spread(self, destinations, expression):
        """An expression with as many elements as there are destinations."""
        return f"auto V = {expression}; " + " ".join(
            self.set(d, f"V[{i}]") for i, d in enumerate(destinations)
        )

    def instruction(self, text):
        guard, opcode, rest = re.match(
            r"(?:@(!?[%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text
        ).groups()
        name, *modifiers = opcode.split(".")
        rule = self.plain if name in PLAIN else getattr(self, f"do_{name}", None)
        body = ";" if name in NOTHING else rule and rule(name, modifiers, commas(rest))
        if not body:
            raise Unknown(f"instruction {text} at {self.site}")
        condition = (
            f"if ({'!' * (guard[0] == '!')}{self.value(guard.lstrip('!'))}) " if guard else ""
        )
        return f"  {condition}{{ {body} }}"

    def plain(self, name, modifiers, args):
        types, rest = (
            [m for m in modifiers if m in SIZES],
            [m for m in modifiers if m not in SIZES],
        )
        function = "_".join(["op", name, *(m for m in rest if m not in IGNORED)])
        known = set(rest) <= set(PLAIN[name].split())
        return known and self.set(
            args[0], f"{function}<{', '.join(types)}>({self.values(args[1:])})"
        )

    def do_mov(self, name, modifiers, args):
        kind, parts = modifiers[-1], vector(args[0])
        if args[1].startswith("{"):
            return self.set(
                args[0], f"pack<u{8 * SIZES[kind]}>({{{self.values(vector(args[1]))}}})"
            )
        if len(parts) > 1:
            return self.spread(
                parts,
                f"unpack<{8 * SIZES[kind] // len(parts)}, {len(parts)}>({self.value(args[1])})",
            )
        return self.set(args[0], f"as<{kind}>({self.value(args[1])})")

    def do_setp(self, name, modifiers, args):
        comparison, *join, kind = modifiers
        result = f"compare_{comparison}<{kind}>({self.values(args[1:3])})"
        if join:
            result = f"bool({result} {({'and': '&', 'or': '|', 'xor': '^'})[join[0]]} {self.value(args[3])})"
        return "|" not in args[0] and self.set(args[0], result)

    def do_ld(self, name, modifiers, args):
        (*modifiers, kind), parts = modifiers, vector(args[0])
        if "param" in modifiers:
            parameter, _, offset = args[1].strip("[] ").partition("+")
            base = f"reinterpret_cast<const unsigned char*>({self.value(parameter.strip())})"
            return self.spread(
                parts, f"parameter<{kind}, {len(parts)}>({base} + {int(offset or 0)})"
            )
        found = f"load<{kind}, {len(parts)}>({self.space(modifiers)}, {self.address(args[1])}, {self.site})"
        return self.space(modifiers) and self.spread(parts, found)

    do_ldu = do_ld

    def do_st(self, name, modifiers, args):
        kind, parts, where = modifiers[-1], vector(args[1]), self.space(modifiers[:-1])
        values = ", ".join(f"as<{kind}>({self.value(part)})" for part in parts)
        call = f"store<{kind}, {len(parts)}>({where}, {self.address(args[0])}, {{{values}}}, {self.site});"
        return where and call

    def do_cvta(self, name, modifiers, args):
        turned = f"Any({self.value(args[1])}).bits"
        if "shared" in modifiers:  # from a generic address, or to one
            to = f"checked(Space::generic, {turned}, 1, {self.site})"
            turned = to if "to" in modifiers else f"from_shared({turned})"
        return self.set(args[0], turned)

    def do_atom(self, name, modifiers, args):
        (*modifiers, what, kind), where = modifiers, self.space(modifiers[:-2])
        places = f"{where}, {self.address(args[1])}, {self.site}"
        return where and self.set(
            args[0], f"atomic_{what}<{kind}>({places}, {self.values(args[2:])})"
        )

    def do_red(self, name, modifiers, args):
        return self.do_atom(name, modifiers, ["_", *args])

    def do_bra(self, name, modifiers, args):
        return f"goto L_{identifier(args[0])};"

    def do_ret(self, name, modifiers, args):
        return "return;"

    def do_bar(self, name, modifiers, args):
        if modifiers[:1] == ["warp"]:
            return f"sync_warp({self.value(args[0])}, {self.site});"
        what = {"sync": "sync_block", "arrive": "arrive_block"}.get(modifiers[0])
        count = self.value(args[1]) if len(args) > 1 else "0u"
        return (
            what
            and set(modifiers[1:]) <= {"aligned"}
            and f"{what}({self.value(args[0])}, {count}, {self.site});"
        )

    do_exit, do_barrier = do_ret, do_bar

    def do_shfl(self, name, modifiers, args):
        found = f"shuffle('{modifiers[1][0]}', {self.values(args[1:])}, {self.site})"
        return len(args) == 5 and self.spread(args[0].split("|"), found)

    def do_vote(self, name, modifiers, args):
        return self.set(args[0], f"vote_{modifiers[1]}({self.values(args[1:])}, {self.site})")

    def do_redux(self, name, modifiers, args):
        return self.set(
            args[0],
            f"reduce_{modifiers[1]}<{modifiers[-1]}>({self.values(args[1:])}, {self.site})",
        )

    def do_mma(self, name, modifiers, args):
        shape = re.match(
            r"sync aligned m16n8k16 row col f32 (bf16|f16) \1 f32$", " ".join(modifiers)
        )
        a, b, c = (self.values(vector(arg)) for arg in args[1:])
        brain = str(shape and shape[1] == "bf16").lower()
        return shape and self.spread(
            vector(args[0]), f"multiply({brain}, {{{a}}}, {{{b}}}, {{{c}}}, {self.site})"
        )

    def do_ldmatrix(self, name, modifiers, args):
        parts, turned = vector(args[0]), str("trans" in modifiers).lower()
        found = f"load_matrices<{len(parts)}, {turned}>({self.address(args[1])}, {self.site})"
        return "m8n8" in modifiers and modifiers[-1] == "b16" and self.spread(parts, found)

    def do_cp(self, name, modifiers, args):
        if modifiers[:2] == ["async", "bulk"]:
            return self.bulk(modifiers[2:], args)
        if modifiers == ["async", "commit_group"]:
            return "commit_copies();"
        if modifiers in (["async", "wait_group"], ["async", "wait_all"]):
            return f"wait_copies({args[0] if args else 0});"
        if modifiers[0] != "async" or modifiers[1] not in ("ca", "cg"):
            return None
        places = f"{args[2]}, {self.address(args[0])}, {self.address(args[1])}, {self.value(args[-1])}, {self.site}"
        return f"copy_later({places});"

    def bulk(self, modifiers, args):
        if modifiers == ["commit_group"]:
            return "commit_tiles();"
        if modifiers[0] == "wait_group":
            return f"wait_tiles({args[0]});"
        words = set(modifiers) - {"tile", "L2::cache_hint"}
        if words in (
            {"tensor", "2d", space, "global", "mbarrier::complete_tx::bytes"}
            for space in SHARED
        ):
            places = f"{self.address(args[0])}, {self.tile(args[1])}, {self.address(args[2])}"
            return f"fetch_tile({places}, {self.site});"
        if words == {"tensor", "2d", "global", "shared::cta", "bulk_group"}:
            return f"store_tile({self.tile(args[0])}, {self.address(args[1])}, {self.site});"

    def tile(self, operand):
        """The address of a tensor map and a place of its tensor."""
        tensor, column, row = re.match(
            r"\[\s*([^,]+?)\s*,\s*\{([^,]+),([^}]+)\}\s*\]$", operand
        ).groups()
        column, row = column.strip(), row.strip()
        return f"{self.address(f'[{tensor}]')}, {{{self.values([column, row])}}}"

    def do_mbarrier(self, name, modifiers, args):
        what, rest = modifiers[0], set(modifiers[1:]) - MBARRIER
        if what in ("init", "inval") and not rest:
            return f"barrier_{what}({', '.join([self.address(args[0]), *map(self.value, args[1:]), self.site])});"
        if what == "arrive" and rest <= {"expect_tx"}:
            given = self.values(args[2:3]) or "1u"
            counts = f"{given}, 1u" if rest else f"0u, {given}"
            return self.set(
                args[0], f"barrier_arrive({self.address(args[1])}, {counts}, {self.site})"
            )
        if what == "expect_tx" and rest <= {"relaxed"}:
            return (
                f"barrier_expect({self.address(args[0])}, {self.value(args[1])}, {self.site});"
            )
        if what in ("try_wait", "test_wait") and rest == {"parity"}:
            return self.set(
                args[0],
                f"barrier_passed({self.address(args[1])}, {self.value(args[2])}, {self.site})",
            )

    def do_fence(self, name, modifiers, args):
        return "fence_asynchronous();" if modifiers[:2] == ["proxy", "async"] else ";"

    def do_wgmma(self, name, modifiers, args):
        if modifiers[0] in ("fence", "commit_group"):
            return {"fence": ";", "commit_group": "commit_products();"}[modifiers[0]]
        if modifiers[0] == "wait_group":
            return f"wait_products({args[0]}, {self.site});"
        shape, sums = (
            re.match(
                r"mma_async sync aligned m64n(\d+)k16 f32 (bf16|f16) \2$", " ".join(modifiers)
            ),
            vector(args[0]),
        )
        if (
            not shape or len(sums) != int(shape[1]) // 2 or args[4:6] != ["1", "1"]
        ):  # 1: no sign is turned
            return None
        held = vector(args[1]) if args[1].startswith("{") else []
        a, b = "0" if held else self.value(args[1]), self.value(args[2])
        flags = [
            shape[2] == "bf16",
            held,
            *([False] * bool(held)),
            *(turned == "1" for turned in args[6:]),
        ]
        flags = ", ".join(str(bool(flag)).lower() for flag in flags)
        product = f"{{Any({a}).bits, Any({b}).bits, {shape[1]}, as<bool>({self.value(args[3])}), {flags}, {self.site}}}"
        sums, held = (
            ", ".join(f"&{self.value(register)}" for register in part) for part in (sums, held)
        )
        registers = f"u32 *const sums[] = {{{sums}}}, *const held[] = {{{held or 'nullptr'}}};"
        return f"{registers} multiply_later({product}, sums, held);"

    def do_griddepcontrol(self, name, modifiers, args):
        return "wait_for_launch_before();" if modifiers == ["wait"] else ";"

    def do_trap(self, name, modifiers, args):
        return f'fail(std::string("trap at ") + {self.site});'
