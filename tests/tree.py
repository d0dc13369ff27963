"""The files of the tree, for tests that read it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENDINGS = ".py", ".cpp", ".cu", ".cuh", ".h"
FILES = [
    path
    for folder in ("peftops", "csrc", "bench", "tests")
    for path in sorted((ROOT / folder).rglob("*.*"))
    if path.suffix in ENDINGS
]
PYTHON = [path for path in FILES if path.suffix == ".py"]
TESTS = [path for path in PYTHON if path.is_relative_to(ROOT / "tests")]


def name(path):
    return str(path.relative_to(ROOT))


def functions(path):
    return [node for node in nodes(path) if isinstance(node, ast.FunctionDef)]


def nodes(path):
    return list(ast.walk(ast.parse(path.read_text())))
