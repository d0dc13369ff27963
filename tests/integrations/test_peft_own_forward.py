"""Layers whose instance has a forward of its own, as accelerate sets it."""

import copy

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from accelerate.hooks import ModelHook, add_hook_to_module
from test_peft_fallbacks import lin, shadow_forward
from tiny import single

import peftops

pytestmark = pytest.mark.usefixtures("one_thread")


class Counting(ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("late", [False, True])
def test_hooks_of_accelerate_on_the_layer_itself(late):
    """The hooks of a model that is dispatched over devices, before or after patch."""
    stock, model = single(), single()
    hook = Counting()
    if late:
        peftops.patch(model)
    add_hook_to_module(lin(model), hook)
    if not late:
        peftops.patch(model, strict=True)
    x = torch.randn(7, 16)
    assert torch.equal(model(x), peftops.patch(copy.deepcopy(stock))(x))
    assert hook.calls == 1
    assert peftops.report(model).calls == {"fused": 1}
    peftops.unpatch(model)
    assert torch.equal(model(x), stock(x))
    assert hook.calls == 2
    assert type(lin(model)) is type(lin(stock))


def test_a_forward_of_its_own_is_called_and_named():
    stock, model = single(), single()
    for each in (stock, model):
        shadow_forward(lin(each))
    peftops.patch(model)
    x = torch.randn(7, 16)
    assert torch.equal(model(x), stock(x))
    assert type(lin(model)) is type(lin(stock))
    assert peftops.report(model).reasons == {"its forward was replaced": 1}
    with pytest.raises(
        ValueError, match="lin cannot be fused: its forward was replaced"
    ):
        peftops.patch(model, strict=True)
    patched = peftops.patch(single())
    shadow_forward(lin(patched))
    assert peftops.report(patched).reasons == {"its forward was replaced": 1}
    patched(x)
    assert peftops.report(patched).fused == 1  # since it calls ours
    with pytest.raises(
        ValueError,
        match=r"unpatch: .*lin has been given a forward of its own since patch",
    ):
        peftops.unpatch(patched)
