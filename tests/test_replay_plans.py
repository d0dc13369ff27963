"""How a replay finds its plan, and how a plan is made of the notes of a call."""

import pytest
import torch

from peftops import _replay
from peftops._replay import Notes, Numbered, Unplanned, noted

_C = pytest.importorskip("peftops._C")


@pytest.fixture(autouse=True)
def forget():
    _replay.forget()
    yield
    _replay.forget()


def test_a_kind_is_planned_when_it_comes_again_and_at_most_once():
    asked, plan = [], _C.Plan([], False, [], None, [], None, None)

    def first(wanted, x):
        asked.append(wanted)
        if len(x) == 3 and asked == [False, True]:
            raise MemoryError
        return (), plan if len(x) == 2 else None

    replay = _C.Replay(first, {}, lambda: None, 8)
    for _ in range(4):
        replay(torch.empty(2))
    assert asked == [False, True] and replay.plans() == 1  # then it is played
    del asked[:]
    replay(torch.empty(3))
    with pytest.raises(MemoryError):
        replay(torch.empty(3))
    for _ in range(3):
        replay(torch.empty(3))
    assert asked == [False, True, True, False, False]  # of which is known now that it has none


def test_what_tells_kinds_apart():
    asked, plan = [], _C.Plan([], False, [], None, [], None, None)
    replay = _C.Replay(
        lambda wanted, *args: (asked.append(wanted), ((), plan))[1], {}, lambda: None, 99
    )
    x = torch.empty(4, 4, dtype=torch.bfloat16)
    kinds = [
        (x,),
        (x.half(),),
        (x.short(),),
        (x.float(),),
        (x.view(16),),
        (x, 1),
        (x, 1.0),
        (x, True),
        (x, None),
    ]
    kinds += [
        (x, [x.clone()]),
        (x, [x.clone(), 1]),
        (x, x.clone()),
        (x, "nf4"),
        (x, 0.5),
        (x, torch.float32),
    ]
    for args in kinds:
        del asked[:]
        for _ in range(3):
            replay(*args)
        assert asked == [False, True], args  # met, planned, played
    for odd in (
        torch.empty(17)[1:],
        torch.empty(4, 4).T,
        torch._neg_view(torch.empty(4)),
        x.to("meta"),
        object(),
    ):
        del asked[:]
        for _ in range(3):
            replay(odd)
        assert asked == [False] * 3, odd  # for which the launcher runs every time


def test_plans_do_not_grow_for_ever():
    plan = _C.Plan([], False, [], None, [], None, None)
    replay = _C.Replay(lambda wanted, x: ((), plan if wanted else None), {}, lambda: None, 3)
    for m in range(20):
        replay(torch.empty(m)), replay(torch.empty(m))
        assert 1 <= replay.plans() <= 3


def test_an_error_of_a_step_is_the_errors_of_the_call():
    def fail(x):
        raise MemoryError("all is full")

    plan = _C.Plan([], False, [], None, [("call", fail, [("slot", 0)], None)], None, None)
    replay = _C.Replay(lambda wanted, x: ((), plan), {}, lambda: None, 8)
    x = torch.ones(4)
    assert replay(x) == replay(x) == ()
    for _ in range(2):
        with pytest.raises(MemoryError, match="all is full"):
            replay(x)
    with pytest.raises(TypeError, match="in order"):
        replay(x=x)


def test_arguments_of_a_call_are_made_anew():
    """Slots, transposes, views of what the plan made, lists and constants, in a call with names."""
    seen = []

    def see(x, turned, *, view, items, number):
        seen.append((x, turned, view, items, number))
        view.fill_(7)

    operands = [("slot", 0), ("turned", 0), ("strided", 1, ((2, 2), (4, 1), 4))]
    operands += [("list", [("slot", 0), ("constant", None)]), ("constant", 5)]
    fresh = [(((3, 4), (4, 1)), {"dtype": torch.float32, "device": torch.device("cpu")})]
    plan = _C.Plan(
        fresh,
        True,
        [],
        None,
        [("call", see, operands, ("view", "items", "number"))],
        None,
        None,
    )
    replay = _C.Replay(lambda wanted, x: (None, plan), {}, lambda: None, 8)
    replay(torch.ones(2, 3)), replay(torch.ones(2, 3))
    x = torch.randn(2, 3)
    y = replay(x)
    ((got, turned, view, items, number),) = seen
    assert (
        got is x
        and torch.equal(turned, x.T)
        and items[0] is x
        and items[1] is None
        and number == 5
    )
    assert view.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    assert torch.equal(y[1:, :2], torch.full((2, 2), 7.0))


def test_a_plan_waits_while_somebody_watches():
    watching, ran = [True], []
    steps = [("call", lambda x: ran.append("plan"), [("slot", 0)], None)]
    plan = _C.Plan([], False, [], None, steps, lambda: bool(watching), None)

    def first(wanted, x):
        ran.append("launcher")
        return (), plan

    replay, x = _C.Replay(first, {}, lambda: None, 8), torch.ones(4)
    replay(x), replay(x), replay(x)
    watching.clear()
    replay(x)
    assert ran == ["launcher", "launcher", "launcher", "plan"]


def notes_of(body, *inputs, out=None):
    notes = Notes(list(inputs), [] if out is None else [out])
    with notes:
        body()
    return notes


def test_what_torch_does_unnoted_makes_no_plan():
    x = torch.ones(4)
    for body in (
        lambda: x.add_(1),
        lambda: x.sum().item(),
        lambda: torch.mm(x[None], x[:, None]),
    ):
        assert (
            notes_of(lambda body=body: (noted(print, "a step"), body()), x).plan(True) is None
        )
    assert notes_of(lambda: noted(print, "a step"), x).plan(True) is not None
    assert notes_of(lambda: None, x).plan(True) is None  # nothing to play
    assert _replay.noting() is None


def test_memory_of_somebody_else_makes_no_plan():
    x, elsewhere = torch.ones(4), torch.ones(4)
    with pytest.raises(Unplanned, match="somebody else"):
        Numbered(notes_of(lambda: noted(print, elsewhere), x)).plan(True)
    with pytest.raises(Unplanned, match="view of an input"):
        Numbered(notes_of(lambda: noted(print, x[:2]), x)).plan(True)
    with pytest.raises(Unplanned, match="share memory"):
        Numbered(notes_of(lambda: noted(print, x), x, x[1:]))


def test_temporaries_of_calls_are_tensors_and_of_launches_a_scratch():
    x, y = torch.ones(8), torch.empty(8)
    kept = []

    def body():
        first, second, third = x.new_empty(100), x.new_empty(3), x.new_empty(2, 2)
        noted(kept.append, second)
        _replay.noting().launch(
            None, 1, (1, 1, 1), 32, 0, [("pointer", first), ("pointer", third)], None
        )

    written = Numbered(notes_of(body, x, out=y))
    assert [t.numel() for t in written.temporaries] == [3] and [
        t.numel() for t in written.scratch
    ] == [100, 4]
    _, *launch = written.launch(*written.notes.steps[1][1:])
    assert launch[-1] == [(0, 3, 0), (1, 4, 0)]  # after x, y and the tensor of the call
