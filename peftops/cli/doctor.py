"""peftops doctor: what runs here, on which kernels, and whether it computes right. Made to be pasted into an issue."""

import os
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import islice

from . import Parser, device_name

SHAPE = (37, 96, 130, 5)  # odd on purpose: every edge of a tile is met


def main(argv=None):
    Parser("peftops doctor", description=__doc__).parse_args(argv)
    print(
        ", ".join(
            f"{name} {installed(name)}"
            for name in ("peftops", "torch", "triton", "peft", "transformers")
        )
    )
    print(
        f"python {platform.python_version()}, {platform.system()} {platform.release()}, {platform.machine()}"
    )
    if find_spec("torch") is None:
        print("torch is not installed: pip install torch")
        return 1
    import torch

    problems = []
    extension = find_extension(problems)
    devices = [
        torch.device("cpu"),
        *(torch.device("cuda", i) for i in range(torch.cuda.device_count())),
    ]
    print(describe_cpu())
    print("\n".join(describe_cuda(extension, devices[1:], problems)))
    if extension or find_spec("peftops._C") is None:
        for line in self_test(devices, problems):
            print(line, flush=True)
    print("\n".join(problems or ["all is well"]))
    return int(bool(problems))


def installed(name):
    from .. import __version__

    if name == "peftops":
        return __version__
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def find_extension(problems):
    """peftops._C, or None and in problems the sentence that mends it."""
    again = "pip install --force-reinstall --no-deps . in the source folder"
    try:
        return import_module("peftops._C")
    except ModuleNotFoundError:
        problems.append(
            "The compiled kernels are missing, so the CPU runs the slow reference: install a C++ compiler with OpenMP "
            f"and Python's headers (apt install g++ python3-dev), then {again}."
        )
    except ImportError as error:
        problems.append(f"The compiled kernels do not load ({error}): {again}.")
    return None


def describe_cpu():
    import torch

    return f"cpu: {device_name(torch.device('cpu'))}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def describe_cuda(extension, devices, problems):
    import torch

    ours = getattr(extension, "cuda", None)
    built = hasattr(ours, "driver")
    driver = dotted(ours.driver()) if built else "not asked"
    library = dotted(ours.runtime()) if built else "not built"
    yield f"cuda: torch's {torch.version.cuda or 'none'}, peftops' {library}, driver's {driver}"
    for device in devices:
        major, minor = torch.cuda.get_device_capability(device)
        yield f"{device}: {device_name(device)}, sm_{major}{minor}" + (
            ", too old for peftops" if major < 8 else ""
        )
        if built and (code := ours.runs(device.index)):
            problems.append(
                f"The CUDA kernels do not run on {device} (error {code}): in a checkout, PEFTOPS_CUDA=1 "
                f"PEFTOPS_CUDA_ARCHS={major}{minor} pip install --force-reinstall --no-deps ."
            )


def dotted(number):
    """13000 is 13.0"""
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def self_test(devices, problems):
    """A line for each op and device: the backend that serves it, and the worst of its errors in every dtype.

    On a GPU, where a kernel is compiled for a second or two when it is met first, in bf16 and in the first cases.
    """
    import torch

    import peftops.functional  # noqa: F401  registers the ops

    from .. import backends
    from .._op import CONTRACTS
    from ..testing.law import check

    for device in dict((device.type, device) for device in devices).values():
        for op in CONTRACTS:
            cell = backends.find(op, torch.empty(0, device=device))
            served = cell.__module__.split(".")[1]
            results = []
            compiles = device.type == "cuda"
            for dtype in (
                (torch.bfloat16,)
                if compiles
                else (torch.float32, torch.bfloat16, torch.float16)
            ):
                label, error, bound = worst(
                    islice(check(op, served, SHAPE, dtype, device), 2 if compiles else None)
                )
                results.append(f"{str(dtype).removeprefix('torch.')} {error:.1e} ≤ {bound:.1e}")
                if not error <= bound:
                    results[-1] = results[-1].replace("≤", ">")
                    problems.append(
                        f"{op} on {device.type} by {served} is wrong in {dtype} ({label}: error {error:.1e}, at most "
                        f"{bound:.1e}): please report this output."
                    )
            yield f"{op:10} on {device.type}: {served:10} error {', '.join(results)}"


def worst(results):
    return max(results, key=lambda result: (not result[1] <= result[2], result[1]))
