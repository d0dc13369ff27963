"""torch.export, strict and not: the graph has ATen's operations only, and takes any number of rows.

Its numbers are those of the layer.
"""

import copy
import operator

import pytest
import torch
from law import bound, error
from torch import nn
from torch.export import Dim, export

import peftops
from peftops.nn import LinearNF4, LoRALinear

pytestmark = pytest.mark.usefixtures("one_thread")


def foreign(program):
    """The functions in a graph that are neither ATen's operations nor arithmetic on sizes."""
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    return {
        target
        for target in called
        if getattr(target, "namespace", "") != "aten"
        and not hasattr(operator, target.__name__)
    }


def linear(dtype):
    torch.manual_seed(0)
    return nn.Linear(64, 48, dtype=dtype)


def nf4(dtype, **options):
    return LinearNF4.from_linear(linear(dtype), **options)


def adapted(base, **options):
    layer = LoRALinear(
        base, 4, **{"lora_alpha": 6, "init_lora_weights": False} | options
    )
    return layer.train("lora_dropout" in options)


LAYERS = {
    "NF4": nf4,
    "FP4, scales in fp32": lambda dtype: nf4(
        dtype, double_quant=False, quant_type="fp4"
    ),
    "NF4 that computes in bf16": lambda dtype: nf4(dtype, compute_dtype=torch.bfloat16),
    "LoRA": lambda dtype: adapted(linear(dtype), lora_bias=True),
    "LoRA over NF4": lambda dtype: adapted(nf4(dtype)),
    "LoRA, dropout": lambda dtype: adapted(linear(dtype), lora_dropout=0.3),
    "DoRA": lambda dtype: adapted(linear(dtype), use_dora=True),
    "DoRA over NF4": lambda dtype: adapted(nf4(dtype), use_dora=True),
    "DoRA, dropout": lambda dtype: adapted(
        linear(dtype), use_dora=True, lora_dropout=0.3
    ),
    "DoRA, a norm that is differentiated": lambda dtype: adapted(
        linear(dtype), use_dora=True, detach_norm=False
    ),
}


def in_double(layer):
    """The same layer in fp64; a 4-bit weight becomes the dense weight that it stands for."""
    wide = copy.deepcopy(layer)
    if isinstance(base := getattr(wide, "base_layer", None), LinearNF4):
        wide.base_layer = linear(torch.float64)
        wide.base_layer.weight.data = base.dequantize(torch.float64)
        wide.base_layer.bias.data = base.bias.double()
        wide.base_layer.requires_grad_(False)
    return wide.double()


@torch.no_grad()
def called(layer, x):
    torch.manual_seed(1)
    with peftops.backend("reference"):
        return layer(x)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, dtype, strict):
    layer = LAYERS[name](dtype)
    sizes = {0: Dim("batch", min=2, max=64), 1: Dim("tokens", min=2, max=4096)}
    program = export(
        layer,
        (torch.randn(3, 5, 64, dtype=dtype),),
        dynamic_shapes=(sizes,),
        strict=strict,
    )
    assert foreign(program) == set() and program.graph_signature.buffers_to_mutate == {}
    wide = in_double(layer)
    for shape in ((2, 2, 64), (3, 21, 64), (5, 40, 64)):
        x = torch.randn(shape, dtype=dtype)
        y = called(program.module(), x)
        same = called(layer, x)
        exact = called(wide, x.double())
        assert y.dtype is dtype and error(y, exact) <= bound(same, exact)


def test_a_weight_that_is_dequantized():
    """PEFT dequantizes a weight where it computes DoRA's norm itself."""

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nf4(torch.bfloat16)

        def forward(self, x):
            return x @ self.layer.dequantize(x.dtype).T

    net, x = Dense(), torch.randn(3, 64)
    for strict in (False, True):
        program = export(net, (x,), strict=strict)
        assert foreign(program) == set() and torch.equal(program.module()(x), net(x))
