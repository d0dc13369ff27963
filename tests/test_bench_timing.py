"""How benches measure: by turns, in samples of one call, against the machine's own ceilings."""

import time
import types

import torch
from peftops.bench import lora, measure, timing
from peftops.bench.peers import Problem

CPU = torch.device("cpu")
SMALL = Problem((70, 32, 48, 4), torch.bfloat16, CPU)


def test_contenders_take_turns():
    turns = []

    class Counting(timing.Contender):
        def sample(self, *args):
            turns.append(self.error)
            return super().sample(*args)

    calls = {"pass": [lambda: None]}
    contenders = {name: Counting(calls, CPU, name) for name in "ab"}
    contenders["c"] = timing.Contender({}, CPU)
    seconds, absent = timing.race(contenders, "pass", "eager", 6)
    assert turns == ["a", "b"] * 6
    assert {name: len(times) for name, times in seconds.items()} == {"a": 6, "b": 6}
    assert absent == {"c": "KeyError: 'pass'"}


def test_ratios_are_of_the_same_round():
    times = {"ours": [1.0, 2.0, 30.0], "theirs": [2.0, 4.0, 60.0]}
    assert timing.ratios(times, "ours") == {"theirs": 0.5}
    assert timing.spread([0.001, 0.002, 0.003]) == [1.4, 2.0, 2.6]


def test_a_sample_is_long_enough_and_of_one_call(monkeypatch):
    monkeypatch.setattr(timing, "SHORTEST", 0.02)
    contender = timing.Contender({"pass": [lambda: time.sleep(0.002)] * 2}, CPU)
    assert contender.prepare("pass", "eager") >= 8
    assert 0.002 <= contender.sample("pass", "eager") < 0.02


def test_weights_are_copied_until_no_cache_holds_them(monkeypatch):
    properties = types.SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu = torch.device("cuda")
    assert [timing.copies(size << 20, gpu) for size in (1, 32, 128, 400)] == [
        16,
        7,
        2,
        1,
    ]
    assert timing.copies(1, CPU) == 16
    assert timing.copies(1 << 40, CPU) == 1
    assert timing.cache(CPU) >= 1 << 15


def test_peak_memory_is_that_of_the_call():
    peak = timing.peak_bytes(lambda: torch.ones(16 << 20).sum(), CPU)
    assert peak is None or (64 << 20) * 0.9 < peak < (64 << 20) * 1.5


def test_ceilings_are_rates_that_lines_show():
    copied, computed = timing.ceilings(CPU, torch.float32, quick=True)
    assert 1e8 < copied < 1e13
    assert 1e8 < computed < 1e15
    # a CPU that does not multiply bf16 computes slowly
    slow = measure.rate(lora, SMALL, "forward", (1e9, 2e8))
    assert slow["gemm_tflops"] == 2e-4
    assert slow["copy_gbps"] == 1


def test_costs_of_lora_count_products_and_what_they_read_and_write():
    one, four = (Problem((m, 10, 20, 2), torch.bfloat16, CPU) for m in (1, 4))
    assert lora.cost(one) == (2 * (200 + 20 + 40), 2 * (10 + 200 + 20) + 4 * 2 * 30)
    flops, moved = lora.cost(four)
    both_flops, both_moved = lora.cost(four, backward=True)
    assert both_flops - flops == 2 * 4 * (200 + 40 + 80)
    assert both_moved - moved == 2 * (160 + 80 + 200) + 8 * 2 * 30
