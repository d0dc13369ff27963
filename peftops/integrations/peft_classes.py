"""PEFT's LoRA layers of other quantizers, with our forward. Each of them merges, saves and is copied as before."""

import functools
import sys
from importlib import import_module

from .peft import Fused

HOMES = {  # class -> where PEFT defines it, in peft.tuners.lora, if its quantizer is installed
    "AqlmLoraLinear": "aqlm",
    "AwqLoraLinear": "awq",
    "EetqLoraLinear": "eetq",
    "GPTQLoraLinear": "gptq",
    "HqqLoraLinear": "hqq",
    "IncLoraLinear": "inc",
    "Linear4bit": "bnb",
    "Linear8bitLt": "bnb",
    "TeLinear": "te",
    "TorchaoLoraLinear": "torchao",
}
WIDENING = {"AwqLoraLinear", "EetqLoraLinear", "HqqLoraLinear", "Linear4bit", "Linear8bitLt"}


def found():
    """PEFT's class -> ours, of those that PEFT has defined by now; bitsandbytes is not imported for it."""
    modules = {name: sys.modules.get(f"peft.tuners.lora.{home}") for name, home in HOMES.items()}
    stock = [getattr(module, name) for name, module in modules.items() if hasattr(module, name)]
    return {kind: fused(kind) for kind in stock}


@functools.cache
def fused(stock):
    name, doc = stock.__name__, f"PEFT's {stock.__name__}, with our forward."
    about = {"__module__": __name__, "__doc__": doc, "stock": stock, "widens": name in WIDENING}
    return type(f"Fused{name}", (Fused, stock), about)


def __getattr__(name):
    """A class by its name, as pickle asks for it."""
    stock = name.removeprefix("Fused")
    if stock == name or stock not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return fused(getattr(import_module(f"peft.tuners.lora.{HOMES[stock]}"), stock))
