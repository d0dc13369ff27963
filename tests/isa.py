"""Chooses whose kernels the CPU backend runs: those of `pytest --isa NAME`.

Processes that start with again() run the same kernels. Other processes (a launcher's,
`python -m peftops`, builds) run the best kernels of the machine.
"""

NAMES = ["portable", "avx2", "avx512", "avx512_bf16"]


def use(name):
    """Makes `name` the CPU's kernels. Call it before peftops.cpu is imported, which keeps _C.cpu.

    Raises:
        ImportError: nothing is compiled.
        LookupError: this machine does not run these instructions.
    """
    from peftops import _C

    if not hasattr(_C, name):
        runnable = ", ".join(known for known in NAMES if hasattr(_C, known))
        raise LookupError(f"this machine runs no {name}; it runs {runnable}")
    _C.cpu = getattr(_C, name)


def used():
    """The name of the kernels in use, or "" where nothing is compiled."""
    try:
        from peftops import _C
    except ImportError:
        return ""
    return _C.cpu.__name__.rpartition(".")[2]


def again():
    """A line of Python that makes another process run the same kernels.

    That process must be able to import what tests can.
    """
    if used():
        return f"import isa; isa.use({used()!r})\n"
    return ""
