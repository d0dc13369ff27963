"""Run as a process: compares what ops launch on the stand-in for a GPU with what replays launch.

Its argument is a JSON object: the shapes, the ops, and whether TMA's product is taken where it can
be.

It prints a line of JSON for each case: [label, number of plans, whether both launch the same,
number of launches and products].
"""

import ctypes
import json
import sys

from peftops.bench import standin

extension, driver = standin.enter()

import torch  # noqa: E402
from triton.compiler.compiler import CompiledKernel  # noqa: E402

from peftops import _replay  # noqa: E402
from peftops.testing.cases import CASES  # noqa: E402
from peftops.testing.law import every, function  # noqa: E402
from peftops.triton import _gemm  # noqa: E402

DEVICE = torch.device(standin.NAME)
BYTES = {
    "i1": 1,
    "i8": 1,
    "u8": 1,
    "i16": 2,
    "i32": 4,
    "u32": 4,
    "fp32": 4,
    "i64": 8,
    "u64": 8,
}
driver.standin_launches.restype = ctypes.c_ulong
POINTERS = {}  # function -> which of its parameters are pointers


def parameter_types(signature):
    """The types of a kernel's parameters as Triton names them; those of pointers begin with *."""
    types = []
    for entry in signature.values():
        if isinstance(entry, tuple):
            types += entry
        else:
            types.append(entry)
    types = [name for name in types if name != "constexpr"]
    return [*types, "*", "*"]  # Triton's two scratch buffers


def load_and_tell(self, load=CompiledKernel._init_handles):
    """Loads a kernel, and tells the driver the sizes of its parameters."""
    is_new = self.module is None
    load(self)
    if is_new:
        types = parameter_types(self.src.signature)
        pointers = [name[0] == "*" for name in types]
        sizes = bytes(8 if name[0] == "*" else BYTES[name] for name in types)
        driver.standin_tell(ctypes.c_void_p(self.function), len(sizes), sizes)
        POINTERS[self.function] = pointers


CompiledKernel._init_handles = load_and_tell


def on_standin(arg):
    """An argument with its tensors on the stand-in, without values."""
    if isinstance(arg, list):
        return [on_standin(item) for item in arg]
    if torch.is_tensor(arg):
        return torch.empty(arg.shape, dtype=arg.dtype, device=DEVICE)
    return arg


class Addresses:
    """Names addresses by the tensor that they are in, so that two calls can be compared."""

    def __init__(self, tensors):
        self.names = {
            tensor.data_ptr(): f"tensor {i}" for i, tensor in enumerate(tensors)
        }
        self.sizes = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
        self.others = {0: "none"}

    def name(self, address):
        for start, name in self.names.items():
            if 0 <= address - start < self.sizes[start]:
                return f"{name} + {address - start}"
        return self.others.setdefault(address, f"other {len(self.others)}")


def events_of(call, args):
    """What a call launches and multiplies, in order, with names in the place of addresses."""
    extension.hold(True)
    driver.standin_note(1)
    before = driver.standin_launches()
    outputs = call(*args)
    words = ctypes.POINTER(ctypes.c_uint64)()
    words = words[: driver.standin_noted(ctypes.byref(words))]
    tensors = [
        tensor for tensor in _replay.tensors([*args, *every(outputs)]) if tensor.numel()
    ]
    addresses = Addresses(tensors)
    products = extension.noted()
    events = []
    launches = 0
    at = 0
    while at < len(words):
        while products and products[0][0] - before == launches:
            events.append(product_event(products.pop(0), addresses))
        function, *shape, count = words[at : at + 7]
        values = words[at + 7 : at + 7 + count]
        arguments = [
            addresses.name(value) if is_pointer else value
            for value, is_pointer in zip(values, POINTERS[function], strict=True)
        ]
        events.append(("launch", function, shape, arguments))
        launches += 1
        at += 7 + count
    events += [product_event(product, addresses) for product in products]
    driver.standin_note(0)
    extension.hold(False)
    return events


def product_event(note, addresses):
    """A product that torch computed; every fourth value of its note is an address."""
    values = [
        addresses.name(value) if i % 4 == 0 else value
        for i, value in enumerate(note[1:])
    ]
    return "product", values


def compare(call, label, args):
    """Prints whether a call launches the same unreplayed, recorded and replayed."""
    args = on_standin(args)
    with _replay.paused():
        expected = events_of(call, args)
    _replay.forget()
    events_of(call, args)
    recorded = events_of(call, args)
    plans = call.direct.plans()
    with torch.no_grad():
        replays = [events_of(call, on_standin(args)) for _ in range(2)]
    same = expected == recorded and all(replayed == expected for replayed in replays)
    print(json.dumps([label, plans, same, len(expected)]), flush=True)
    if not same:
        print(expected, recorded, replays[0], sep="\n", file=sys.stderr)


def main(shapes, ops=CASES, tma=False):
    if tma:
        _gemm.TMA["sm_90"] = -1.0  # as if it had been measured to be the fastest
    for op in ops:
        call = function(op)
        for shape in shapes:
            for label, args in CASES[op](tuple(shape), torch.bfloat16):
                compare(call, f"{op} {shape} {label}", args)


main(**json.loads(sys.argv[1]))
