"""A stand-in for a GPU, so that everything the host does for a GPU can run without one.

It is a torch device that computes nothing and a CUDA driver that does nothing. torch's dispatcher
and autograd, Triton's compiler and launcher (for sm_90), and our launchers are the real ones.

`enter` gives this process such a device, and there is no way back. So callers start a process of
their own.
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
NAME = "standin"  # of the device
MODULE = "peftops_standin"  # the extension
PROCESSORS = 132
CAPABILITY = 9, 0
LAUNCH = 2300  # ns that a launch takes of a host
PRODUCT = 6500  # ns that a product by cuBLAS takes of a host


def missing() -> str | None:
    """Why the stand-in cannot be built here, or None."""
    import torch

    if sys.platform != "linux":
        return f"the stand-in is for Linux, not {sys.platform}"
    for tool in ("gcc", "g++"):
        if not shutil.which(tool):
            return f"there is no {tool}"
    if (
        not Path(torch.__file__)
        .parent.joinpath("include", "torch", "extension.h")
        .exists()
    ):
        return "torch comes without its headers"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "there is no Python.h"
    return None


def interpreted() -> bool:
    """Whether Triton's kernels are interpreted in this process."""
    import triton

    return triton.knobs.runtime.interpret


def build() -> Path:
    """Compiles the stand-in. Returns its folder, which is kept for this version of torch."""
    import torch

    sources = [HERE / "driver.c", HERE / "device.cpp"]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    digest.update(f"{torch.__version__} {sys.version}".encode())
    cache = Path.home() / ".cache" / "peftops"
    target = cache / f"standin-{digest.hexdigest()[:16]}"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    built = Path(tempfile.mkdtemp(dir=cache))
    try:
        compile_into(built, Path(torch.__file__).parent, *sources)
        built.rename(target)
    except OSError:
        if not target.exists():  # if it exists, another process was as quick
            raise
    finally:
        shutil.rmtree(built, ignore_errors=True)
    return target


def compile_into(folder, torch, driver, device):
    """Compiles the two sources.

    Args:
        folder: where libcuda.so.1 and the extension go.
        torch: the folder of torch.
        driver: the source of the CUDA driver.
        device: the source of the torch device.
    """
    libcuda = [
        "-shared",
        "-Wl,-soname,libcuda.so.1",
        driver,
        "-o",
        folder / "libcuda.so.1",
    ]
    subprocess.run(["gcc", "-O2", "-fPIC", *libcuda], check=True)
    command = [
        "g++",
        "-O2",
        "-std=c++20",
        "-shared",
        "-fPIC",
        "-w",
        f"-DTORCH_EXTENSION_NAME={MODULE}",
        "-DTORCH_API_INCLUDE_EXTENSION_H",
        f"-I{torch / 'include'}",
        f"-I{torch / 'include/torch/csrc/api/include'}",
        f"-I{sysconfig.get_path('include')}",
        device,
        "-o",
        folder / f"{MODULE}.so",
        f"-L{torch / 'lib'}",
        "-ltorch",
        "-ltorch_cpu",
        "-ltorch_python",
        "-lc10",
        f"-Wl,-rpath,{torch / 'lib'}",
    ]
    subprocess.run(command, check=True)


def extension():
    """The extension module of the stand-in's device. It exists after enter."""
    return sys.modules[MODULE]


def enter():
    """Makes torch.device("standin") exist, and makes Triton launch on it from now on.

    TRITON_INTERPRET must not be set, and peftops.triton must not be imported yet.

    Returns:
        extension: the module of the device.
        driver: the library of the CUDA driver.
    """
    folder = build()
    driver = ctypes.CDLL(folder / "libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    import torch

    sys.path.insert(0, str(folder))
    extension = __import__(MODULE)
    sys.path.remove(str(folder))
    device = types.ModuleType(f"torch.{NAME}")
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "is_initialized": True,
        "get_amp_supported_dtype": [torch.bfloat16, torch.float16],
        "_is_in_bad_fork": False,
        "_lazy_init": None,
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
    return extension, driver


def pretend(torch):
    """Replaces what Triton and our launchers ask of torch.cuda by the answers of an H200."""
    major, minor = CAPABILITY
    properties = types.SimpleNamespace(
        major=major,
        minor=minor,
        multi_processor_count=PROCESSORS,
    )
    # It returns 0 for device 0, as quickly as torch's own.
    torch._C._cuda_getCurrentRawStream = operator.index
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_capability = lambda device=None: CAPABILITY
    torch.cuda.get_device_properties = lambda device=None: properties


def serve():
    """Makes peftops run its Triton kernels on the stand-in."""
    import peftops.triton
    from peftops import backends

    backends.ORDER[NAME] = ("triton",)
    peftops.triton.runs = lambda device: True
