"""How the code is written, as far as a machine can hold it: HOUSE's sizes, names and statements."""

import ast
import io
import tokenize

import pytest
from tree import FILES, PYTHON, functions, name, nodes

VAGUE = {"path", "way", "found", "kind", "part"}  # each had many meanings
BLANK = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def test_files_are_small():
    sizes = {name(path): len(path.read_text().splitlines()) for path in FILES}
    assert {path: size for path, size in sizes.items() if size > 400} == {}
    assert sizes["peftops/_op.py"] + sizes["peftops/backends.py"] <= 220


def test_functions_are_small():
    def is_kernel(node):
        return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)

    sizes = {
        f"{name(path)}:{function.name}": function.end_lineno - function.lineno + 1
        for path in PYTHON
        for function in functions(path)
        if not is_kernel(function)
    }
    assert {function: size for function, size in sizes.items() if size > 60} == {}


def test_lines_are_short():
    long = [
        f"{name(path)}:{number}"
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 100
    ]
    assert long == []


def test_names_of_functions_say_what_they_do():
    vague = [
        f"{name(path)}:{function.name}"
        for path in PYTHON
        for function in functions(path)
        if function.name in VAGUE
    ]
    assert vague == []


def test_one_statement_a_line():
    """Over the tree, so that a dense file is not made up for by squeezing another."""
    statements = 0
    lines = 0
    for path in PYTHON:
        tree = ast.parse(path.read_text())
        texts = {node for node in ast.walk(tree) if is_text(node)}
        statements += sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) - len(
            texts
        )
        lines += len(code_lines(path.read_text(), texts))
    assert statements / lines <= 0.65


def is_text(node):
    """Whether a node is a docstring."""
    value = getattr(node, "value", None)
    return isinstance(node, ast.Expr) and isinstance(getattr(value, "value", None), str)


def code_lines(source, texts):
    """The numbers of the lines that hold more than a comment or a docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in BLANK:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in texts:
        lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return lines


def is_nested_choice(node):
    """a if b else (c if d else e)"""
    if not isinstance(node, ast.IfExp):
        return False
    return any(
        isinstance(child, ast.IfExp) for child in (node.body, node.orelse, node.test)
    )


def is_text_times_truth(node):
    """ "text" * (a > b)"""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
        return False
    sides = node.left, node.right
    return any(map(is_literal, sides)) and any(map(is_truth, sides))


def is_literal(node):
    text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return text or isinstance(node, ast.JoinedStr | ast.List | ast.Tuple)


def is_truth(node):
    negated = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    called = isinstance(node, ast.Call) and ast.unparse(node.func) == "bool"
    return negated or called or isinstance(node, ast.Compare | ast.BoolOp)


def is_for_as_if(node):
    """for x in (items if wanted else ())"""
    return isinstance(node, ast.For) and isinstance(node.iter, ast.IfExp)


def assigns_many(node):
    """one, two, three = x, y, z, where nothing is unpacked; sizes such as m, k, n may be many"""
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Tuple):
        return False
    if all(len(ast.unparse(target)) == 1 for target in node.targets[0].elts):
        return False
    if not isinstance(node.value, ast.Tuple) or len(node.targets[0].elts) < 3:
        return False
    return not any(isinstance(item, ast.Starred) for item in node.value.elts)


@pytest.mark.parametrize(
    "pattern, example",
    [
        (is_nested_choice, "x = a if b else c if d else e"),
        (is_text_times_truth, "x = 'a' * (b > c) + ['d'] * bool(e)"),
        (is_for_as_if, "for x in y if z else (): pass"),
        (assigns_many, "one, two, three = x, y, z"),
    ],
)
def test_a_line_says_one_thing(pattern, example):
    assert any(map(pattern, ast.walk(ast.parse(example))))
    lines = [
        f"{name(path)}:{node.lineno}"
        for path in PYTHON
        for node in nodes(path)
        if pattern(node)
    ]
    assert lines == []
