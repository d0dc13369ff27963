"""Replays of ops: a plan gives what the launcher gives, for like arguments only."""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from replays import copied, lora_args, same, twice

import peftops.functional as F
from peftops import _replay, backend, backends
from peftops._op import CONTRACTS
from peftops._replay import paused
from peftops.testing.cases import CASES, SHAPES
from peftops.testing.law import function as op
from peftops.testing.law import outputs

pytest.importorskip("peftops._C")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNPLANNED = {"dora_norm_bwd"}  # it reads the scale on a CPU


@pytest.fixture(autouse=True)
def forget():
    _replay.forget()
    yield
    _replay.forget()


def other(args):
    """The like arguments with other values in other memory."""
    if not isinstance(args, list):
        return (
            args.flip(0).contiguous() if torch.is_tensor(args) and args.dim() else args
        )
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
    """`ops` notes each launcher's op, and pauses replays; pause(-1) resumes them here."""
    _, args = next(CASES[name]((37, 96, 130, 5), torch.float32))
    call = op(name)
    _replay.pause(-1)
    try:
        outputs(call, args)
        outputs(call, copied(args))
        del ops[:]
        outputs(call, other(args))
    finally:
        _replay.pause(1)
    assert (ops == []) == (name not in UNPLANNED), ops


def changes():
    """Changes of lora_fwd's arguments. Some need another plan; the plan fits the others as well."""

    def replaced(index, make):
        def change(args):
            args[index] = make(args[index])

        return change

    def shifted(tensor):
        return torch.empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)

    def halved(args):
        args[0] = args[0].half()
        args[1] = [args[1][0].half()]

    yield "more rows", replaced(0, lambda x: torch.cat([x, x]))
    yield "another dtype", halved
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
    "change", [pytest.param(change, id=label) for label, change in changes()]
)
def test_unlike_arguments_have_a_plan_of_their_own(change):
    call = op("lora_fwd")
    args = lora_args()
    twice(call, args)
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
    call = op("lora_fwd")
    args = lora_args()
    _replay.pause(-1)
    try:
        for name in (None, "reference", "cpu", "reference", "cpu", None):
            del ops[:]
            if name:
                with backend(name):
                    launcher = backends.find("lora_fwd", args[0])
                    assert launcher.__module__.startswith(f"peftops.{name}")
                    outputs(call, args)
            else:
                outputs(call, args)
        # one for the CPU as the default, one for it forced; the reference has none
        assert call.direct.plans() == 2
    finally:
        _replay.pause(1)


def test_tensors_that_share_memory_make_no_plan():
    """A plan of y = x·xᵀ could not tell which of the two another call means."""
    call = op("lora_fwd")
    x, w = torch.randn(2, 16, 16)
    args = lora_args(16, 16, 16, 4)
    twice(call, [x, [x], *args[2:]])
    with paused():
        expected = outputs(call, [x, [w], *args[2:]])
    assert same(outputs(call, [x, [w], *args[2:]]), expected)
    assert same(outputs(call, [x, [w], *args[2:]]), expected)


def test_forget_drops_plans():
    call = op("lora_fwd")
    args = lora_args()
    twice(call, args)
    assert call.direct.plans() == 1
    _replay.forget()
    assert call.direct.plans() == 0
    twice(call, args)
    assert call.direct.plans() == 1


def test_threads_replay_side_by_side():
    shapes = [(37, 96, 130, 5), (70, 64, 48, 16), (5, 133, 33, 20)]
    failed = []
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
        outs = twice(op(name), args)
        tensors = [*_replay.tensors(args), *outs]
        references = [
            weakref.ref(tensor)
            for tensor in tensors
            if tensor.numel() and tensor.dim() == 2
        ]
        del args, outs, tensors
        assert [r() for r in references if r() is not None] == [], name


def test_outputs_of_two_replays_are_not_one():
    """Also outputs without elements differ, as autograd hangs a graph on each."""
    for m, k, n, r in ((37, 96, 130, 5), (37, 96, 0, 5), (37, 96, 130, 0)):
        x = torch.randn(m, k)
        w = torch.randn(n, k)
        a = torch.randn(r, k, requires_grad=True)
        b = torch.randn(n, r, requires_grad=True)
        outputs = [F.lora_linear(x, w, a, b, dropout_p=0.1) for _ in range(4)]
        grads = [torch.autograd.grad(y.sum(), [a, b]) for y in outputs]
        tensors = [*outputs, *(gradient for pair in grads for gradient in pair)]
        assert len({id(tensor) for tensor in tensors}) == len(tensors), (m, k, n, r)


def test_training_replays_plans_made_in_inference_mode():
    """All replays share tensors without elements, and training saves them for backward."""
    x = torch.randn(70, 64)
    w = torch.randn(48, 64)
    a = torch.randn(4, 64)
    b = torch.randn(48, 4)
    with torch.inference_mode():
        for _ in range(3):
            F.lora_linear(x, w, a, b)
    a.requires_grad_()
    b.requires_grad_()
    for _ in range(2):
        F.lora_linear(x, w, a, b).sum().backward()
    assert torch.isfinite(a.grad).all()


@pytest.mark.parametrize(
    "name", ["lora_gemv", "multi_gemv", "dora_norm", "nf4_quantize", "nf4_dequantize"]
)
def test_launchers_of_cuda_are_replayed(name, cuda_on_cpu, monkeypatch):
    """Emulates CUDA C++ on the CPU. Each replay asks for the stream that is current then."""
    devices = []

    def current_stream(device):
        devices.append(device)
        return 0

    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", current_stream, raising=False
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
    assert devices and call.direct.plans() >= 3
