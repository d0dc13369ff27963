"""Replays: what an op's launcher did for one kind of arguments is done again by one call of C++ (csrc/replay/).

When a kind comes a second time, the launches, calls and temporaries of its launcher are noted and become a plan, which
is played from then on. A launcher of a backend that is replayed may do three things: make and view tensors by torch,
launch by triton/_launch.py, and call by `noted`. Whatever else it asks of torch is seen, and then there is no plan;
what torch does not see, it must not do. Its decisions may depend on shapes, dtypes, numbers and the device alone; who
changes something else that they depend on, such as a table of tiles, calls `forget`.
"""

import itertools
import struct
import threading
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

try:
    from ._C import Plan, Replay, forget, pause
except ImportError:  # nothing is compiled, and so nothing replayed
    Replay, forget, pause = None, lambda: None, lambda more: None


aten = torch.ops.aten
MAKES = {aten.new_empty, aten.empty, aten.empty_like, aten.empty_strided}
VIEWS = {
    aten.t,
    aten.view,
    aten.slice,
    aten.select,
    aten.transpose,
    aten.permute,
    aten.unsqueeze,
    aten.as_strided,
}
VIEWS |= {aten.alias, aten.detach}
ALIGNED = 256  # bytes between the parts of a scratch
UNWANTED = "_peftops_unwanted"
_thread = threading.local()


class Unplanned(Exception):
    """What a plan cannot hold"""


class Stream(int):
    """The handle of a stream, for which a replay takes the stream of its own time."""


@contextmanager
def paused():
    """Inside, launchers run in every call, in every thread."""
    pause(1)
    try:
        yield
    finally:
        pause(-1)


def noting():
    """What notes this thread's launches, or None."""
    return getattr(_thread, "notes", None)


def noted(function, *args, **named):
    """function(*args, **named), which takes tensors as kernels do and returns nothing that is used."""
    notes = noting()
    if notes is None:
        return function(*args, **named)
    notes.steps.append(("call", function, args, named))
    notes.known_call = True
    try:
        return function(*args, **named)
    finally:
        notes.known_call = False


class Notes(TorchDispatchMode):
    """Inside, everything that this thread's launchers do."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.inputs, self.outputs, self.temporaries, self.steps = inputs, outputs, [], []
        self.known_call, self.why_not, self.unless = False, "", None

    def __enter__(self):
        _thread.notes = self
        return super().__enter__()

    def __exit__(self, *error):
        _thread.notes = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in MAKES:
            self.temporaries.append(result)
        elif not self.known_call and function.overloadpacket not in VIEWS:
            self.why_not = str(function)
        return result

    def launch(self, unless, *launched):
        """launched: function, grid, threads, shared memory, arguments as (kind, value); what it runs on stays alive"""
        self.unless = unless
        self.steps.append(("launch", *launched))

    def plan(self, single):
        """The Plan of these notes, or None."""
        if self.why_not or not self.steps:
            return None
        try:
            return Numbered(self).plan(single)
        except Unplanned:
            return None


class Numbered:
    """Notes with a number for every tensor: the inputs', the outputs', temporaries that calls take, and at last parts
    of one scratch, for what launches alone take."""

    def __init__(self, notes):
        self.notes = notes
        called = [
            t
            for step in notes.steps
            if step[0] == "call"
            for t in tensors((*step[2], *step[3].values()))
        ]
        addresses = [t.data_ptr() for t in called]
        self.temporaries, self.parts = [], []
        for t in notes.temporaries:
            if t.numel():
                inside = any(start(t) <= address < end(t) for address in addresses)
                (self.temporaries if inside else self.parts).append(t)
        self.numbered = [*notes.inputs, *notes.outputs, *self.temporaries, *self.parts]
        ranges = sorted((start(t), end(t)) for t in self.numbered if t.numel())
        if any(first[1] > second[0] for first, second in itertools.pairwise(ranges)):
            raise Unplanned("two of the tensors share memory")

    def plan(self, single):
        notes, offsets, size = self.notes, [], 0
        for part in self.parts:
            offsets.append(size)
            size += -(-part.nbytes // ALIGNED) * ALIGNED
        scratch = None
        if self.parts:
            scratch = (
                (((size,), (1,)), {"dtype": torch.uint8, "device": self.parts[0].device}),
                offsets,
            )
        steps = [
            self.call(*step[1:]) if step[0] == "call" else self.launch(*step[1:])
            for step in notes.steps
        ]
        fresh = [[made(t) for t in group] for group in (notes.outputs, self.temporaries)]
        kernels = [
            step[-1] for step in notes.steps if step[0] == "launch"
        ]  # without which their code is unloaded
        return Plan(fresh[0], single, fresh[1], scratch, steps, notes.unless, kernels)

    def call(self, function, args, named):
        operands = [self.operand(arg) for arg in (*args, *named.values())]
        return "call", function, operands, tuple(named) or None

    def launch(self, function, grid, threads, shared, arguments, kept):
        values, pointers = [], []
        for kind, value in arguments:
            if kind == "pointer":
                if value is not None and value.numel():
                    pointers.append((len(values), *self.place(value)))
                values.append(0)
            elif kind == "float":
                values.append(struct.unpack("<I", struct.pack("<f", value))[0])
            else:
                values.append(value & 0xFFFFFFFFFFFFFFFF)
        return "launch", function, grid, threads, shared, values, pointers

    def operand(self, arg):
        if isinstance(arg, list):
            return "list", [self.operand(item) for item in arg]
        if isinstance(arg, Stream):
            return ("stream",)
        if not isinstance(arg, Tensor):
            return "constant", arg
        if not arg.numel():
            return "constant", torch.empty(arg.shape, dtype=arg.dtype, device=arg.device)
        slot, offset = self.place(arg)
        whole = self.numbered[slot]
        if offset == 0 and alike(arg, whole):
            return "slot", slot
        if offset == 0 and whole.dim() == 2 and alike(arg, whole.T):
            return "turned", slot
        if slot < len(self.notes.inputs) or arg.dtype is not whole.dtype:
            raise Unplanned(
                "a view of an input"
            )  # which may begin elsewhere in its memory next time
        return "strided", slot, (tuple(arg.shape), arg.stride(), arg.storage_offset())

    def place(self, t):
        """The number of what holds this tensor's memory, and at which byte of it."""
        for number, whole in enumerate(self.numbered):
            if start(whole) <= t.data_ptr() < end(whole):
                return number, t.data_ptr() - start(whole)
        raise Unplanned("memory of somebody else")


def alike(t, other):
    return t.dtype is other.dtype and t.shape == other.shape and t.stride() == other.stride()


def start(t):
    return t.data_ptr()


def end(t):
    return t.data_ptr() + t.nbytes


def tensors(values):
    """Those among values and in their lists, in order."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list):
            yield from tensors(value)


def made(t):
    """How a replay makes an output or a temporary like t; or one for all replays, where it is unwanted."""
    if not hasattr(t, UNWANTED):
        return (tuple(t.shape), t.stride()), {"dtype": t.dtype, "device": t.device}
    with torch.inference_mode(False):  # else training could not save it for backward
        return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def unwanted(x, *shape, dtype=None):
    """A tensor without elements in the place of an output that nobody reads, so that one serves all replays."""
    t = x.new_empty(shape, dtype=dtype)
    setattr(t, UNWANTED, True)
    return t


def replayed(body, single, args, outputs):
    """Runs body(), a launcher's work on args and outputs; the Plan of it, or None."""
    notes = Notes(list(tensors(args)), [outputs] if single else list(outputs))
    with notes:
        body()
    return notes.plan(single)
