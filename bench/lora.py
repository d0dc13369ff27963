"""The row lora: a layer's forward and backward beside the frozen layer alone and beside stock PEFT."""

import torch
from torch import nn

import peftops
from peftops.integrations.peft import path

OPS = ("lora_fwd", "lora_bwd", "lora_gemv", "lora_mask")
OURS, BASE = "peftops", "frozen"
LAYERS = {  # of a model, by name: (m, k, n, r)
    "SmolLM2 q, o": (512, 576, 576, 16),
    "SmolLM2 k, v": (512, 576, 192, 16),
    "SmolLM2 gate, up": (512, 576, 1536, 16),
    "SmolLM2 down": (512, 1536, 576, 16),
    "Llama-3.1-8B q, o, one token": (1, 4096, 4096, 16),
    "Llama-3.1-8B q, o": (8192, 4096, 4096, 16),
}
QUICK = ("SmolLM2 k, v",)
GPU = ("Llama-3.1-8B q, o",)
FEW = 64  # rows of a generation: no gradient, no dropout, no autocast
HOST = ("host time, 2 rows of 16", (2, 16, 16, 4))


def measure(o, dtype, device, race):
    """A result for each layer, dropout and pass; and one for the time that Python takes."""
    rounds = 5 if o.quick else 15
    for name, sizes in [("as asked", o.shape)] if o.shape else layers(device, o.quick):
        drops = (o.dropout,) if o.dropout is not None else (0.0, 0.1)
        for p in drops if sizes[0] > FEW else (0.0,):
            found = contenders(sizes, dtype, device, p)
            calls = {label: passes(layer, sizes, dtype, device) for label, layer in found.items()}
            flops, size = cost(*sizes, dtype.itemsize)
            common = {"layer": name, "shape": sizes, "dropout": p, "backend": backend(found[OURS])}
            yield from race(calls, OURS, rounds, device, common | {"forward_flops": flops, "forward_bytes": size})
    name, sizes = HOST
    found = contenders(sizes, torch.float32, device, 0.0)
    calls = {label: host(layer, device) for label, layer in found.items()}
    common = {"layer": name, "shape": sizes, "dropout": 0.0, "backend": backend(found[OURS]), "dtype": "fp32"}
    yield from race(calls, OURS, rounds, device, common)


def backend(layer):
    return path(layer.get_base_layer().weight)


def layers(device, quick):
    chosen = QUICK if quick else [name for name in LAYERS if device.type == "cuda" or name not in GPU]
    return [(name, LAYERS[name]) for name in chosen]


def cost(m, k, n, r, size=2):
    """(flops, bytes) of a forward: x, W, A and B are read once and y is written once; h stays in cache."""
    return 2 * m * (k * n + k * r + r * n), size * (m * k + k * n + m * n) + 4 * r * (k + n)


def contenders(shape, dtype, device, p):
    """{name: layer} on one base weight; PEFT's adapters are fp32 by default, and in x's dtype where so named."""
    import peft

    _, k, n, r = shape
    torch.manual_seed(0)
    base = nn.Linear(k, n, bias=False, device=device, dtype=dtype).requires_grad_(False)
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=p, target_modules=["linear"])

    def adapted(fp32):
        model = nn.Module()
        model.add_module("linear", base)
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=fp32)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight)
        return model

    name = str(dtype).removeprefix("torch.")
    return {
        BASE: base,
        "PEFT": adapted(True).base_model.model.linear,
        **({f"PEFT, {name} adapters": adapted(False).base_model.model.linear} if dtype != torch.float32 else {}),
        OURS: peftops.patch(adapted(True)).base_model.model.linear,
    }


def passes(layer, shape, dtype, device):
    """{"forward": call, "forward + backward": call}, under autocast as trainers do; few rows go forward only."""
    m, k, n, _ = shape
    few = m <= FEW
    x = torch.randn(m, k, device=device).to(dtype).requires_grad_(not few)
    dy = torch.randn(m, n, device=device).to(dtype)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    mixed = dtype != torch.float32 and not few

    def forward():
        with torch.autocast(device.type, dtype, enabled=mixed), torch.set_grad_enabled(not few):
            return layer(x)

    def both():
        torch.autograd.grad(forward(), wanted, dy)

    return {"forward": forward} if few else {"forward": forward, "forward + backward": both}


def host(layer, device):
    """The same on tensors so small that only Python's time is left."""
    _, k, _, _ = HOST[1]
    x = torch.randn(2, k, device=device)

    def without():
        with torch.no_grad():
            layer(x)

    return {"forward, no grad": without, "forward, grad": lambda: layer(x)}
