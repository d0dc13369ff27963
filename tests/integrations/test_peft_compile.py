"""A patched model under torch.compile, and under torch.export."""

import copy
from functools import partial

import pytest
import torch
from law import bound, chain_bound, error, orders
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("peft")
pytest.importorskip("transformers")

from tiny import TOKENS, exactly, install_our_mask, single, step, tiny

import peftops
from peftops.integrations.peft import FUSED, FusedLinear
from peftops.nn import LinearNF4

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def ops_of(graphs):
    return [
        node.target
        for graph in graphs
        for node in graph.graph.nodes
        if node.op == "call_function"
    ]


def captured(model, *args):
    """The aot graphs of one training step."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    backend = torch._dynamo.backends.common.aot_autograd(
        fw_compiler=keep, bw_compiler=keep
    )
    out = torch.compile(model, backend=backend, fullgraph=True)(*args)
    out.sum().backward()
    return graphs


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_no_more_graph_breaks_than_stock(architecture):
    stock = tiny(architecture, lora_dropout=0.1, lora_bias=True)
    patched = peftops.patch(copy.deepcopy(stock))
    before, after = (
        torch._dynamo.explain(model)(input_ids=TOKENS, labels=TOKENS)
        for model in (stock, patched)
    )
    assert after.graph_count == before.graph_count
    assert after.graph_break_count == before.graph_break_count


def test_the_compiled_graph_holds_the_fused_ops():
    model = peftops.patch(single(lora_dropout=0.1))
    forward, backward = captured(model, torch.randn(70, 16))
    assert torch.ops.peftops.lora_fwd.default in ops_of([forward])
    assert torch.ops.peftops.lora_bwd.default in ops_of([backward])
    assert peftops.report(model).calls == {}


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_equals_stock(compiler, monkeypatch):
    install_our_mask(monkeypatch)
    stock = tiny(lora_dropout=0.3)
    exact = step(exactly(stock))
    same = orders(partial(step, stock))
    patched = peftops.patch(copy.deepcopy(stock))
    with torch._inductor.config.patch(fallback_random=True):  # eager's random numbers
        out = step(torch.compile(patched, backend=compiler))
    for ours, truth, *draws in zip(out, exact, *same, strict=True):
        assert error(ours, truth) <= chain_bound(draws, truth)
    assert peftops.report(patched).calls == {}  # so nothing ran outside of the graphs


def test_changing_scaling_recompiles_at_most_once():
    stock = tiny()
    patched = peftops.patch(copy.deepcopy(stock))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(patched, backend=counter)
    for scale in (1.0, 0.5, 0.25, 0.75, 3.0):
        for model in (stock, patched):
            for name, layer in model.named_modules():
                if name.endswith("_proj"):
                    layer.set_scale("default", scale)
        out = step(compiled)
        exact = step(exactly(stock))
        same = orders(partial(step, stock))
        for ours, truth, *draws in zip(out, exact, *same, strict=True):
            assert error(ours, truth) <= chain_bound(draws, truth)
    assert counter.frame_count <= 2, counter.frame_count
    for name, layer in patched.named_modules():
        assert isinstance(layer, FusedLinear) or not name.endswith("_proj")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_exported_equals_stock(use_dora, nf4, strict):
    """For any number of rows, in ATen's operations.

    This includes a strict export, where dynamo cannot follow PEFT's own DoRA.
    """
    stock = single(use_dora=use_dora).eval()
    sizes = ({0: torch.export.Dim("m", min=2, max=4096)},)
    patched = copy.deepcopy(stock)
    if nf4:
        layers = [model.base_model.model.lin for model in (stock, patched)]
        layers[1].base_layer = LinearNF4.from_linear(layers[1].base_layer)
        layers[0].base_layer.weight.data = layers[1].base_layer.dequantize()
    net = peftops.patch(patched).base_model.model
    program = torch.export.export(
        net,
        (torch.randn(6, 16),),
        dynamic_shapes=sizes,
        strict=strict,
    )
    assert {op.namespace for op in ops_of([program])} == {"aten"}
    assert program.graph_signature.buffers_to_mutate == {}
    for m in (2, 64, 65):
        x = torch.randn(m, 16)
        y = program.module()(x)
        exact = exactly(stock)(x.double())
        assert error(y, exact) <= bound(stock(x), exact)
    before = peftops.report(patched).calls[FUSED]
    patched(x)
    assert peftops.report(patched).calls[FUSED] == before + 1
