"""Whose kernels the CPU backend runs: those of `pytest --isa NAME`, also in processes that start with again().

Others (a launcher's, `python -m peftops`, builds) run the machine's best.
"""

NAMES = ["portable", "avx2", "avx512", "avx512_bf16"]


def use(name):
    """Before peftops.cpu is imported, whose rows hold on to _C.cpu."""
    from peftops import _C

    if not hasattr(_C, name):
        raise LookupError(
            f"this machine runs no {name}; it runs {', '.join(n for n in NAMES if hasattr(_C, n))}"
        )
    _C.cpu = getattr(_C, name)


def used():
    """The name, or "" where nothing is compiled."""
    try:
        from peftops import _C
    except ImportError:
        return ""
    return _C.cpu.__name__.rpartition(".")[2]


def again():
    """A line of Python with which another process, that can import what tests can, runs the same kernels."""
    return f"import isa; isa.use({used()!r})\n" if used() else ""
