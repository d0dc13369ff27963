"""peftops doctor: which kernels run here, and whether they compute right.

The output is made to be pasted into an issue.
"""

import os
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import islice

from . import Parser, device_name

SHAPE = (37, 96, 130, 5)  # odd sizes, so that every edge of a tile is met
CASES_ON_GPU = (
    2  # a kernel takes a second or two to compile, so a GPU runs the first cases alone
)
PACKAGES = "peftops", "torch", "triton", "peft", "transformers"


def main(argv=None):
    Parser("peftops doctor", description=__doc__).parse_args(argv)
    print(", ".join(f"{name} {installed(name)}" for name in PACKAGES))
    system = f"{platform.system()} {platform.release()}"
    print(f"python {platform.python_version()}, {system}, {platform.machine()}")
    if find_spec("torch") is None:
        print("torch is not installed: pip install torch")
        return 1
    import torch

    problems = []
    extension = find_extension(problems)
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    print(describe_cpu())
    print("\n".join(describe_cuda(extension, gpus, problems)))
    if extension or find_spec("peftops._C") is None:
        for line in self_test([torch.device("cpu"), *gpus], problems):
            print(line, flush=True)
    print("\n".join(problems or ["all is well"]))
    return int(bool(problems))


def installed(name: str) -> str:
    """The version of a package, or "absent"."""
    from .. import __version__

    if name == "peftops":
        return __version__
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def find_extension(problems):
    """peftops._C, or None. Then a sentence on how to mend that is added to problems."""
    again = "pip install --force-reinstall --no-deps . in the source folder"
    try:
        return import_module("peftops._C")
    except ModuleNotFoundError:
        problems.append(
            "The compiled kernels are missing, so the CPU runs the slow reference: install a C++"
            " compiler with OpenMP and Python's headers (apt install g++ python3-dev),"
            f" then {again}."
        )
    except ImportError as error:
        problems.append(f"The compiled kernels do not load ({error}): {again}.")
    return None


def describe_cpu():
    import torch

    name = device_name(torch.device("cpu"))
    return f"cpu: {name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def describe_cuda(extension, devices, problems):
    """A line for CUDA and one for each GPU. Kernels that do not run are added to problems."""
    import torch

    ours = getattr(extension, "cuda", None)
    built = hasattr(ours, "driver")
    driver = dotted(ours.driver()) if built else "not asked"
    library = dotted(ours.runtime()) if built else "not built"
    yield f"cuda: torch's {torch.version.cuda or 'none'}, peftops' {library}, driver's {driver}"
    for device in devices:
        major, minor = torch.cuda.get_device_capability(device)
        line = f"{device}: {device_name(device)}, sm_{major}{minor}"
        yield f"{line}, too old for peftops" if major < 8 else line
        if built and (code := ours.runs(device.index)):
            problems.append(
                f"The CUDA kernels do not run on {device} (error {code}): in a checkout,"
                f" PEFTOPS_CUDA=1 PEFTOPS_CUDA_ARCHS={major}{minor}"
                " pip install --force-reinstall --no-deps ."
            )


def dotted(number):
    """13000 is 13.0"""
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def self_test(devices, problems):
    """A line for each op and type of device: its backend, and the worst error in each dtype.

    On a GPU it runs in bf16 alone, and only CASES_ON_GPU cases. Errors above their bounds are
    added to problems.
    """
    import peftops.functional  # noqa: F401  registers the ops

    from .._op import CONTRACTS

    for device in {device.type: device for device in devices}.values():
        for op in CONTRACTS:
            yield check_op(op, device, problems)


def check_op(op, device, problems):
    """The line of self_test for one op and device."""
    import torch

    from .. import backends
    from ..testing.law import check

    cell = backends.find(op, torch.empty(0, device=device))
    backend = cell.__module__.split(".")[1]
    if device.type == "cuda":
        dtypes = [torch.bfloat16]
        cases = CASES_ON_GPU
    else:
        dtypes = [torch.float32, torch.bfloat16, torch.float16]
        cases = None
    errors = []
    for dtype in dtypes:
        label, error, bound = worst(
            islice(check(op, backend, SHAPE, dtype, device), cases)
        )
        relation = "≤"
        if not error <= bound:
            relation = ">"
            problems.append(
                f"{op} on {device.type} by {backend} is wrong in {dtype} ({label}: error"
                f" {error:.1e}, at most {bound:.1e}): please report this output."
            )
        name = str(dtype).removeprefix("torch.")
        errors.append(f"{name} {error:.1e} {relation} {bound:.1e}")
    return f"{op:10} on {device.type}: {backend:10} error {', '.join(errors)}"


def worst(results):
    """The (label, error, bound) with the largest error; first those above their bounds."""
    return max(results, key=lambda result: (not result[1] <= result[2], result[1]))
