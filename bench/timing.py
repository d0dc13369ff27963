"""Seconds, bytes and the ceilings of a device. Nothing of peftops is imported here."""

import ctypes
import gc
import time
from pathlib import Path
from statistics import median, quantiles

import torch

SHORTEST = 0.005  # seconds of a sample
STEADY = 0.05  # a pass is warm when two samples differ by no more than this share
PATIENCE = 2.0  # seconds after which it counts as warm anyway
ROUNDS_AT_LEAST = 5


class Contender:
    """The passes of one layer, each as a list of calls: one for every copy of its weights.

    Copies take turns, so that no cache holds what a call reads. A mode is "eager", or "graph": a
    CUDA graph of one turn of all copies.

    Args:
        calls: {pass: calls}.
        device: what runs them.
        error: of the layer's output, for the result line.
    """

    def __init__(self, calls, device, error=None):
        self.calls = calls
        self.device = device
        self.error = error
        self.runs = {}  # (pass, mode): (function, how often a sample calls it)

    def prepare(self, pass_name, mode):
        """Warms a pass up until it is steady. Returns how many calls make a sample."""
        calls = self.calls[pass_name]
        if mode == "graph":
            run = capture(calls, self.device)
        else:

            def run():  # the results live until the turn ends
                return [call() for call in calls]

        for _ in range(3):
            run()
        once = max(sample(run, 2, self.device), 1e-7)
        turns = max(1, round(SHORTEST / once))
        start = time.perf_counter()
        before = float("inf")
        while time.perf_counter() - start < PATIENCE:
            now = sample(run, turns, self.device)
            if abs(now - before) <= STEADY * before:
                break
            before = now
        self.runs[pass_name, mode] = run, turns
        return turns * len(calls)

    def sample(self, pass_name, mode):
        """Seconds of one call."""
        run, turns = self.runs[pass_name, mode]
        return sample(run, turns, self.device) / len(self.calls[pass_name])

    def peak(self, pass_name):
        return peak_bytes(self.calls[pass_name][0], self.device)


def sample(run, repeats, device):
    """Seconds of one call of run: by events on a GPU, by the clock elsewhere."""
    if device.type == "cuda":
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def capture(calls, device):
    """A function that replays a CUDA graph of these calls."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # lazy initialization must not fall into the capture
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def race(
    contenders,
    pass_name,
    mode,
    rounds,
    tick=lambda: None,
):
    """Takes a sample of each contender in every round.

    Args:
        tick: is called after each round.

    Returns:
        seconds: {label: seconds of each round}.
        failures: {label: why} of those that failed while they warmed up.
    """
    seconds = {}
    failures = {}
    for label, contender in contenders.items():
        try:
            contender.prepare(pass_name, mode)
            seconds[label] = []
        except Exception as error:  # code of other packages may raise anything
            failures[label] = said(error)
    for _ in range(max(rounds, ROUNDS_AT_LEAST)):
        for label in seconds:
            seconds[label].append(contenders[label].sample(pass_name, mode))
        tick()
    return seconds, failures


def said(error):
    """The first line of an error of another package."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def ratios(seconds, ours):
    """{label: ours over theirs}.

    It is the median of the ratios within a round, so a slow minute does not move it.
    """
    medians = {}
    for label, theirs in seconds.items():
        if label != ours:
            pairs = zip(seconds[ours], theirs, strict=True)
            medians[label] = round(median(a / b for a, b in pairs), 4)
    return medians


def spread(seconds: list[float]) -> list[float]:
    """The 20th, 50th and 80th percentile in milliseconds."""
    low, _, _, high = quantiles(seconds, n=5, method="inclusive")
    return [round(1000 * value, 5) for value in (low, median(seconds), high)]


def copies(size: int, device: torch.device) -> int:
    """How many copies of a weight of `size` bytes are too large for any cache of the device."""
    return max(1, min(16, -(-4 * cache(device) // max(size, 1))))


def cache(device: torch.device) -> int:
    """Bytes of the largest cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20}
    largest = 0
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        size = file.read_text().strip()
        if size[-1] in units:
            largest = max(largest, int(size[:-1]) * units[size[-1]])
    return largest or 32 << 20


def free(device: torch.device) -> int:
    """Bytes of memory that are not in use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text()
        return 1024 * int(text.partition("MemAvailable:")[2].split()[0])
    except (OSError, IndexError):
        return 1 << 62


def ceilings(device: torch.device, dtype: torch.dtype, quick: bool = False):
    """(bytes a second of a copy, operations a second of a matrix product) of this device.

    Bytes that are read and bytes that are written both count. On a CPU the product is the faster
    of one in this dtype and one in fp32.
    """
    big = device.type == "cuda"
    if big:
        size, width = 1 << 30, 8192
    elif quick:
        size, width = 1 << 26, 512
    else:
        size, width = 1 << 28, 2048
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)

    def best(run):
        run()
        return median(sample(run, 3, device) for _ in range(ROUNDS_AT_LEAST))

    def product(dtype):
        a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * width**3 / best(lambda: torch.mm(a, b, out=out))

    copied = 2 * size / best(lambda: target.copy_(source))
    return copied, max(map(product, {dtype} if big else {dtype, torch.float32}))


def peak_bytes(call, device):
    """How many bytes the memory in use rises above what it was before the call, or None.

    It is None where the system does not tell. The first call warms up and does not count.
    """
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(
            0
        )  # else the call could reuse memory that was freed before
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = resident("VmRSS")
    call()
    return max(0, resident("VmHWM") - before)


def resident(field):
    """Bytes of a field of /proc/self/status, such as VmRSS."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])
