"""Run as a process: what ops launch on the stand-in for a GPU, replayed and not, as a line of JSON for each case.

Its argument is a JSON object: the shapes, the ops, and whether TMA's product is taken where it can be.

A line: [label, whether there was a plan, whether both launch the same, how many launches and products].
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
BYTES = {"i1": 1, "i8": 1, "u8": 1, "i16": 2, "i32": 4, "u32": 4, "fp32": 4, "i64": 8, "u64": 8}
driver.standin_launches.restype = ctypes.c_ulong
POINTERS = {}  # function -> which of its parameters are pointers


def told(self, load=CompiledKernel._init_handles):
    """Has the driver know the parameters of what it loads."""
    fresh = self.module is None
    load(self)
    if fresh:
        kinds = []
        for kind in self.src.signature.values():
            kinds += [
                one
                for one in (kind if isinstance(kind, tuple) else (kind,))
                if one != "constexpr"
            ]
        kinds += ["*"] * 2
        sizes = bytes(8 if kind[0] == "*" else BYTES[kind] for kind in kinds)
        driver.standin_tell(ctypes.c_void_p(self.function), len(sizes), sizes)
        POINTERS[self.function] = [kind[0] == "*" for kind in kinds]


CompiledKernel._init_handles = told


def moved(arg):
    """The same on the stand-in, without values"""
    if isinstance(arg, list):
        return [moved(item) for item in arg]
    return (
        torch.empty(arg.shape, dtype=arg.dtype, device=DEVICE) if torch.is_tensor(arg) else arg
    )


def happened(call, args):
    """What a call launched and multiplied, with names in the place of addresses"""
    extension.hold(True)
    driver.standin_note(1)
    before = driver.standin_launches()
    outputs = call(*args)
    words = ctypes.POINTER(ctypes.c_uint64)()
    words = words[: driver.standin_noted(ctypes.byref(words))]
    tensors = [t for t in _replay.tensors([*args, *every(outputs)]) if t.numel()]
    names = {t.data_ptr(): f"tensor {i}" for i, t in enumerate(tensors)}

    def name(address):
        near = [start for start in names if 0 <= address - start < sizes[start]]
        return (
            f"{names[near[0]]} + {address - near[0]}"
            if near
            else others.setdefault(address, f"other {len(others)}")
        )

    sizes = {t.data_ptr(): t.nbytes for t in tensors}
    others, events, at = {0: "none"}, [], 0
    products = extension.noted()
    while at < len(words):
        while products and products[0][0] - before == len(
            [e for e in events if e[0] == "launch"]
        ):
            events.append(multiplied(products.pop(0), name))
        function, *shape, count = words[at : at + 7]
        values = words[at + 7 : at + 7 + count]
        held = [
            name(v) if pointer else v
            for v, pointer in zip(values, POINTERS[function], strict=True)
        ]
        events.append(("launch", function, shape, held))
        at += 7 + count
    events += [multiplied(product, name) for product in products]
    driver.standin_note(0)
    extension.hold(False)
    return events


def multiplied(note, name):
    return "product", [name(value) if i % 4 == 0 else value for i, value in enumerate(note[1:])]


def main(shapes, ops=CASES, tma=False):
    if tma:
        _gemm.TMA["sm_90"] = -1.0  # as if it had been measured to be the fastest
    for op in ops:
        call = function(op)
        for shape in shapes:
            for label, args in CASES[op](tuple(shape), torch.bfloat16):
                args = moved(args)
                with _replay.paused():
                    expected = happened(call, args)
                _replay.forget()
                recorded = [happened(call, args) for _ in range(2)][1]
                planned = call.direct.plans()
                with torch.no_grad():
                    replayed = [happened(call, moved(args)) for _ in range(2)]
                ran = expected == recorded and all(one == expected for one in replayed)
                print(
                    json.dumps([f"{op} {shape} {label}", planned, ran, len(expected)]),
                    flush=True,
                )
                if not ran:
                    print(expected, recorded, replayed[0], sep="\n", file=sys.stderr)


main(**json.loads(sys.argv[1]))
