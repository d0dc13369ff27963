"""Replays: what a launcher did once for some arguments, one C++ call does again (csrc/replay/).

A launcher is a backend's function for an op. When arguments like earlier ones come a second time,
its launches, calls and temporaries are recorded and become a plan. Later calls with such arguments
play the plan. The launcher of a backend that is replayed may do three things: make and view tensors
with torch, launch kernels through triton/_launch.py, and call functions through `noted`. Any other
operation of torch is seen, and then there is no plan. Work that torch does not see is not allowed.
A launcher's decisions may depend only on shapes, dtypes, numbers and the device. Whoever changes
something else that they depend on, such as a table of tiles, calls `forget`.
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
except ImportError:  # without the compiled extension nothing is replayed
    Replay = None

    def forget():
        """There are no plans to drop."""

    def pause(more):
        """There are no replays to pause."""


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
    aten.alias,
    aten.detach,
}
ALIGNED = 256  # bytes; each tensor in the scratch starts at a multiple of this
UNWANTED = "_peftops_unwanted"  # the attribute of an output that nobody reads
_thread = threading.local()


class Unplanned(Exception):
    """What a plan cannot hold."""


class Stream(int):
    """The handle of a CUDA stream. A replay takes the stream that is current at its own time."""


@contextmanager
def paused():
    """Inside the block nothing is replayed: launchers run in every call, in every thread."""
    pause(1)
    try:
        yield
    finally:
        pause(-1)


def noting():
    """The Notes that record this thread's launches, or None."""
    return getattr(_thread, "notes", None)


def noted(function, *args, **named):
    """Calls function(*args, **named) and records the call; its result must not be used.

    The function takes tensors as kernels do: it reads inputs and fills outputs.
    """
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
    """Inside the block, records what this thread's launcher does."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.inputs = inputs
        self.outputs = outputs
        self.temporaries = []
        self.steps = []
        self.known_call = False  # inside `noted`, whose operations are not looked at
        self.why_not = ""  # why there can be no plan
        self.unless = None  # a plan waits while this function returns True

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
        """Records a kernel's launch.

        unless: a function that says whether somebody has to see launches. launched: the function,
        grid, threads, shared memory, arguments as (type, value), and the owner of the function,
        which the plan keeps alive.
        """
        self.unless = unless
        self.steps.append(("launch", *launched))

    def plan(self, single):
        """The Plan of these notes, or None. single: the op has one output, not a tuple."""
        if self.why_not or not self.steps:
            return None
        try:
            return Numbered(self).plan(single)
        except Unplanned:
            return None


class Numbered:
    """Notes in which every tensor has a number.

    In order: inputs, outputs, temporaries that calls take, and temporaries that only launches take.
    The last ones lie together in one allocation, the scratch.
    """

    def __init__(self, notes):
        self.notes = notes
        addresses = []
        for name, *step in notes.steps:
            if name == "call":
                _, args, named = step
                addresses += [t.data_ptr() for t in tensors((*args, *named.values()))]
        self.temporaries = []
        self.scratch = []
        for t in notes.temporaries:
            if not t.numel():
                continue
            if any(start(t) <= address < end(t) for address in addresses):
                self.temporaries.append(t)
            else:
                self.scratch.append(t)
        self.numbered = [
            *notes.inputs,
            *notes.outputs,
            *self.temporaries,
            *self.scratch,
        ]
        ranges = sorted((start(t), end(t)) for t in self.numbered if t.numel())
        if any(first[1] > second[0] for first, second in itertools.pairwise(ranges)):
            raise Unplanned("two of the tensors share memory")

    def plan(self, single):
        notes = self.notes
        steps = []
        owners = []  # of kernels, whose code is unloaded without them
        for name, *step in notes.steps:
            if name == "call":
                steps.append(self.call(*step))
            else:
                steps.append(self.launch(*step))
                owners.append(step[-1])
        outputs = [recipe(t) for t in notes.outputs]
        temporaries = [recipe(t) for t in self.temporaries]
        scratch = self.scratch_recipe()
        return Plan(outputs, single, temporaries, scratch, steps, notes.unless, owners)

    def scratch_recipe(self):
        """How a replay makes the scratch, and the offset of each tensor in it in bytes; or None."""
        if not self.scratch:
            return None
        offsets = []
        size = 0
        for t in self.scratch:
            offsets.append(size)
            size += -(-t.nbytes // ALIGNED) * ALIGNED
        options = {"dtype": torch.uint8, "device": self.scratch[0].device}
        return (((size,), (1,)), options), offsets

    def call(self, function, args, named):
        operands = [self.operand(arg) for arg in (*args, *named.values())]
        return "call", function, operands, tuple(named) or None

    def launch(self, function, grid, threads, shared, arguments, owner):
        values = []
        pointers = []
        for argument_type, value in arguments:
            if argument_type == "pointer":
                if value is not None and value.numel():
                    pointers.append((len(values), *self.place(value)))
                values.append(0)
            elif argument_type == "float":
                values.append(struct.unpack("<I", struct.pack("<f", value))[0])
            else:
                values.append(value & 0xFFFFFFFFFFFFFFFF)
        return "launch", function, grid, threads, shared, values, pointers

    def operand(self, arg):
        """How a replay makes an argument of a call."""
        if isinstance(arg, list):
            return "list", [self.operand(item) for item in arg]
        if isinstance(arg, Stream):
            return ("stream",)
        if not isinstance(arg, Tensor):
            return "constant", arg
        if not arg.numel():
            return "constant", torch.empty(
                arg.shape, dtype=arg.dtype, device=arg.device
            )
        slot, offset = self.place(arg)
        holder = self.numbered[slot]
        if offset == 0 and alike(arg, holder):
            return "slot", slot
        if offset == 0 and holder.dim() == 2 and alike(arg, holder.T):
            return "turned", slot
        if slot < len(self.notes.inputs) or arg.dtype is not holder.dtype:
            # the next input may start elsewhere in its storage
            raise Unplanned("a view of an input")
        return "strided", slot, (tuple(arg.shape), arg.stride(), arg.storage_offset())

    def place(self, t):
        """The number of the tensor that holds t's memory, and t's offset in it in bytes."""
        for number, holder in enumerate(self.numbered):
            if start(holder) <= t.data_ptr() < end(holder):
                return number, t.data_ptr() - start(holder)
        raise Unplanned("memory of somebody else")


def alike(t, other):
    return (
        t.dtype is other.dtype
        and t.shape == other.shape
        and t.stride() == other.stride()
    )


def start(t):
    return t.data_ptr()


def end(t):
    return t.data_ptr() + t.nbytes


def tensors(values):
    """The tensors among values and in lists among them, in order."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list):
            yield from tensors(value)


def recipe(t):
    """How a replay makes a tensor like t; if t is unwanted, one tensor for all replays."""
    if not hasattr(t, UNWANTED):
        return (tuple(t.shape), t.stride()), {"dtype": t.dtype, "device": t.device}
    # training could not save a tensor of inference mode for backward
    with torch.inference_mode(False):
        return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def unwanted(x, *shape, dtype=None):
    """A tensor without elements for an output that nobody reads; all replays share one."""
    t = x.new_empty(shape, dtype=dtype)
    setattr(t, UNWANTED, True)
    return t


def run_and_plan(body, single, args, outputs):
    """Runs body(), a launcher's work on args and outputs, and returns its Plan or None."""
    notes = Notes(list(tensors(args)), list(outputs))
    with notes:
        body()
    return notes.plan(single)
