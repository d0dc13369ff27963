"""Multi-LoRA's kernels for the CPU: every instruction set, routes that do not exist, threads."""

import isa
import pytest
import torch
from replays import same, twice

from peftops import _replay, backend, backends
from peftops.testing.cases import CASES
from peftops.testing.law import call, check, check_case, function, outputs

pytest.importorskip("peftops._C")

SHAPE = 37, 96, 130, 5
OPS = {
    "multi_fwd": 4,
    "multi_bwd": 5,
    "multi_add_": 4,
}  # and where their slots, table and rank begin
WRONG = [  # (an argument's place after slots, its new value, what the error says)
    (0, 4, r"multi: slots must be in \[-1, 4\), got 4"),
    (0, -2, r"multi: slots must be in \[-1, 4\), got -2"),
    (1, 6, r"multi: table must be in \[0, 6\), got 6"),
    (1, -1, r"multi: table must be in \[0, 6\), got -1"),
    (2, 9, r"multi: rank must be in \[0, 9\), got 9"),
    (2, -1, r"multi: rank must be in \[0, 9\), got -1"),
]


def case(op, shape=SHAPE, label="mixed"):
    return dict(CASES[op](shape, torch.float32))[label]


def spoiled(op, place, value):
    """Arguments of an op in which one value of the route is wrong."""
    args = case(op)
    args[OPS[op] + place].flatten()[0] = value
    return args


@pytest.mark.parametrize("name", isa.NAMES)
def test_every_instruction_set(name, on_isa):
    on_isa(name)
    for op in OPS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for shape in ((5, 133, 33, 20), (70, 64, 48, 16)):
                for label, err, most in check(op, "cpu", shape, dtype):
                    assert err <= most, f"{op}, {dtype}, {label}"


@pytest.mark.parametrize("place, value, text", WRONG)
@pytest.mark.parametrize("op", OPS)
def test_a_route_that_does_not_exist_is_an_error(op, place, value, text):
    """Also where a plan is played, and nothing is written before."""
    run = function(op)
    args = case(op)
    wrong = spoiled(op, place, value)
    _replay.forget()
    with backend("cpu"):
        expected = twice(run, args)
        assert run.direct.plans() == 1
        with pytest.raises(ValueError, match=text):
            run(*wrong)
        with _replay.paused(), pytest.raises(ValueError, match=text):
            run(*wrong)
        assert same(outputs(run, args), expected)
        fill = backends.find(op, args[0])
    untouched = [torch.full_like(out, 7) for out in expected]
    given = wrong[1:] if op.endswith("_") else wrong
    with pytest.raises(ValueError, match=text):
        fill(*untouched, *given)
    assert all((out == 7).all() for out in untouched)


def test_parts_are_columns_of_y():
    args = case("multi_add_")
    before = args[0].clone()
    args[-1][1] = 200
    with (
        backend("cpu"),
        pytest.raises(ValueError, match=r"multi: widths must be in \[0, 88\), got 200"),
    ):
        function("multi_add_")(*args)
    assert torch.equal(args[0], before)


@pytest.mark.parametrize("op", ["multi_fwd", "multi_add_"])
@pytest.mark.parametrize("m", [37, 70])
def test_what_is_not_live_may_be_anything(op, m):
    """A slot without a rank has no pages and no scale, and a page of its line may be free."""
    args = case(op, (m, *SHAPE[1:]))
    expected = call(op, "cpu", args)
    _, table, rank, scale = range(OPS[op], OPS[op] + 4)
    args[table] = args[table].clone()
    if op == "multi_fwd":  # in multi_add_ each slot has a rank in one of the parts
        args[table][2] = -9
    args[scale] = args[scale].masked_fill(args[rank] == 0, float("nan"))
    assert all(map(torch.equal, call(op, "cpu", args), expected))


@pytest.mark.parametrize(
    "op, label",
    [
        *((op, label) for op in OPS for label in ("runs", "mixed")),
        *(
            (op, label)
            for op in ("multi_fwd", "multi_bwd")
            for label in ("dropout", "gain")
        ),
    ],
)
def test_any_number_of_threads_gives_the_same_bits(op, label):
    args = case(op, (300, 260, 200, 20), label)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            runs.append(call(op, "cpu", args))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(map(torch.equal, other, runs[0]))


@pytest.mark.parametrize("form", ["dense", "given"])
def test_no_adapters_at_all(form):
    """S = 0: every row has the base alone."""
    args = case("multi_fwd", label="base")
    for i, shape in {5: (0, 1), 6: (0,), 7: (0,), 10: (0, 130)}.items():
        args[i] = args[i].new_empty(shape)
    if form == "given":
        args[1] = [torch.randn(37, 130)]
    args[12] = form
    wrong, most = check_case("multi_fwd", "cpu", args)
    assert wrong <= most
