"""torch.compile of whole decoder blocks: one graph for all batch sizes, one more per adapter."""

import copy
from functools import partial

import pytest
import torch
from law import chain_bound, error, orders
from torch._dynamo.testing import CompileCounterWithBackend

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from tiny import METHODS, exactly, install_our_mask, pair

import peftops

pytestmark = pytest.mark.usefixtures("one_thread")
# Sizes of a batch, times 24 tokens. For a size of 1, torch itself makes a graph of its own.
MANY = (3, 6, 3)
FEW = (2,)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


class Block(torch.nn.Module):
    """The first decoder block of a model, called with hidden states alone."""

    def __init__(self, model):
        super().__init__()
        inner = model.base_model.model.model
        self.block = inner.layers[0]
        with torch.no_grad():
            self.positions = inner.rotary_emb(
                next(model.parameters()), torch.arange(24)[None]
            )

    def forward(self, x):
        return self.block(x, position_embeddings=self.positions)


def step(block, x):
    block.zero_grad()
    x = x.clone().requires_grad_()
    torch._dynamo.maybe_mark_dynamic(x, 0)
    torch.manual_seed(1)
    y = block(x)
    y.square().sum().backward()
    return [
        y.detach(),
        x.grad,
        *(p.grad.clone() for p in block.parameters() if p.grad is not None),
    ]


@pytest.mark.parametrize(
    "method, p", [*zip(METHODS, (0.3, 0.0, 0.3, 0.0), strict=True)]
)
def test_one_graph_for_all_batch_sizes(method, p, monkeypatch):
    install_our_mask(monkeypatch)
    stock, ours = pair(method, lora_dropout=p)
    exact = Block(exactly(stock))
    stock = Block(stock)
    model = peftops.patch(ours, strict=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Block(model), fullgraph=True, backend=counter)
    sizes = MANY + FEW if p else MANY  # without dropout, few rows are another op
    for size in sizes:
        x = torch.randn(size, 24, 32)
        out = step(compiled, x)
        truths = step(exact, x.double())
        same = orders(partial(step, stock, x))
        for ours, truth, *draws in zip(out, truths, *same, strict=True):
            assert error(ours, truth) <= chain_bound(draws, truth)
    assert counter.frame_count == 1
    assert peftops.report(model).calls == {}


def graphs(model):
    """How many graphs there are after each call, while two adapters of one shape take turns."""
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    counter = CompileCounterWithBackend("aot_eager")
    counts = []
    compiled = torch.compile(Block(model), backend=counter)
    for name in ("default", "other", "default", "other", "default"):
        model.set_adapter(name)
        step(compiled, torch.randn(3, 24, 32))
        counts.append(counter.frame_count)
    return counts


@pytest.mark.parametrize("method", ["lora", "qdora"])
def test_adapters_that_take_turns_compile_no_more_than_stock(method):
    """Stock is LoRA in any case, since stock DoRA makes many graphs."""
    expected = graphs(pair("lora")[0])
    counts = graphs(peftops.patch(pair(method)[1], strict=True))
    assert all(a <= b for a, b in zip(counts, expected, strict=True)), (
        counts,
        expected,
    )
    assert counts[-1] == counts[2], (counts, expected)
