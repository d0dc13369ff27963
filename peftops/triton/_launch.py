"""Launches: what Triton finds out about its arguments at every launch is kept for arguments that are alike."""

import contextvars
from functools import partial

import torch
import triton
from torch import Tensor

from .._replay import noting

MOST = 2048  # kinds of arguments that are kept


def cdiv(a, b):
    """Triton's own cost ten times as much on a host, as they are for kernels too."""
    return -(-a // b)


def power_of_2(n):
    """The least that is not below n, of 1 or more."""
    return 1 << (n - 1).bit_length()


class Launched:
    """kernel[grid](*args, **options) as triton.jit has it, on the current device, which is that of the tensors.

    Arguments are alike where numbers are equal and tensors have one dtype, if all start at multiples of 16 bytes.
    """

    def __init__(self, kernel):
        self.kernel, self.kept = kernel, {}

    def __getitem__(self, grid):
        return partial(self.launch, grid)

    def launch(self, grid, *args, **options):
        alike, starts, device = [], 0, -1
        for arg in args:
            if isinstance(arg, Tensor):
                alike.append(arg.dtype)
                starts |= arg.data_ptr()
                device = arg.get_device()
            elif type(arg) is tuple:
                for part in arg:
                    alike.append(part.dtype)
                    starts |= part.data_ptr()
            else:
                alike.append(arg)
        notes = noting()
        if starts % 16 or watched():
            if notes is not None:
                notes.why_not = "a launch that Triton has to see"
            given(args, lambda: self.kernel[grid](*args, **options))
            return
        key = device, *alike, *options, *options.values()
        workspace = None
        if found := self.kept.get(key):
            compiled, rest, works = found
            stream = torch._C._cuda_getCurrentRawStream(device)
            run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
            values = (
                *(*grid, 1, 1)[:3],
                stream,
                function,
                metadata,
                None,
                None,
                None,
                *args,
                *rest,
            )
            if works:
                _, workspace = given(args, lambda: run(*values))
            else:
                run(*values)
        else:
            compiled, workspace = given(args, lambda: self.kernel[grid](*args, **options))
            if compiled is None:  # what only records launches compiles nothing
                return
            if len(self.kept) >= MOST:
                self.kept.clear()
            rest = [options[name] for name in self.kernel.arg_names[len(args) :]]
            self.kept[key] = (
                compiled,
                rest,
                getattr(compiled.metadata, "global_scratch_size", 0) > 0,
            )
        if notes is not None:
            note(notes, compiled, self.kernel, grid, args, workspace)


def watched():
    """Whether a profiler has to see launches."""
    hook = triton.knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


def given(args, launch):
    """(launch(), the workspace that the kernel asked for or None), without a trace in the caller's own allocator."""
    made, like = [], next(arg for arg in args if isinstance(arg, Tensor))

    def allocate(size, alignment, stream):
        made.append(like.new_empty(size, dtype=torch.uint8))
        return made[-1]

    context = contextvars.copy_context()
    context.run(triton.set_allocator, allocate)
    return context.run(launch), made[0] if made else None


def note(notes, compiled, kernel, grid, args, workspace):
    """Notes a launch as CUDA's driver takes it, where it is of the plain kind."""
    made = compiled.metadata
    special = (
        ("num_ctas", 1),
        ("launch_pdl", False),
        ("launch_cooperative_grid", False),
        ("cluster_dims", (1, 1, 1)),
    )
    special += (("profile_scratch_size", 0),)
    if any(getattr(made, name, plain) not in (plain, None) for name, plain in special):
        notes.why_not = "a launch of a special kind"
        return
    parameters = [
        pair
        for name, arg in zip(kernel.arg_names, args, strict=False)
        for pair in typed(compiled, name, arg)
    ]
    parameters += [("pointer", workspace), ("pointer", None)]  # the second is a profiler's
    notes.launch(
        watched,
        compiled.function,
        (*grid, 1, 1)[:3],
        32 * made.num_warps,
        made.shared,
        parameters,
        compiled,
    )


def typed(compiled, name, arg):
    """(kind, value) of each parameter that this argument of a kernel becomes."""
    types = compiled.src.signature[name]
    pairs = zip(types, arg, strict=True) if isinstance(types, tuple) else [(types, arg)]
    for kind, value in pairs:
        if kind != "constexpr":
            yield (
                "pointer" if kind.startswith("*") else "float" if kind == "fp32" else "int",
                value,
            )


def launched(kernel):
    """A kernel that the host launches: decorates what triton.jit made."""
    return kernel if triton.knobs.runtime.interpret else Launched(kernel)
