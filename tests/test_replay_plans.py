"""How a replay finds its plan, and how the notes of a call become a plan."""

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


def plan_of(*steps, watched=None):
    """A plan of these steps, which makes no memory and returns nothing."""
    return _C.Plan([], False, [], None, [*steps], watched, None)


def test_like_calls_are_planned_the_second_time_and_once():
    """`requests` notes for each run of the launcher whether a plan was asked for."""
    requests = []
    plan = plan_of()

    def launcher(wanted, x):
        requests.append(wanted)
        if len(x) == 3 and requests == [False, True]:
            raise MemoryError
        return (), plan if len(x) == 2 else None

    replay = _C.Replay(launcher, {}, lambda: None, 8)
    for _ in range(4):
        replay(torch.empty(2))
    assert requests == [False, True] and replay.plans() == 1  # then the plan is played
    del requests[:]
    replay(torch.empty(3))
    with pytest.raises(MemoryError):
        replay(torch.empty(3))
    for _ in range(3):
        replay(torch.empty(3))
    assert requests == [False, True, True, False, False]  # known now: there is no plan


def test_which_calls_are_unlike():
    requests = []
    plan = plan_of()

    def launcher(wanted, *args):
        requests.append(wanted)
        return (), plan

    replay = _C.Replay(launcher, {}, lambda: None, 99)
    x = torch.empty(4, 4, dtype=torch.bfloat16)
    calls = [
        (x,),
        (x.half(),),
        (x.short(),),
        (x.float(),),
        (x.view(16),),
        (x, 1),
        (x, 1.0),
        (x, True),
        (x, None),
        (x, [x.clone()]),
        (x, [x.clone(), 1]),
        (x, x.clone()),
        (x, "nf4"),
        (x, 0.5),
        (x, torch.float32),
    ]
    for args in calls:
        del requests[:]
        for _ in range(3):
            replay(*args)
        assert requests == [False, True], args  # the third call plays the plan
    for unplanned in (
        torch.empty(17)[1:],
        torch.empty(4, 4).T,
        torch._neg_view(torch.empty(4)),
        x.to("meta"),
        object(),
    ):
        del requests[:]
        for _ in range(3):
            replay(unplanned)
        assert requests == [False] * 3, unplanned  # the launcher runs every time


def test_plans_do_not_grow_for_ever():
    plan = plan_of()
    replay = _C.Replay(
        lambda wanted, x: ((), plan if wanted else None), {}, lambda: None, 3
    )
    for m in range(20):
        replay(torch.empty(m))
        replay(torch.empty(m))
        assert 1 <= replay.plans() <= 3


def test_an_error_of_a_step_is_raised_by_the_call():
    def fail(x):
        raise MemoryError("all is full")

    plan = plan_of(("call", fail, [("slot", 0)], None))
    replay = _C.Replay(lambda wanted, x: ((), plan), {}, lambda: None, 8)
    x = torch.ones(4)
    assert replay(x) == replay(x) == ()
    for _ in range(2):
        with pytest.raises(MemoryError, match="all is full"):
            replay(x)
    with pytest.raises(TypeError, match="in order"):
        replay(x=x)


def test_arguments_of_a_call_are_made_anew():
    """Slots, transposes, views of memory of the plan, lists and constants, some by keyword."""
    calls = []

    def note(x, turned, *, view, items, number):
        calls.append((x, turned, view, items, number))
        view.fill_(7)

    operands = [
        ("slot", 0),
        ("turned", 0),
        ("strided", 1, ((2, 2), (4, 1), 4)),
        ("list", [("slot", 0), ("constant", None)]),
        ("constant", 5),
    ]
    step = "call", note, operands, ("view", "items", "number")
    fresh = [
        (((3, 4), (4, 1)), {"dtype": torch.float32, "device": torch.device("cpu")})
    ]
    plan = _C.Plan(fresh, True, [], None, [step], None, None)
    replay = _C.Replay(lambda wanted, x: (None, plan), {}, lambda: None, 8)
    replay(torch.ones(2, 3))
    replay(torch.ones(2, 3))
    x = torch.randn(2, 3)
    y = replay(x)
    ((first, turned, view, items, number),) = calls
    assert first is x and torch.equal(turned, x.T)
    assert items[0] is x and items[1] is None
    assert number == 5
    assert view.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    assert torch.equal(y[1:, :2], torch.full((2, 2), 7.0))


def test_a_plan_waits_while_somebody_watches():
    watching = [True]
    ran = []
    step = "call", lambda x: ran.append("plan"), [("slot", 0)], None
    plan = plan_of(step, watched=lambda: bool(watching))

    def launcher(wanted, x):
        ran.append("launcher")
        return (), plan

    replay = _C.Replay(launcher, {}, lambda: None, 8)
    x = torch.ones(4)
    for _ in range(3):
        replay(x)
    watching.clear()
    replay(x)
    assert ran == ["launcher", "launcher", "launcher", "plan"]


def notes_of(body, *inputs, out=None):
    notes = Notes(list(inputs), [] if out is None else [out])
    with notes:
        body()
    return notes


def test_a_call_of_torch_that_is_not_noted_makes_no_plan():
    x = torch.ones(4)
    bodies = [
        lambda: x.add_(1),
        lambda: x.sum().item(),
        lambda: torch.mm(x[None], x[:, None]),
    ]
    for body in bodies:
        notes = notes_of(lambda body=body: (noted(print, "a step"), body()), x)
        assert notes.plan(True) is None
    assert notes_of(lambda: noted(print, "a step"), x).plan(True) is not None
    assert notes_of(lambda: None, x).plan(True) is None  # nothing to play
    assert _replay.noting() is None


def test_memory_of_somebody_else_makes_no_plan():
    x = torch.ones(4)
    elsewhere = torch.ones(4)
    with pytest.raises(Unplanned, match="somebody else"):
        Numbered(notes_of(lambda: noted(print, elsewhere), x)).plan(True)
    with pytest.raises(Unplanned, match="view of an input"):
        Numbered(notes_of(lambda: noted(print, x[:2]), x)).plan(True)
    with pytest.raises(Unplanned, match="share memory"):
        Numbered(notes_of(lambda: noted(print, x), x, x[1:]))


def test_calls_get_tensors_for_temporaries_and_launches_a_scratch():
    x = torch.ones(8)
    y = torch.empty(8)
    kept = []

    def body():
        first = x.new_empty(100)
        second = x.new_empty(3)
        third = x.new_empty(2, 2)
        noted(kept.append, second)
        pointers = [("pointer", first), ("pointer", third)]
        _replay.noting().launch(None, 1, (1, 1, 1), 32, 0, pointers, None)

    written = Numbered(notes_of(body, x, out=y))
    assert [tensor.numel() for tensor in written.temporaries] == [3]
    assert [tensor.numel() for tensor in written.scratch] == [100, 4]
    _, *launch = written.launch(*written.notes.steps[1][1:])
    assert launch[-1] == [(0, 3, 0), (1, 4, 0)]  # after x, y and the tensor of the call
