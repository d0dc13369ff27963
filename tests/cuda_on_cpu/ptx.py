"""What the translation reads in PTX: the sizes of types, names, operands and literals."""

import re

SIZES = {"pred": 1, "bf16": 2, "f16x2": 4, "bf16x2": 4}  # bytes of each type
SIZES |= {f"{letter}{bits}": bits // 8 for letter in "bsuf" for bits in (8, 16, 32, 64)}


class Unknown(Exception):
    """The translation knows no such PTX."""


def identifier(name):
    """A name with the characters that C++ allows."""
    return re.sub(r"\W", "_", name)


def commas(text):
    """The operands of an instruction. Commas inside brackets do not separate them."""
    operands = re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,\[{])+", text)
    return [operand.strip() for operand in operands if operand.strip()]


def vector(operand):
    """The elements of an operand in braces, or the operand alone."""
    return commas(operand.strip("{} ")) if operand.startswith("{") else [operand]


def literal(text):
    """An immediate as the bits of a register."""
    if text[:2].lower() in ("0f", "0d"):
        return f"0x{text[2:]}ull"
    suffix = "ll" if text[0] == "-" else "ull"
    return text.rstrip("U") + suffix
