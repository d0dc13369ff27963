"""PTX instructions as C++ statements. What one computes is in machine.h, under its name."""

import re

from .ptx import SIZES, Unknown, commas, identifier, literal, vector

SPECIAL = {  # registers with an axis
    "%tid": "self->tid",
    "%ntid": "launch.threads",
    "%ctaid": "launch.block",
    "%nctaid": "launch.blocks",
}
LONE = {"%laneid": "self->lane", "%warpid": "self->warp", "WARP_SZ": "32u"}
PLAIN = {  # opcode: the modifiers that it may carry besides its type
    **dict.fromkeys(("add", "sub", "div", "fma", "sqrt"), "rn approx full"),
    **dict.fromkeys(("rcp", "rsqrt", "ex2", "lg2"), "rn approx full"),
    **dict.fromkeys(("rem", "min", "max", "and", "or", "xor"), ""),
    **dict.fromkeys(("not", "neg", "abs", "shl", "shr"), ""),
    **dict.fromkeys(
        ("selp", "bfe", "bfi", "popc", "clz", "brev", "prmt", "lop3", "copysign"), ""
    ),
    "mul": "lo hi wide rn",
    "mad": "lo hi wide",
    "shf": "l r wrap clamp",
    "cvt": "rn rzi rni rmi rpi",
}
IGNORED = {"rn", "approx", "full"}  # C++ rounds to nearest and does not approximate
SPACES = {
    "global": "global",
    "const": "global",
    "shared": "shared",
    "shared::cta": "shared",
    "local": "local",
}
SHARED = ("shared::cta", "shared::cluster")  # the same in a cluster of one block
QUALIFIERS = {"nc", "ca", "cg", "cs", "volatile", "relaxed", "gpu", "cta", "v2", "v4"}
QUALIFIERS |= {"L1::no_allocate", *SPACES}
# These do nothing, since blocks run one after another and there is one memory.
NOTHING = {"membar", "prefetch", "nanosleep", "setmaxnreg"}
MBARRIER = {"shared", *SHARED, "b64", "release", "acquire", "cta", "cluster"}


def truth(value):
    """A bool as C++ has it."""
    return str(bool(value)).lower()


class Instructions:
    """The instructions of a kernel; Kernel has what is declared in it.

    A method do_<opcode> takes the opcode, its modifiers and its operands, and returns a
    statement, or something false if it does not know the modifiers.
    """

    def value(self, operand):
        """An operand as C++."""
        stem, _, axis = operand.partition(".")
        if operand in self.registers:
            return f"R{identifier(operand)}"
        if stem in SPECIAL:
            return f"{SPECIAL[stem]}.{axis}"
        if operand in self.parameters:
            return f"u64(parameters + {self.parameters[operand][0]})"
        if operand in LONE:
            return LONE[operand]
        if operand in self.symbols:
            return self.symbols[operand]
        if re.match(r"-?\d", operand):
            return literal(operand)
        raise Unknown(f"operand {operand}")

    def values(self, operands):
        return ", ".join(map(self.value, operands))

    def address(self, operand):
        """[base + offset] as C++."""
        base, offset = re.match(
            r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]$", operand
        ).groups()
        start = f"Any({self.value(base)}).bits"
        return f"{start} + ({offset})" if offset else start

    def space(self, modifiers):
        """The state space, or None if a modifier is not known to mean nothing here."""
        if not set(modifiers) <= QUALIFIERS:
            return None
        named = [SPACES[m] for m in modifiers if m in SPACES]
        return "Space::" + (named or ["generic"])[0]

    def set(self, destination, expression):
        if destination == "_":
            return f"{expression};"
        return f"set({self.value(destination)}, {expression});"

    def spread(self, destinations, expression):
        """Sets destinations to the elements of an expression."""
        sets = [self.set(d, f"V[{i}]") for i, d in enumerate(destinations)]
        return f"auto V = {expression}; " + " ".join(sets)

    def instruction(self, text):
        """A line of C++ for an instruction with its guard."""
        guard, opcode, operands = re.match(
            r"(?:@(!?[%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text
        ).groups()
        name, *modifiers = opcode.split(".")
        rule = self.plain if name in PLAIN else getattr(self, f"do_{name}", None)
        if name in NOTHING:
            body = ";"
        else:
            body = rule and rule(name, modifiers, commas(operands))
        if not body:
            raise Unknown(f"instruction {text} at {self.site}")
        if not guard:
            return f"  {{ {body} }}"
        negation = "!" if guard[0] == "!" else ""
        return f"  if ({negation}{self.value(guard.lstrip('!'))}) {{ {body} }}"

    def plain(self, name, modifiers, args):
        types = [m for m in modifiers if m in SIZES]
        others = [m for m in modifiers if m not in SIZES]
        if not set(others) <= set(PLAIN[name].split()):
            return None
        function = "_".join(["op", name, *(m for m in others if m not in IGNORED)])
        expression = f"{function}<{', '.join(types)}>({self.values(args[1:])})"
        return self.set(args[0], expression)

    def do_mov(self, name, modifiers, args):
        dtype = modifiers[-1]
        bits = 8 * SIZES[dtype]
        parts = vector(args[0])
        if args[1].startswith("{"):
            return self.set(
                args[0], f"pack<u{bits}>({{{self.values(vector(args[1]))}}})"
            )
        value = self.value(args[1])
        if len(parts) > 1:
            return self.spread(
                parts, f"unpack<{bits // len(parts)}, {len(parts)}>({value})"
            )
        return self.set(args[0], f"as<{dtype}>({value})")

    def do_setp(self, name, modifiers, args):
        comparison, *join, dtype = modifiers
        if "|" in args[0]:
            return None
        result = f"compare_{comparison}<{dtype}>({self.values(args[1:3])})"
        if join:
            operator = {"and": "&", "or": "|", "xor": "^"}[join[0]]
            result = f"bool({result} {operator} {self.value(args[3])})"
        return self.set(args[0], result)

    def do_ld(self, name, modifiers, args):
        *modifiers, dtype = modifiers
        parts = vector(args[0])
        if "param" in modifiers:
            parameter, _, offset = args[1].strip("[] ").partition("+")
            base = f"reinterpret_cast<const unsigned char*>({self.value(parameter.strip())})"
            start = f"{base} + {int(offset or 0)}"
            return self.spread(parts, f"parameter<{dtype}, {len(parts)}>({start})")
        space = self.space(modifiers)
        place = f"{space}, {self.address(args[1])}, {self.site}"
        return space and self.spread(parts, f"load<{dtype}, {len(parts)}>({place})")

    do_ldu = do_ld

    def do_st(self, name, modifiers, args):
        *modifiers, dtype = modifiers
        parts = vector(args[1])
        space = self.space(modifiers)
        values = ", ".join(f"as<{dtype}>({self.value(part)})" for part in parts)
        given = f"{space}, {self.address(args[0])}, {{{values}}}, {self.site}"
        return space and f"store<{dtype}, {len(parts)}>({given});"

    def do_cvta(self, name, modifiers, args):
        turned = f"Any({self.value(args[1])}).bits"
        if "shared" in modifiers and "to" in modifiers:  # from a generic address
            turned = f"checked(Space::generic, {turned}, 1, {self.site})"
        elif "shared" in modifiers:  # to one
            turned = f"from_shared({turned})"
        return self.set(args[0], turned)

    def do_atom(self, name, modifiers, args):
        *modifiers, operation, dtype = modifiers
        space = self.space(modifiers)
        given = (
            f"{space}, {self.address(args[1])}, {self.site}, {self.values(args[2:])}"
        )
        return space and self.set(args[0], f"atomic_{operation}<{dtype}>({given})")

    def do_red(self, name, modifiers, args):
        return self.do_atom(name, modifiers, ["_", *args])

    def do_bra(self, name, modifiers, args):
        return f"goto L_{identifier(args[0])};"

    def do_ret(self, name, modifiers, args):
        return "return;"

    def do_bar(self, name, modifiers, args):
        if modifiers[:1] == ["warp"]:
            return f"sync_warp({self.value(args[0])}, {self.site});"
        function = {"sync": "sync_block", "arrive": "arrive_block"}.get(modifiers[0])
        if not function or not set(modifiers[1:]) <= {"aligned"}:
            return None
        count = self.value(args[1]) if len(args) > 1 else "0u"
        return f"{function}({self.value(args[0])}, {count}, {self.site});"

    do_exit, do_barrier = do_ret, do_bar

    def do_shfl(self, name, modifiers, args):
        if len(args) != 5:
            return None
        shuffled = f"shuffle('{modifiers[1][0]}', {self.values(args[1:])}, {self.site})"
        return self.spread(args[0].split("|"), shuffled)

    def do_vote(self, name, modifiers, args):
        return self.set(
            args[0], f"vote_{modifiers[1]}({self.values(args[1:])}, {self.site})"
        )

    def do_redux(self, name, modifiers, args):
        function = f"reduce_{modifiers[1]}<{modifiers[-1]}>"
        return self.set(args[0], f"{function}({self.values(args[1:])}, {self.site})")

    def do_mma(self, name, modifiers, args):
        shape = re.match(
            r"sync aligned m16n8k16 row col f32 (bf16|f16) \1 f32$", " ".join(modifiers)
        )
        if not shape:
            return None
        a, b, c = (self.values(vector(arg)) for arg in args[1:])
        factors = f"{truth(shape[1] == 'bf16')}, {{{a}}}, {{{b}}}, {{{c}}}"
        return self.spread(vector(args[0]), f"multiply({factors}, {self.site})")

    def do_ldmatrix(self, name, modifiers, args):
        if "m8n8" not in modifiers or modifiers[-1] != "b16":
            return None
        parts = vector(args[0])
        function = f"load_matrices<{len(parts)}, {truth('trans' in modifiers)}>"
        return self.spread(parts, f"{function}({self.address(args[1])}, {self.site})")

    def do_cp(self, name, modifiers, args):
        if modifiers[:2] == ["async", "bulk"]:
            return self.bulk(modifiers[2:], args)
        if modifiers == ["async", "commit_group"]:
            return "commit_copies();"
        if modifiers in (["async", "wait_group"], ["async", "wait_all"]):
            return f"wait_copies({args[0] if args else 0});"
        if modifiers[0] != "async" or modifiers[1] not in ("ca", "cg"):
            return None
        places = f"{self.address(args[0])}, {self.address(args[1])}"
        return f"copy_later({args[2]}, {places}, {self.value(args[-1])}, {self.site});"

    def bulk(self, modifiers, args):
        """cp.async.bulk"""
        if modifiers == ["commit_group"]:
            return "commit_tiles();"
        if modifiers[0] == "wait_group":
            return f"wait_tiles({args[0]});"
        words = set(modifiers) - {"tile", "L2::cache_hint"}
        for space in SHARED:
            if words == {
                "tensor",
                "2d",
                space,
                "global",
                "mbarrier::complete_tx::bytes",
            }:
                to, barrier = self.address(args[0]), self.address(args[2])
                return (
                    f"fetch_tile({to}, {self.tile(args[1])}, {barrier}, {self.site});"
                )
        if words == {"tensor", "2d", "global", "shared::cta", "bulk_group"}:
            return f"store_tile({self.tile(args[0])}, {self.address(args[1])}, {self.site});"
        return None

    def tile(self, operand):
        """The address of a tensor map and a place in its tensor."""
        tensor, column, row = re.match(
            r"\[\s*([^,]+?)\s*,\s*\{([^,]+),([^}]+)\}\s*\]$", operand
        ).groups()
        place = self.values([column.strip(), row.strip()])
        return f"{self.address(f'[{tensor}]')}, {{{place}}}"

    def do_mbarrier(self, name, modifiers, args):
        operation = modifiers[0]
        others = set(modifiers[1:]) - MBARRIER
        if operation in ("init", "inval") and not others:
            given = [self.address(args[0]), *map(self.value, args[1:]), self.site]
            return f"barrier_{operation}({', '.join(given)});"
        if operation == "arrive" and others <= {"expect_tx"}:
            given = self.values(args[2:3]) or "1u"
            counts = f"{given}, 1u" if others else f"0u, {given}"
            arrive = f"barrier_arrive({self.address(args[1])}, {counts}, {self.site})"
            return self.set(args[0], arrive)
        if operation == "expect_tx" and others <= {"relaxed"}:
            given = f"{self.address(args[0])}, {self.value(args[1])}, {self.site}"
            return f"barrier_expect({given});"
        if operation in ("try_wait", "test_wait") and others == {"parity"}:
            given = f"{self.address(args[1])}, {self.value(args[2])}, {self.site}"
            return self.set(args[0], f"barrier_passed({given})")
        return None

    def do_fence(self, name, modifiers, args):
        return "fence_asynchronous();" if modifiers[:2] == ["proxy", "async"] else ";"

    def do_wgmma(self, name, modifiers, args):
        if modifiers[0] == "fence":
            return ";"
        if modifiers[0] == "commit_group":
            return "commit_products();"
        if modifiers[0] == "wait_group":
            return f"wait_products({args[0]}, {self.site});"
        shape = re.match(
            r"mma_async sync aligned m64n(\d+)k16 f32 (bf16|f16) \2$",
            " ".join(modifiers),
        )
        sums = vector(args[0])
        signs = args[4:6]  # 1: the factor is not negated
        if not shape or len(sums) != int(shape[1]) // 2 or signs != ["1", "1"]:
            return None
        held = vector(args[1]) if args[1].startswith("{") else []  # a lies in registers
        a = "0" if held else self.value(args[1])
        flags = [shape[2] == "bf16", held]
        if held:
            flags.append(False)  # only a tile can be turned
        flags += [turned == "1" for turned in args[6:]]
        descriptors = f"Any({a}).bits, Any({self.value(args[2])}).bits"
        add = f"as<bool>({self.value(args[3])})"
        flags = ", ".join(map(truth, flags))
        product = f"{{{descriptors}, {shape[1]}, {add}, {flags}, {self.site}}}"
        sums = ", ".join(f"&{self.value(register)}" for register in sums)
        held = ", ".join(f"&{self.value(register)}" for register in held) or "nullptr"
        registers = f"u32 *const sums[] = {{{sums}}}, *const held[] = {{{held}}};"
        return f"{registers} multiply_later({product}, sums, held);"

    def do_griddepcontrol(self, name, modifiers, args):
        return "wait_for_launch_before();" if modifiers == ["wait"] else ";"

    def do_trap(self, name, modifiers, args):
        return f'fail(std::string("trap at ") + {self.site});'
