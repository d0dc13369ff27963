"""The layers in a CUDA graph and compiled, against the same call in eager mode."""

import torch
from torch import nn

import peftops.nn

from ..timing import said

# Rows, k, n: the kernels for one row, for few and for many.
SHAPES = (1, 256, 512), (64, 256, 512), (300, 256, 512)


def examine(device):
    """(what, whether it holds, words); None instead of whether where it cannot be asked."""
    for m, k, n in SHAPES:
        for p in (0.0, 0.1):
            for mode, judge in {
                "a CUDA graph": graph,
                "torch.compile": compiled,
            }.items():
                what = f"LoRALinear, {m} rows, p = {p}, in {mode}"
                try:
                    layer = layer_of(k, n, p, device)
                    x = torch.randn(m, k, device=device).bfloat16()
                    yield what, *judge(layer, x)
                except Exception as error:  # of a compiler, the driver or ours
                    yield what, False, said(error)


def layer_of(k, n, p, device):
    torch.manual_seed(0)
    base = nn.Linear(k, n, device=device, dtype=torch.bfloat16)
    layer = peftops.nn.LoRALinear(
        base,
        8,
        lora_alpha=16,
        lora_dropout=p,
        init_lora_weights=False,
    )
    return layer.train()


def trained(layer, x, call=None):
    """Output and gradients."""
    x = x.detach().requires_grad_()
    y = layer(x) if call is None else call(x)
    wanted = [x, *(weight for weight in layer.parameters() if weight.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, wanted, torch.ones_like(y))]


def graph(layer, x):
    return replayed(layer, x) if x.device.type == "cuda" else (None, "needs a GPU")


def replayed(layer, x):
    """(whether replays are right, what is wrong)

    A replay sees new inputs. Under dropout it draws a new mask; without, it equals the eager call
    bit for bit.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            trained(layer, x)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    held = x.clone()
    results = []
    with torch.cuda.graph(captured):
        out = trained(layer, held)
    for source in (x, 2 * x, 2 * x):
        held.copy_(source)
        captured.replay()
        results.append([t.clone() for t in out])
    if not all(t.isfinite().all() for t in results[0]):
        return False, "a replay is not finite"
    if drops(layer):
        differ = not torch.equal(results[1][0], results[2][0])
        return differ, "" if differ else "every replay draws the same mask"
    same = all(
        torch.equal(*pair)
        for pair in zip(trained(layer, 2 * x), results[1], strict=True)
    )
    return same, "" if same else "a replay differs from the eager call"


def drops(layer):
    return isinstance(layer.lora_dropout["default"], nn.Dropout)


def compiled(layer, x):
    """One graph, no breaks; equal bit for bit without dropout."""
    torch._dynamo.reset()
    call = torch.compile(layer, fullgraph=True)
    out = trained(layer, x, call)
    if drops(layer):
        return all(t.isfinite().all() for t in out), ""
    same = all(torch.equal(*pair) for pair in zip(out, trained(layer, x), strict=True))
    return same, "" if same else "differs from the eager call"
