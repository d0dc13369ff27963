"""Batches of tokens that mix adapters, without gradient; and several active adapters."""

import copy

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from law import bound, chain_bound, error, orders
from mixed import (
    ADAPTERS,
    NAMES,
    TOKENS,
    exact_of,
    flat,
    gradients,
    several,
)
from tiny import lora_layers, single

import peftops

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Adapter name"),
]


def test_in_evaluation_each_row_is_that_of_its_adapter():
    stock = several().eval()
    ours = peftops.patch(copy.deepcopy(stock))
    with torch.no_grad():
        exact = exact_of(stock)(input_ids=TOKENS, adapter_names=NAMES).logits
        draws = orders(lambda: stock(input_ids=TOKENS, adapter_names=NAMES).logits)
        out = ours(input_ids=TOKENS, adapter_names=NAMES).logits
    assert error(out, exact) <= chain_bound(draws, exact)
    assert set(peftops.report(ours).calls) == {"fused"}


CHANGES = {
    "in place": lambda model, b: b.mul_(2),
    "by data, and a step": lambda model, b: stepped(model, b),
    "by data, and a change of mode": lambda model, b: (
        b.data.mul_(2),
        model.train().eval(),
    ),
    "another tensor": lambda model, b: setattr(
        lora_layers(model)[-1].lora_B["b"], "weight", nn.Parameter(2 * b)
    ),
}


def stepped(model, b):
    """An optimizer that works on flat copies, and then steps."""
    b.data.mul_(2)
    torch.optim.SGD([nn.Parameter(torch.zeros(1))]).step()


@pytest.mark.parametrize("change", CHANGES)
def test_tokens_see_a_change_of_an_adapter(change):
    """One position a call reuses what the call before has stacked, until an adapter changes."""
    stock = several().eval()
    ours = peftops.patch(copy.deepcopy(stock))
    tokens = TOKENS[:, :1]
    results = []
    with torch.no_grad():
        for model in (stock, ours):
            outs = [model(input_ids=tokens, adapter_names=NAMES).logits]
            outs.append(model(input_ids=tokens, adapter_names=NAMES[::-1]).logits)
            CHANGES[change](model, lora_layers(model)[-1].lora_B["b"].weight)
            outs.append(model(input_ids=tokens, adapter_names=NAMES[::-1]).logits)
            results.append(outs)
    assert not torch.equal(results[1][1], results[1][2])
    for theirs, mine in zip(*results, strict=True):
        assert error(mine, theirs.double()) <= 1e-5


def test_generation_under_bf16_and_inference_mode():
    """Stacks are cast to the model's dtype there, and rounded as without a stack."""
    ours = peftops.patch(several(dtype=torch.bfloat16)).eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(2):
                out = ours(input_ids=TOKENS[:, :1], adapter_names=NAMES).logits
    with torch.enable_grad():
        expected = ours(input_ids=TOKENS[:, :1], adapter_names=NAMES).logits
    assert torch.equal(out, expected)


def test_several_active_adapters_are_one():
    stock = several()
    stock.base_model.set_adapter(["default", *ADAPTERS])
    ours = peftops.patch(copy.deepcopy(stock))

    def run(model):
        model.zero_grad()
        logits = model(input_ids=TOKENS).logits
        logits.square().mean().backward()
        return flat((logits.detach(), gradients(model)))

    exact = run(exact_of(stock))
    assert error(run(ours), exact) <= chain_bound(orders(lambda: run(stock)), exact)
    assert set(peftops.report(ours).calls) == {"fused"}


def test_several_active_adapters_with_biases():
    stock = single(lora_bias=True)
    torch.manual_seed(1)
    stock.add_adapter(
        "b",
        peft.LoraConfig(
            r=3, lora_bias=True, target_modules=["lin"], init_lora_weights=False
        ),
    )
    stock.base_model.set_adapter(["default", "b"])
    for layer in lora_layers(stock):
        for b in layer.lora_B.values():
            nn.init.normal_(b.bias)
    ours = peftops.patch(copy.deepcopy(stock))
    x = torch.randn(70, 16)
    exact = exact_of(stock)(x.double())
    assert error(ours(x), exact) <= bound(stock(x), exact)
    assert set(peftops.report(ours).calls) == {"fused"}
