"""A stand-in for a GPU: a torch device without compute and a CUDA driver that does nothing, so that everything of the
host is real: torch's dispatcher and autograd, Triton's compiler and launcher (for sm_90), and ours.

`enter` turns this process into one that has such a device, for good; so callers start a process of their own.
"""

import ctypes
import hashlib
import operator
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME, MODULE = "standin", "peftops_standin"  # of the device; of the extension
PROCESSORS, CAPABILITY = 132, (9, 0)
LAUNCH, PRODUCT = 2300, 6500  # ns that a launch and cuBLAS take of a host


def missing():
    """Why it cannot be built here, or None."""
    import torch

    if sys.platform != "linux":
        return f"the stand-in is for Linux, not {sys.platform}"
    for tool in ("gcc", "g++"):
        if not shutil.which(tool):
            return f"there is no {tool}"
    if not Path(torch.__file__).parent.joinpath("include", "torch", "extension.h").exists():
        return "torch comes without its headers"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "there is no Python.h"
    return None


def interpreted():
    """Whether Triton's kernels are interpreted in this process."""
    import triton

    return triton.knobs.runtime.interpret


def build():
    """The folder of what is built, which is kept for this torch."""
    import torch

    sources = [HERE / "driver.c", HERE / "device.cpp"]
    told = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    told.update(f"{torch.__version__} {sys.version}".encode())
    cache = Path.home() / ".cache" / "peftops"
    target = cache / f"standin-{told.hexdigest()[:16]}"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=cache))
    try:
        compile_into(made, Path(torch.__file__).parent, *sources)
        made.rename(target)
    except OSError:
        if not target.exists():  # else another process was as quick
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target


def compile_into(folder, torch, driver, device):
    libcuda = ["-shared", "-Wl,-soname,libcuda.so.1", driver, "-o", folder / "libcuda.so.1"]
    subprocess.run(["gcc", "-O2", "-fPIC", *libcuda], check=True)
    includes = [
        torch / "include",
        torch / "include/torch/csrc/api/include",
        sysconfig.get_path("include"),
    ]
    defines = [f"-DTORCH_EXTENSION_NAME={MODULE}", "-DTORCH_API_INCLUDE_EXTENSION_H"]
    libraries = [
        f"-L{torch / 'lib'}",
        "-ltorch",
        "-ltorch_cpu",
        "-ltorch_python",
        "-lc10",
        f"-Wl,-rpath,{torch / 'lib'}",
    ]
    flags = [
        "-O2",
        "-std=c++20",
        "-shared",
        "-fPIC",
        "-w",
        *defines,
        *(f"-I{path}" for path in includes),
    ]
    subprocess.run(
        ["g++", *flags, device, "-o", folder / f"{MODULE}.so", *libraries], check=True
    )


def extension():
    """What the stand-in's device says of itself, after enter"""
    return sys.modules[MODULE]


def enter():
    """(extension, driver) of the stand-in, on which torch.device("standin") and Triton's launches run from now on.

    TRITON_INTERPRET must not be set, and nothing of peftops.triton imported.
    """
    folder = build()
    driver = ctypes.CDLL(folder / "libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    import torch

    sys.path.insert(0, str(folder))
    made = __import__(MODULE)
    sys.path.remove(str(folder))
    device = types.ModuleType(f"torch.{NAME}")
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "_is_in_bad_fork": False,
    }
    answers |= {
        "is_initialized": True,
        "_lazy_init": None,
        "get_amp_supported_dtype": [torch.bfloat16, torch.float16],
    }
    for name, answer in answers.items():
        setattr(device, name, lambda answer=answer: answer)
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, device)
    pretend(torch)
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    triton.knobs.nvidia.libcuda_path = str(folder)
    triton.runtime.driver.set_active(CudaDriver())
    serve()
    return made, driver


def pretend(torch):
    """What Triton and our launchers ask torch.cuda, answered as an H200 would."""
    major, minor = CAPABILITY
    properties = types.SimpleNamespace(
        major=major, minor=minor, multi_processor_count=PROCESSORS
    )
    torch._C._cuda_getCurrentRawStream = (
        operator.index
    )  # 0, for device 0, as quickly as torch's own
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_capability = lambda device=None: CAPABILITY
    torch.cuda.get_device_properties = lambda device=None: properties


def serve():
    """Has peftops run its Triton kernels on the stand-in."""
    import peftops.triton
    from peftops import backends

    backends.ORDER[NAME] = ("triton",)
    peftops.triton.runs = lambda device: True
