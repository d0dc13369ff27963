"""Seconds, bytes and the ceilings of a device. Nothing of peftops is imported here."""

import ctypes
import gc
import time
from pathlib import Path
from statistics import median, quantiles

import torch

SHORTEST = 0.005  # seconds of a sample
STEADY, PATIENCE = (
    0.05,
    2.0,
)  # warm is what repeats itself that closely, or has been tried for so many seconds
ROUNDS_AT_LEAST = 5


class Contender:
    """The passes of one layer, each as a list of calls: one for every copy of its weights.

    Copies take turns, so that no cache holds what a call reads. A mode is "eager", or "graph": a CUDA graph of a turn.
    """

    def __init__(self, calls, device, error=None):
        self.calls, self.device, self.error, self.runs = calls, device, error, {}

    def prepare(self, kind, mode):
        """Warms a pass up until it is steady, and says how many calls make a sample."""
        calls = self.calls[kind]
        run = (
            capture(calls, self.device)
            if mode == "graph"
            else lambda: [call() for call in calls]
        )
        for _ in range(3):
            run()
        once = max(sample(run, 2, self.device), 1e-7)
        turns = max(1, round(SHORTEST / once))
        start, before = time.perf_counter(), float("inf")
        while time.perf_counter() - start < PATIENCE:
            now = sample(run, turns, self.device)
            if abs(now - before) <= STEADY * before:
                break
            before = now
        self.runs[kind, mode] = run, turns
        return turns * len(calls)

    def sample(self, kind, mode):
        """Seconds of one call."""
        run, turns = self.runs[kind, mode]
        return sample(run, turns, self.device) / len(self.calls[kind])

    def peak(self, kind):
        return peak_bytes(self.calls[kind][0], self.device)


def sample(run, repeats, device):
    """Seconds of one call: by events on a GPU, by the clock elsewhere."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
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
    """Replays a CUDA graph of these calls."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # what is lazy must have happened
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def race(contenders, kind, mode, rounds, tick=lambda: None):
    """{label: seconds of each round}, all of them taking turns round by round; and, in words, who cannot."""
    times, absent = {}, {}
    for label, contender in contenders.items():
        try:
            contender.prepare(kind, mode)
            times[label] = []
        except Exception as error:  # somebody else's code, of which anything may be expected
            absent[label] = said(error)
    for _ in range(max(rounds, ROUNDS_AT_LEAST)):
        for label in times:
            times[label].append(contenders[label].sample(kind, mode))
        tick()
    return times, absent


def said(error):
    """What somebody else's code raised, in a line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def ratios(times, ours):
    """{label: ours over theirs}: the median of the ratios within a round, which a slow minute does not move."""
    pairs = {
        label: zip(times[ours], theirs, strict=True)
        for label, theirs in times.items()
        if label != ours
    }
    return {label: round(median(a / b for a, b in pair), 4) for label, pair in pairs.items()}


def spread(seconds):
    """Milliseconds: 20th, 50th, 80th percentile."""
    low, _, _, high = quantiles(seconds, n=5, method="inclusive")
    return [round(1000 * value, 5) for value in (low, median(seconds), high)]


def copies(size, device):
    """How many copies of a weight of so many bytes no cache of the device holds."""
    return max(1, min(16, -(-4 * cache(device) // max(size, 1))))


def cache(device):
    """Bytes of the largest cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = [
        path.read_text().strip()
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(
        (int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units),
        default=32 << 20,
    )


def free(device):
    """Bytes of memory that are not in use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * int(
            Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]
        )
    except (OSError, IndexError):
        return 1 << 62


def ceilings(device, dtype, quick=False):
    """Bytes and operations a second of this device: of a copy, read and written counted, and of a matrix product, on a
    CPU of the faster of one in this dtype and one in fp32."""
    big = device.type == "cuda"
    size, width = (1 << 30, 8192) if big else (1 << 26, 512) if quick else (1 << 28, 2048)
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
    """How far the memory in use rises above what it was before the call, with the call's results alive."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else what was freed before is used again, unseen
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = resident("VmRSS")
    call()
    return max(0, resident("VmHWM") - before)


def resident(field):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])
