"""LinearNF4 layers for tests, and the dense layers that they are compared with."""

import torch
from torch import nn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [
    (quant_type, double, block)
    for quant_type in ("nf4", "fp4")
    for double in (True, False)
    for block in (64, 128)
]


def linear(k=64, n=96, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(k, n, bias, dtype=dtype)


def dense(layer, dtype):
    """nn.Linear with the weight that the layer stands for."""
    new = nn.Linear(
        layer.in_features, layer.out_features, layer.bias is not None, dtype=dtype
    )
    new.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
    if layer.bias is not None:
        new.bias.data = layer.bias.data.to(dtype)
    return new


def trained(module, x):
    """The output, and the gradients of x and of all parameters that have one."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.float().square().sum().backward()
    return [
        y.detach(),
        x.grad,
        *(p.grad for p in module.parameters() if p.requires_grad),
    ]


def bits(layer):
    """A copy of the state dict."""
    return {key: tensor.clone() for key, tensor in layer.state_dict().items()}


def same_bits(a, b):
    return list(a) == list(b) and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )
