"""PTX instructions as C++ statements. They call the functions of the emulator's headers."""

import re

from .ptx import SIZES, Unknown, commas, identifier, literal, vector

WITH_AXIS = {  # special registers such as %tid.x
    "%tid": "self->tid",
    "%ntid": "launch.threads",
    "%ctaid": "launch.block",
    "%nctaid": "launch.blocks",
}
WITHOUT_AXIS = {"%laneid": "self->lane", "%warpid": "self->warp", "WARP_SZ": "32u"}
ARITHMETIC = {  # opcode: the modifiers that it may have besides its type
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
# These do nothing here, since blocks run one after another and nothing is cached.
NOTHING = {"membar", "prefetch", "nanosleep", "setmaxnreg"}
MBARRIER = {"shared", *SHARED, "b64", "release", "acquire", "cta", "cluster"}


def truth(value):
    """A bool as C++ has it."""
    return str(bool(value)).lower()


class Instructions:
    """Translates the instructions of a kernel. The subclass Kernel translates its declarations.

    A method do_<opcode> takes the opcode, its modifiers and its operands. It returns a statement,
    or None if it does not know the modifiers.
    """

    def value(self, operand):
        """An operand as C++."""
        stem, _, axis = operand.partition(".")
        if operand in self.registers:
            return f"R{identifier(operand)}"
        if stem in WITH_AXIS:
            return f"{WITH_AXIS[stem]}.{axis}"
        if operand in self.parameters:
            return f"u64(parameters + {self.parameters[operand][0]})"
        if operand in WITHOUT_AXIS:
            return WITHOUT_AXIS[operand]
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
        """The state space, or None if a modifier is unknown."""
        if not set(modifiers) <= QUALIFIERS:
            return None
        named = [SPACES[m] for m in modifiers if m in SPACES]
        return "Space::" + (named or ["generic"])[0]

    def set(self, destination, expression):
        if destination == "_":
            return f"{expression};"
        return f"set({self.value(destination)}, {expression});"

    def set_each(self, destinations, expression):
        """Sets destinations to the elements of an expression."""
        statements = [
            self.set(destination, f"V[{i}]")
            for i, destination in enumerate(destinations)
        ]
        return f"auto V = {expression}; " + " ".join(statements)

    def instruction(self, text):
        """A line of C++ for an instruction with its guard."""
        guard, opcode, operands = re.match(
            r"(?:@(!?[%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text
        ).groups()
        name, *modifiers = opcode.split(".")
        translate = (
            self.arithmetic if name in ARITHMETIC else getattr(self, f"do_{name}", None)
        )
        if name in NOTHING:
            body = ";"
        else:
            body = translate and translate(name, modifiers, commas(operands))
        if not body:
            raise Unknown(f"instruction {text} at {self.site}")
        if not guard:
            return f"  {{ {body} }}"
        negation = "!" if guard[0] == "!" else ""
        return f"  if ({negation}{self.value(guard.lstrip('!'))}) {{ {body} }}"

    def arithmetic(self, name, modifiers, args):
        types = [m for m in modifiers if m in SIZES]
        others = [m for m in modifiers if m not in SIZES]
        if not set(others) <= set(ARITHMETIC[name].split()):
            return None
        function = "_".join(["op", name, *(m for m in others if m not in IGNORED)])
        expression = f"{function}<{', '.join(types)}>({self.values(args[1:])})"
        return self.set(args[0], expression)

    def do_mov(self, name, modifiers, args):
        dtype = modifiers[-1]
        bits = 8 * SIZES[dtype]
        destinations = vector(args[0])
        if args[1].startswith("{"):
            return self.set(
                args[0], f"pack<u{bits}>({{{self.values(vector(args[1]))}}})"
            )
        value = self.value(args[1])
        count = len(destinations)
        if count > 1:
            return self.set_each(
                destinations, f"unpack<{bits // count}, {count}>({value})"
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
        destinations = vector(args[0])
        count = len(destinations)
        if "param" in modifiers:
            parameter, _, offset = args[1].strip("[] ").partition("+")
            base = f"reinterpret_cast<const unsigned char*>({self.value(parameter.strip())})"
            start = f"{base} + {int(offset or 0)}"
            return self.set_each(destinations, f"parameter<{dtype}, {count}>({start})")
        space = self.space(modifiers)
        if not space:
            return None
        load = f"load<{dtype}, {count}>({space}, {self.address(args[1])}, {self.site})"
        return self.set_each(destinations, load)

    do_ldu = do_ld

    def do_st(self, name, modifiers, args):
        *modifiers, dtype = modifiers
        space = self.space(modifiers)
        if not space:
            return None
        elements = vector(args[1])
        values = ", ".join(
            f"as<{dtype}>({self.value(element)})" for element in elements
        )
        given = f"{space}, {self.address(args[0])}, {{{values}}}, {self.site}"
        return f"store<{dtype}, {len(elements)}>({given});"

    def do_cvta(self, name, modifiers, args):
        address = f"Any({self.value(args[1])}).bits"
        if "shared" in modifiers and "to" in modifiers:  # from a generic address
            address = f"checked(Space::generic, {address}, 1, {self.site})"
        elif "shared" in modifiers:  # to a generic address
            address = f"from_shared({address})"
        return self.set(args[0], address)

    def do_atom(self, name, modifiers, args):
        *modifiers, operation, dtype = modifiers
        space = self.space(modifiers)
        if not space:
            return None
        given = (
            f"{space}, {self.address(args[1])}, {self.site}, {self.values(args[2:])}"
        )
        return self.set(args[0], f"atomic_{operation}<{dtype}>({given})")

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

    do_exit = do_ret
    do_barrier = do_bar

    def do_shfl(self, name, modifiers, args):
        if len(args) != 5:
            return None
        shuffled = f"shuffle('{modifiers[1][0]}', {self.values(args[1:])}, {self.site})"
        return self.set_each(args[0].split("|"), shuffled)

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
        return self.set_each(vector(args[0]), f"multiply({factors}, {self.site})")

    def do_ldmatrix(self, name, modifiers, args):
        if "m8n8" not in modifiers or modifiers[-1] != "b16":
            return None
        destinations = vector(args[0])
        function = f"load_matrices<{len(destinations)}, {truth('trans' in modifiers)}>"
        return self.set_each(
            destinations, f"{function}({self.address(args[1])}, {self.site})"
        )

    def do_cp(self, name, modifiers, args):
        if modifiers[:2] == ["async", "bulk"]:
            return self.bulk(modifiers[2:], args)
        if modifiers == ["async", "commit_group"]:
            return "commit_copies();"
        if modifiers in (["async", "wait_group"], ["async", "wait_all"]):
            return f"wait_copies({args[0] if args else 0});"
        if modifiers[0] != "async" or modifiers[1] not in ("ca", "cg"):
            return None
        addresses = f"{self.address(args[0])}, {self.address(args[1])}"
        return (
            f"copy_async({args[2]}, {addresses}, {self.value(args[-1])}, {self.site});"
        )

    def bulk(self, modifiers, args):
        """cp.async.bulk"""
        if modifiers == ["commit_group"]:
            return "commit_stores();"
        if modifiers[0] == "wait_group":
            return f"wait_stores({args[0]});"
        words = set(modifiers) - {"tile", "L2::cache_hint"}
        for space in SHARED:
            if words == {
                "tensor",
                "2d",
                space,
                "global",
                "mbarrier::complete_tx::bytes",
            }:
                target = self.address(args[0])
                tile = self.tile(args[1])
                barrier = self.address(args[2])
                return f"fetch_tile({target}, {tile}, {barrier}, {self.site});"
        if words == {"tensor", "2d", "global", "shared::cta", "bulk_group"}:
            return f"store_tile({self.tile(args[0])}, {self.address(args[1])}, {self.site});"
        return None

    def tile(self, operand):
        """The address of a tensor map, and where the tile starts in its tensor."""
        tensor, column, row = re.match(
            r"\[\s*([^,]+?)\s*,\s*\{([^,]+),([^}]+)\}\s*\]$", operand
        ).groups()
        column = self.value(column.strip())
        row = self.value(row.strip())
        start = f"{{.column = {column}, .row = {row}}}"
        return f"{self.address(f'[{tensor}]')}, {start}"

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
            return self.set(args[0], f"wait_barrier({given})")
        return None

    def do_fence(self, name, modifiers, args):
        return "fence_async_proxy();" if modifiers[:2] == ["proxy", "async"] else ";"

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
        in_registers = args[1].startswith("{")
        a_registers = vector(args[1]) if in_registers else []
        transposed = [flag == "1" for flag in args[6:]]
        if in_registers:
            transposed.insert(0, False)  # a in registers cannot be transposed
        a_transposed, b_transposed = transposed
        fields = {
            "a": "0" if in_registers else f"Any({self.value(args[1])}).bits",
            "b": f"Any({self.value(args[2])}).bits",
            "columns": shape[1],
            "accumulates": f"as<bool>({self.value(args[3])})",
            "is_bf16": truth(shape[2] == "bf16"),
            "a_in_registers": truth(in_registers),
            "a_transposed": truth(a_transposed),
            "b_transposed": truth(b_transposed),
            "site": self.site,
        }
        product = ", ".join(f".{field} = {value}" for field, value in fields.items())
        return (
            f"u32 *const sums[] = {{{self.addresses(sums)}}}; "
            f"u32 *const a_registers[] = {{{self.addresses(a_registers) or 'nullptr'}}}; "
            f"multiply_async({{{product}}}, sums, a_registers);"
        )

    def addresses(self, registers):
        return ", ".join(f"&{self.value(register)}" for register in registers)

    def do_griddepcontrol(self, name, modifiers, args):
        return "wait_for_launch_before();" if modifiers == ["wait"] else ";"

    def do_trap(self, name, modifiers, args):
        return f'fail(std::string("trap at ") + {self.site});'
