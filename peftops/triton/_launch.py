"""Launches of Triton's kernels without most of what a launch costs on the host.

At every launch Triton finds out what its arguments are, to pick the compiled kernel. `Launched`
keeps the compiled kernel for arguments that are alike. It also notes launches for _replay.py.
"""

import contextvars
from functools import partial

import torch
import triton
from torch import Tensor

from .._replay import noting

MOST = 2048  # compiled kernels that a Launched keeps


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. On the host triton.cdiv takes ten times as long, since it also serves kernels."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n, for n ≥ 1."""
    return 1 << (n - 1).bit_length()


class Launched:
    """kernel[grid](*args, **options), as for what triton.jit returns.

    It launches on the current device, which has to be that of the tensors. Arguments are alike
    where numbers are equal and tensors have the same dtype, if all tensors start at multiples
    of 16 bytes.
    """

    def __init__(self, kernel):
        self.kernel = kernel
        self.kept = {}

    def __getitem__(self, grid):
        return partial(self.launch, grid)

    def launch(self, grid, *args, **options):
        alike = []
        starts = 0
        device = -1
        for arg in args:
            if isinstance(arg, Tensor):
                alike.append(arg.dtype)
                starts |= arg.data_ptr()
                device = arg.get_device()
            elif type(arg) is tuple:
                for tensor in arg:
                    alike.append(tensor.dtype)
                    starts |= tensor.data_ptr()
            else:
                alike.append(arg)
        notes = noting()
        if starts % 16 or profiled():
            if notes is not None:
                notes.why_not = "a launch that Triton has to see"
            with_workspace(args, lambda: self.kernel[grid](*args, **options))
            return
        key = device, *alike, *options, *options.values()
        workspace = None
        if known := self.kept.get(key):
            compiled, constants, needs_workspace = known
            stream = torch._C._cuda_getCurrentRawStream(device)
            run = compiled.run
            values = (
                *(*grid, 1, 1)[:3],
                stream,
                compiled.function,
                compiled.packed_metadata,
                None,  # the metadata of the launch, and two hooks
                None,
                None,
                *args,
                *constants,
            )
            if needs_workspace:
                _, workspace = with_workspace(args, lambda: run(*values))
            else:
                run(*values)
        else:
            compiled, workspace = with_workspace(
                args, lambda: self.kernel[grid](*args, **options)
            )
            if (
                compiled is None
            ):  # a stand-in that only records launches compiles nothing
                return
            self.keep(key, compiled, args, options)
        if notes is not None:
            note(notes, compiled, self.kernel, grid, args, workspace)

    def keep(self, key, compiled, args, options):
        """Keeps what a launch of a compiled kernel needs besides its arguments."""
        if len(self.kept) >= MOST:
            self.kept.clear()
        constants = [options[name] for name in self.kernel.arg_names[len(args) :]]
        needs_workspace = getattr(compiled.metadata, "global_scratch_size", 0) > 0
        self.kept[key] = compiled, constants, needs_workspace


def profiled() -> bool:
    """Whether a profiler has to see launches."""
    hook = triton.knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


def with_workspace(args, launch):
    """Calls launch() with an allocator that gives the kernel a workspace where it asks for one.

    The caller's own allocator stays as it is.

    Returns:
        (what launch() returns, the workspace or None)
    """
    workspaces = []
    like = next(arg for arg in args if isinstance(arg, Tensor))

    def allocate(size, alignment, stream):
        workspaces.append(like.new_empty(size, dtype=torch.uint8))
        return workspaces[-1]

    context = contextvars.copy_context()
    context.run(triton.set_allocator, allocate)
    returned = context.run(launch)
    return returned, workspaces[0] if workspaces else None


PLAIN = {  # metadata of a launch that needs nothing but a grid, a stream and parameters
    "num_ctas": 1,
    "launch_pdl": False,
    "launch_cooperative_grid": False,
    "cluster_dims": (1, 1, 1),
    "profile_scratch_size": 0,
}


def note(notes, compiled, kernel, grid, args, workspace):
    """Notes a plain launch for a replay, which makes it by CUDA's driver."""
    metadata = compiled.metadata
    for name, plain in PLAIN.items():
        if getattr(metadata, name, plain) not in (plain, None):
            notes.why_not = "a launch of a special kind"
            return
    parameters = []
    for name, arg in zip(kernel.arg_names, args, strict=False):
        parameters += parameters_of(compiled.src.signature[name], arg)
    parameters.append(("pointer", workspace))
    parameters.append(("pointer", None))  # a profiler's workspace
    threads = 32 * metadata.num_warps
    grid3 = (*grid, 1, 1)[:3]
    notes.launch(
        profiled,
        compiled.function,
        grid3,
        threads,
        metadata.shared,
        parameters,
        compiled,
    )


def parameters_of(signature, arg):
    """(C type, value) of each parameter that an argument of a kernel becomes.

    A tuple becomes one parameter for each of its tensors, a constexpr none.

    Args:
        signature: Triton's type of the argument, or a tuple of types for a tuple.
    """
    if not isinstance(signature, tuple):
        signature, arg = (signature,), (arg,)
    for type_name, value in zip(signature, arg, strict=True):
        if type_name != "constexpr":
            yield c_type(type_name), value


def c_type(type_name: str) -> str:
    """ "pointer", "float" or "int", as _replay.py packs parameters."""
    if type_name.startswith("*"):
        return "pointer"
    return "float" if type_name == "fp32" else "int"


def launched(kernel):
    """Decorates a kernel that the host launches, above triton.jit."""
    return kernel if triton.knobs.runtime.interpret else Launched(kernel)
