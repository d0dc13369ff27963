"""Sanitizers over the emulated Hopper: silent where nothing is wrong, loud where something is."""

import pytest

from . import build
from .test_emulator import SCHEDULES, sanitized
from .test_hopper import FORMS, HERE, SOURCES, pytestmark  # noqa: F401

RUNS = """
import ctypes, sys
from cuda_on_cpu import build
module = build.opened({library!r})
a, b, out = ((ctypes.c_float * 32768)() for _ in range(3))
for kernel, mistake, threads, blocks, schedule in {cases!r}:
    module.schedule(*schedule)
    try:
        module.ask(kernel, *map(ctypes.addressof, (out, a, b)), mistake, blocks, threads)
        module.finish()
    except RuntimeError as raised:
        print("raised", raised, file=sys.stderr, flush=True)
print("ran")
"""
LAUNCHES = {  # (threads, blocks)
    "phases": (64, 1),
    "named": (96, 1),
    "tiles": (32, 1),
    "stores": (32, 1),
}
LAUNCHES |= dict.fromkeys(FORMS, (128, 1)) | dict.fromkeys(
    ("pipeline", "pipeline_transposed"), (288, 2)
)


def reports(sanitizer, schedules, *cases):
    """What a process prints that runs these cases, (kernel, mistake) each."""
    library = str(build.link(SOURCES, sanitizer, HERE / "semantics.cpp"))
    cases = [
        (kernel, mistake, *LAUNCHES[kernel], schedule)
        for kernel, mistake in cases
        for schedule in schedules
    ]
    done = sanitized(sanitizer, RUNS.format(library=library, cases=cases))
    return done.stdout + done.stderr


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_are_silent_where_nothing_is_wrong(sanitizer):
    assert (
        reports(
            sanitizer,
            SCHEDULES,
            ("product_bf16", 10),
            *((kernel, 1) for kernel in LAUNCHES),
        )
        == "ran\n"
    )


@pytest.mark.parametrize(
    "kernel, number, mistake",
    [
        ("phases", 0, "does not wait"),
        ("phases", 2, "gives back what it still reads"),
        ("phases", 4, "takes back what one still reads"),
        ("named", 0, "forgets a barrier"),
        ("named", 2, "forgets a barrier"),
        ("tiles", 0, "reads a tile before it comes"),
        ("stores", 0, "writes what is being sent"),
        ("stores", 2, "forgets fence.proxy.async"),
        ("product_bf16", 2, "forgets fence.proxy.async"),
        ("product_transposed_b", 2, "forgets fence.proxy.async"),
        ("product_bf16", 6, "forgets a barrier"),
        ("product_bf16", 11, "forgets fence.proxy.async"),
        ("pipeline", 2, "gives back what it still reads"),
        ("pipeline", 6, "reads tiles before they come"),
        ("pipeline_transposed", 7, "fetches over what others read"),
    ],
)
def test_threadsanitizer_sees_what_nothing_orders(kernel, number, mistake):
    report = reports("thread", SCHEDULES[:2], (kernel, number))
    assert "ThreadSanitizer: data race" in report, report[:3000]
    assert "hopper_" in report, report[:3000]


@pytest.mark.parametrize("kernel", ["product_bf16", "product_a_in_registers"])
def test_addresssanitizer_sees_a_read_past_a_tile(kernel):
    report = reports("address", SCHEDULES[:1], (kernel, 3))
    assert "AddressSanitizer: use-after-poison" in report, report[:3000]
    assert "hopper_" in report, report[:3000]
