"""Replays of ops: a plan gives what the launcher gives, for like arguments only."""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from replays import copied, lora_args, outputs, same

import peftops.functional as F
from peftops import _replay, backend, backends
from peftops._op import CONTRACTS
from peftops._replay import paused
from peftops.testing.cases import CASES, SHAPES
from peftops.testing.law import function as op

_C = pytest.importorskip("peftops._C")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNPLANNED = {"dora_norm_bwd"}  # on a CPU, where it reads the scale


@pytest.fixture(autouse=True)
def forget():
    _replay.forget()
    yield
    _replay.forget()


def other(args):
    """Arguments that are alike, with other values in other memory."""
    if not isinstance(args, list):
        return args.flip(0).contiguous() if torch.is_tensor(args) and args.dim() else args
    return [other(arg) for arg in args]


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


def test_forget_drops_what_was_planned():
    call, args = op("lora_fwd"), lora_args()
    outputs(call, args), outputs(call, args)
    assert call.direct.plans() == 1
    _replay.forget()
    assert call.direct.plans() == 0
    outputs(call, args), outputs(call, args)
    assert call.direct.plans() == 1


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
