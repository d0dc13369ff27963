"""Peers of the bench: each is called as its package wants, and computes the same or is absent.

An absent one is named with the reason.
"""

from dataclasses import replace

import pytest
import torch
from fake_peers import FAKES, package
from peftops.bench import measure, peers
from peftops.bench.peers import BASE, OURS, Absent, Problem
from peftops.bench.worker import Remote

from peftops.cli import BadInput

pytest.importorskip("peft")
CPU = torch.device("cpu")
SMALL = Problem((70, 32, 48, 4), torch.bfloat16, CPU)
ONE = Problem((1, 32, 48, 4), torch.bfloat16, CPU)
SINGLE = Problem((70, 32, 48, 4), torch.float32, CPU)


def test_peers_compute_the_same():
    for problem in (SMALL, ONE, SINGLE):
        for label in peers.HERE:
            if "compile" in label or (problem is SINGLE and "narrow" in label):
                continue
            assert peers.contender(label, problem).error < peers.WRONG, label
    with pytest.raises(Absent, match="fp32 anyway"):
        peers.contender("PEFT, narrow adapters", SINGLE)


def test_a_peer_that_computes_something_else_is_not_measured(monkeypatch):
    monkeypatch.setitem(
        peers.BUILDERS, "torch", lambda t, w, a, b: (lambda x: x @ w.T, [])
    )
    absent = {}
    assert list(measure.build([BASE, "torch"], SMALL, absent)) == [BASE]
    assert "computes something else: its error is" in absent["torch"]


def test_a_peer_that_is_not_installed_is_named():
    with pytest.raises(Absent, match="is not installed"):
        peers.contender("lorafusion", SMALL)


def test_peers_are_named_alone_or_between_commas():
    assert peers.known(["PEFT, compiled", "torch,PEFT"]) == [
        "PEFT, compiled",
        "torch",
        "PEFT",
    ]
    assert all(
        peers.known([name]) == [name] for name in peers.HERE | peers.NF4 | peers.GPU
    )
    with pytest.raises(BadInput, match="got 'nobody'"):
        peers.known(["PEFT,nobody"])


@pytest.mark.parametrize("label", FAKES)
def test_a_peer_of_its_own_process(label, tmp_path):
    """Calls each peer in a fake of its package, as none is installed; ignores what that prints."""
    package(tmp_path, label, FAKES[label])
    serving = label in ("vllm", "sglang", "flashinfer")
    problem = ONE if serving else SMALL
    if label == "lorafusion":
        problem = Problem(SMALL.shape, SMALL.dtype, CPU, 0.1)
    remote = Remote(label, problem, tmp_path)
    try:
        if label == "lorafusion":
            assert remote.error is None
        else:
            assert remote.error < peers.WRONG
        for call in remote.calls:
            assert (
                remote.prepare(call, "eager") >= 1 and remote.sample(call, "eager") > 0
            )
        if serving:
            assert list(remote.calls) == ["forward"]
        else:
            assert list(remote.calls) == ["forward", "forward + backward"]
        with pytest.raises(Absent, match="KeyError"):
            remote.prepare("sideways", "eager")
    finally:
        remote.close()
    unfit = (
        ONE if label in ("unsloth", "axolotl") else SMALL
    )  # lorafusion needs dropout
    with pytest.raises(Absent, match=r"made for|needs dropout"):
        Remote(label, unfit, tmp_path)


def test_a_process_that_ends_is_absent(tmp_path):
    (tmp_path / "unsloth").mkdir()
    (tmp_path / "unsloth" / "__init__.py").write_text("import os; os._exit(3)")
    with pytest.raises(Absent, match="its process ended with 3"):
        Remote("unsloth", SMALL, tmp_path)


def test_another_tree_is_measured_with_the_benches_of_this_one(tmp_path):
    (tmp_path / "peftops").mkdir()
    (tmp_path / "peftops" / "__init__.py").write_text(
        "def patch(model): raise RuntimeError('the other tree')"
    )
    with pytest.raises(Absent, match="RuntimeError: the other tree"):
        Remote(OURS, SMALL, tmp_path)


# A peftops whose patch() raises a description of the model that it is given.
DESCRIBING = """
class nn:
    class LinearNF4:
        def from_linear(layer, double_quant):
            layer.base = "nf4, double" if double_quant else "nf4"
            return layer

def patch(model):
    layer, = model
    base = getattr(layer.base_layer, "base", "dense")
    raise RuntimeError(f"{base}; {type(layer.lora_variant['default'])}")
"""


@pytest.mark.parametrize("base", ["dense", "nf4", "nf4, double"])
def test_another_process_builds_the_same_problem(base, tmp_path):
    (tmp_path / "peftops").mkdir()
    (tmp_path / "peftops" / "__init__.py").write_text(DESCRIBING)
    with pytest.raises(Absent, match=f"{base}; .*DoraLinearVariant"):
        Remote(OURS, replace(SMALL, base=base, dora="peft"), tmp_path)
