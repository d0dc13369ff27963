"""A base layer whose product only it computes: it is called as PEFT calls it, and one operation adds the delta."""

import torch

from ..ops.lora import Base, linear


def on_top(layer, widens, x, a, b, bias, scaling, p):
    """The delta on top of what the base layer makes of x, in fp32 where the two are not of one dtype."""
    modules, kind, dtype = layer._modules, x.device.type, x.dtype
    y0 = modules.get("quant_linear_module", modules["base_layer"])(x)
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    if y0.dtype is dtype:
        y = linear(x, Base("given", [y0]), a, b, bias, scaling, p)
    else:
        with torch.autocast(kind, enabled=False):
            base = Base("given", [y0.float()])
            y = linear(x.float(), base, a.float(), b.float(), bias, scaling, p)
    return y if widens and torch.is_autocast_enabled() else y.to(y0.dtype)
