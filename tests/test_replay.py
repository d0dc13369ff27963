"""Replays: a plan does what the launcher did, for arguments that are alike and for no others."""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import peftops.functional as F
from peftops import _replay, backend, backends
from peftops._op import CONTRACTS
from peftops._replay import Notes, Numbered, Unplanned, noted, paused
from peftops.testing.cases import CASES, SHAPES
from peftops.testing.law import every
from peftops.testing.law import function as op

_C = pytest.importorskip("peftops._C")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNPLANNED = {"dora_norm_bwd"}  # on a CPU, where it reads the scale


@pytest.fixture(autouse=True)
def forget():
    _replay.forget()
    yield
    _replay.forget()


def copied(args):
    return [
        copied(arg) if isinstance(arg, list) else arg.clone() if torch.is_tensor(arg) else arg
        for arg in args
    ]


def other(args):
    """Arguments that are alike, with other values in other memory."""
    if not isinstance(args, list):
        return args.flip(0).contiguous() if torch.is_tensor(args) and args.dim() else args
    return [other(arg) for arg in args]


def outputs(call, args):
    return every(call(*args))


def same(outs, expected):
    return len(outs) == len(expected) and all(
        a.shape == b.shape
        and a.dtype is b.dtype
        and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(outs, expected, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CONTRACTS)
def test_a_replay_is_what_the_launcher_does(name, shape, dtype, monkeypatch):
    call = op(name)
    for label, args in CASES[name](shape, dtype):
        outputs(call, args)
        for again in (copied(args), other(args), other(other(args))):
            with paused():
                expected = outputs(call, again)
            assert same(outputs(call, again), expected), label


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_launcher_of_a_plan_does_not_run(name, ops):
    """`ops` is told when a backend is looked for, and pauses replays, which are resumed here."""
    _, args = next(CASES[name]((37, 96, 130, 5), torch.float32))
    call = op(name)
    _replay.pause(-1)
    try:
        outputs(call, args), outputs(call, copied(args))
        del ops[:]
        outputs(call, other(args))
    finally:
        _replay.pause(1)
    assert (ops == []) == (name not in UNPLANNED), ops


def lora_args(m=37, k=96, n=130, r=5, dtype=torch.float32):
    return next(CASES["lora_fwd"]((m, k, n, r), dtype))[1]


def unlike():
    """Changes of lora_fwd's arguments after which the plan of before must not be played, or serves as well."""

    def replaced(index, make):
        def change(args):
            args[index] = make(args[index])

        return change

    shifted = lambda t: torch.empty(t.numel() + 1)[1:].view(t.shape).copy_(t)  # noqa: E731
    yield "more rows", replaced(0, lambda x: torch.cat([x, x]))
    yield (
        "another dtype",
        lambda args: args.__setitem__(slice(0, 2), [args[0].half(), [args[1][0].half()]]),
    )
    yield "a bias", replaced(5, lambda _: torch.arange(130.0))
    yield "a gain", replaced(6, lambda _: torch.arange(130.0))
    yield "z is kept", replaced(12, lambda _: True)
    yield "memory that starts elsewhere", replaced(0, shifted)
    yield "columns", replaced(0, lambda x: x.T.contiguous().T)
    yield "a negated view", replaced(0, torch._neg_view)
    yield "a parameter", replaced(2, torch.nn.Parameter)
    yield "other values", replaced(0, lambda x: x * 2)
    yield "a scale of one element that is negated", replaced(4, torch._neg_view)


@pytest.mark.parametrize(
    "change", [pytest.param(change, id=label) for label, change in unlike()]
)
def test_what_is_not_alike_has_a_plan_of_its_own(change):
    call, args = op("lora_fwd"), lora_args()
    outputs(call, args), outputs(call, args)
    changed = lora_args()
    change(changed)
    with torch.no_grad():
        with paused():
            expected = outputs(call, changed)
        assert all(same(outputs(call, changed), expected) for _ in range(3))
        with paused():
            expected = outputs(call, args)
        assert same(outputs(call, args), expected)


def test_a_forced_backend_has_plans_of_its_own(ops):
    call, args = op("lora_fwd"), lora_args()
    _replay.pause(-1)
    try:
        for name in (None, "reference", "cpu", "reference", "cpu", None):
            del ops[:]
            if name:
                with backend(name):
                    assert backends.find("lora_fwd", args[0]).__module__.startswith(
                        f"peftops.{name}"
                    )
                    outputs(call, args)
            else:
                outputs(call, args)
        assert (
            call.direct.plans() == 2
        )  # of the CPU, asked for and by itself; the reference has none
    finally:
        _replay.pause(1)


def test_tensors_that_share_memory_make_no_plan():
    """A plan of y = x·xᵀ could not tell which of the two another call means."""
    call, (x, w), args = op("lora_fwd"), torch.randn(2, 16, 16), lora_args(16, 16, 16, 4)
    outputs(call, [x, [x], *args[2:]]), outputs(call, [x, [x], *args[2:]])
    with paused():
        expected = outputs(call, [x, [w], *args[2:]])
    assert same(outputs(call, [x, [w], *args[2:]]), expected)
    assert same(outputs(call, [x, [w], *args[2:]]), expected)


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


def test_forget_drops_what_was_planned():
    call, args = op("lora_fwd"), lora_args()
    outputs(call, args), outputs(call, args)
    assert call.direct.plans() == 1
    _replay.forget()
    assert call.direct.plans() == 0
    outputs(call, args), outputs(call, args)
    assert call.direct.plans() == 1


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


def test_threads_replay_side_by_side():
    shapes, failed = [(37, 96, 130, 5), (70, 64, 48, 16), (5, 133, 33, 20)], []
    cases = [lora_args(*shape) for shape in shapes]
    with paused():
        expected = [outputs(op("lora_fwd"), args) for args in cases]

    def work(seed):
        for i in range(300):
            at = (seed + i) % len(cases)
            if not same(outputs(op("lora_fwd"), cases[at]), expected[at]):
                failed.append((seed, i))
            if i % 7 == seed:
                _replay.forget()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert failed == [] and threading.active_count() >= 1


def test_a_plan_keeps_no_tensor_alive():
    for name in CONTRACTS:
        _, args = next(CASES[name]((37, 96, 130, 5), torch.float32))
        args = copied(args)
        outs = (outputs(op(name), args), outputs(op(name), args))[1]
        held = [
            weakref.ref(t)
            for t in [*_replay.tensors(args), *outs]
            if t.numel() and t.dim() == 2
        ]
        del args, outs
        assert [r() for r in held if r() is not None] == [], name


def test_outputs_of_two_replays_are_not_one():
    """But for those that nobody reads. Autograd hangs a graph on an output without elements too."""
    for shape in ((37, 96, 130, 5), (37, 96, 0, 5), (37, 96, 130, 0)):
        x, w = torch.randn(*shape[:2]), torch.randn(shape[2], shape[1])
        a, b = (
            torch.randn(shape[3], shape[1], requires_grad=True),
            torch.randn(shape[2], shape[3], requires_grad=True),
        )
        ys = [F.lora_linear(x, w, a, b, dropout_p=0.1) for _ in range(4)]
        grads = [torch.autograd.grad(y.sum(), [a, b]) for y in ys]
        every = [*ys, *(g for pair in grads for g in pair)]
        assert len({id(t) for t in every}) == len(every), shape


def test_what_inference_mode_began_training_continues():
    """All replays share what has no elements; training saves it for backward."""
    x, w, a, b = (
        torch.randn(70, 64),
        torch.randn(48, 64),
        torch.randn(4, 64),
        torch.randn(48, 4),
    )
    with torch.inference_mode():
        F.lora_linear(x, w, a, b), F.lora_linear(x, w, a, b), F.lora_linear(x, w, a, b)
    a.requires_grad_(), b.requires_grad_()
    for _ in range(2):
        F.lora_linear(x, w, a, b).sum().backward()
    assert torch.isfinite(a.grad).all()


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


@pytest.mark.parametrize("name", ["lora_gemv", "dora_norm", "nf4_quantize", "nf4_dequantize"])
def test_launchers_of_cuda_are_replayed(name, cuda_on_cpu, monkeypatch):
    """In CUDA C++, emulated on the CPU; a replay asks for the stream of its own time."""
    asked = []
    monkeypatch.setattr(
        torch._C,
        "_cuda_getCurrentRawStream",
        lambda device: asked.append(device) or 0,
        raising=False,
    )
    monkeypatch.setattr("peftops.cuda._device.stream", lambda device: _replay.Stream(0))
    call = op(name)
    with backend("cuda"):
        for label, args in CASES[name]((5, 64, 48, 4), torch.bfloat16):
            expected = outputs(call, args)
            _replay.pause(-1)
            try:
                for again in (copied(args), args, copied(args)):
                    assert same(outputs(call, again), expected), label
            finally:
                _replay.pause(1)
    assert asked and call.direct.plans() >= 3
