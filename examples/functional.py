"""The functions and layers, without PEFT and without a model."""

import torch

import peftops
import peftops.functional as F

torch.manual_seed(0)
x = torch.randn(70, 64, requires_grad=True)
weight = torch.randn(48, 64)
lora_A = torch.randn(8, 64, requires_grad=True)
lora_B = torch.zeros(48, 8, requires_grad=True)

y = F.lora_linear(x, weight, lora_A, lora_B, scaling=2.0, dropout_p=0.1)
y.square().mean().backward()
print("a gradient of lora_B:", lora_B.grad.norm().item())

q = F.quantize_nf4(weight)  # bitsandbytes' bytes
y4 = F.lora_linear(x, q, lora_A, lora_B, scaling=2.0)
print("4 bits change y by", ((y4 - x @ weight.T).norm() / y4.norm()).item())

with peftops.backend("reference"):  # the specification, in plain torch
    exact = F.lora_linear(x, q, lora_A, lora_B, scaling=2.0)
print("kernel and specification differ by", (y4 - exact).abs().max().item())

linear = torch.nn.Linear(64, 48)
layer = peftops.nn.LoRALinear(linear, 8, lora_alpha=16, lora_dropout=0.1, use_dora=True)
print(
    layer(x).shape,
    sum(p.numel() for p in layer.parameters() if p.requires_grad),
    "trained",
)
