"""What benches call of torch.cuda, on a stand-in with the clock of the CPU.

So no name of torch.cuda is used for the first time on a GPU.
"""

import time
from types import SimpleNamespace

import pytest
import torch
from peftops.bench import timing
from peftops.bench.proof import gpu as command
from peftops.bench.proof import layers

pytest.importorskip("peft")
CPU = torch.device("cpu")


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1000 * (end.at - self.at)


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        assert isinstance(other, Stream)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def gpu(monkeypatch):
    """A device "cuda" whose functions of torch.cuda run on the CPU."""
    properties = SimpleNamespace(L2_cache_size=1 << 20, total_memory=80 * 10**9)
    replacements = {
        "Event": Event,
        "Stream": Stream,
        "synchronize": lambda device=None: None,
        "stream": lambda stream: stream,
        "current_stream": lambda device=None: Stream(),
        "memory_allocated": lambda device: 100,
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_allocated": lambda device: 1100,
        "get_device_properties": lambda device: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "set_per_process_memory_fraction": lambda share, device: None,
    }
    for name, value in replacements.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, value)
    return SimpleNamespace(type="cuda", index=0)


def use_graphs(monkeypatch, graph_class, capture_class):
    """Makes torch.cuda capture graphs by these classes."""
    for name, value in {"CUDAGraph": graph_class, "graph": capture_class}.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, value)


def test_calls_are_timed_eagerly_and_in_a_graph(gpu, monkeypatch):
    monkeypatch.setattr(timing, "SHORTEST", 1e-4)
    monkeypatch.setattr(timing, "PATIENCE", 0.01)
    calls = []
    graphs = []

    class CUDAGraph:
        def replay(self):
            calls.append("replay")

    class Capture:
        def __init__(self, graph):
            graphs.append(graph)

        def __enter__(self):
            calls.append("capture")

        def __exit__(self, *_):
            calls.append("captured")

    use_graphs(monkeypatch, CUDAGraph, Capture)
    copies = [lambda: calls.append("a"), lambda: calls.append("b")]
    contender = timing.Contender({"pass": copies}, gpu)
    assert contender.prepare("pass", "eager") >= 2
    assert contender.sample("pass", "eager") > 0
    assert calls[:6] == ["a", "b"] * 3
    assert contender.peak("pass") == 1000
    calls.clear()
    contender.prepare("pass", "graph")
    assert calls[:6] == ["a", "b"] * 3
    assert calls[6:10] == ["capture", "a", "b", "captured"]
    assert set(calls[10:]) == {"replay"}
    assert len(graphs) == 1
    assert contender.sample("pass", "graph") > 0
    assert command.arch() == "90"


def test_a_replay_that_is_wrong_is_noticed(gpu, monkeypatch):
    """A replay must read new inputs, draw a new mask, and compute what the eager call does."""
    trained = layers.trained

    class CUDAGraph:
        def replay(self):
            for target, source in zip(
                self.out, trained(self.layer, self.x), strict=True
            ):
                target.copy_(source)

    class Capture:
        def __init__(self, graph):
            self.graph = graph

        def __enter__(self):
            def remember(layer, x, call=None):
                self.graph.layer = layer
                self.graph.x = x
                self.graph.out = trained(layer, x)
                return self.graph.out

            monkeypatch.setattr(layers, "trained", remember)

        def __exit__(self, *_):
            monkeypatch.setattr(layers, "trained", trained)

    use_graphs(monkeypatch, CUDAGraph, Capture)
    x = torch.randn(70, 32).bfloat16()
    for p in (0.0, 0.1):
        assert layers.replayed(layers.layer_of(32, 48, p, CPU), x) == (True, "")
    monkeypatch.setattr(CUDAGraph, "replay", lambda self: None)
    faults = {
        0.0: "a replay differs from the eager call",
        0.1: "every replay draws the same mask",
    }
    for p, fault in faults.items():
        assert layers.replayed(layers.layer_of(32, 48, p, CPU), x) == (False, fault)
    assert layers.graph(layers.layer_of(32, 48, 0.0, CPU), x) == (None, "needs a GPU")
