"""Who a LoRA layer is measured beside.

Each peer is a function that takes a problem, a weight W and the factors A and B. It returns a
layer(x) and the list of tensors that the layer trains.
"""

import logging
import warnings
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import nn
from torch.nn import functional

import peftops
from peftops.cli import BadInput

from .peers_gpu import GPU, MIXING
from .peers_multi import MULTI
from .problem import SCALING, Absent, Problem, frozen
from .timing import Contender

WRONG = (
    0.05  # of the largest output: a peer that is further off computes something else
)
OURS = "peftops"
BASE = "frozen"
LORA = "peftops, LoRA"
COPY = "copy of w"
FUSE = f"{OURS}, fuse"  # with integrations.peft.mlp.fuse
MICROSECONDS = "µs"  # in place of a peer in a target that is no ratio

# It warns of a kernel on a hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def eager(t: Problem, w, a, b):
    """The formula in plain torch, with adapters in the weight's dtype."""
    a = a.clone().requires_grad_()
    b = b.clone().requires_grad_()

    def layer(x):
        dropped = functional.dropout(x, t.p, training=True) if t.p else x
        h = functional.linear(dropped, a)
        return functional.linear(x, w) + SCALING * functional.linear(h, b)

    return layer, [a, b]


def compiled(t: Problem, w, a, b):
    layer, trained = eager(t, w, a, b)
    return torch.compile(layer, dynamic=False), trained


def peft(t: Problem, w, a, b, fp32=True, base=frozen):
    """PEFT's own layer; adapters are fp32 by its default."""
    from peft import LoraConfig, get_peft_model

    model = nn.Module()
    model.linear, _ = base(t, w, a, b)
    model.is_loaded_in_4bit = base is bitsandbytes  # PEFT asks for this attribute
    config = LoraConfig(
        r=t.shape[3],
        lora_alpha=SCALING * t.shape[3],
        lora_dropout=t.p,
        use_dora=bool(t.dora),
        target_modules=["linear"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config, autocast_adapter_dtype=fp32)
    layer = model.base_model.model.linear
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
    layer.train(not t.few)
    return layer, [p for p in layer.parameters() if p.requires_grad]


def bitsandbytes(t: Problem, w, a, b):
    """The 4-bit layer of bitsandbytes. It has other kernels in evaluation than in training."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    double = t.base == "nf4, double"
    layer = Linear4bit(
        *reversed(w.shape),
        bias=False,
        compute_dtype=t.dtype,
        device="meta",
    )
    layer.weight = Params4bit(
        w.clone(),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=double,
    )
    return layer.to(w.device).train(not t.few), []


def peft_bitsandbytes(t: Problem, w, a, b):
    return peft(t, w, a, b, base=bitsandbytes)


def four_bits(t: Problem, w, a, b):
    layer, _ = frozen(t, w, a, b)
    return peftops.nn.LinearNF4.from_linear(
        layer, double_quant=t.base == "nf4, double"
    ), []


def peft_narrow(t: Problem, w, a, b):
    if t.dtype == torch.float32:
        raise Absent("its adapters are fp32 anyway")
    return peft(t, w, a, b, fp32=False)


def peft_compiled(t: Problem, w, a, b):
    layer, trained = peft(t, w, a, b)
    return torch.compile(layer, dynamic=False), trained


def ours(t: Problem, w, a, b):
    layer, trained = peft(t, w, a, b, base=frozen if t.base == "dense" else four_bits)
    if t.dora == "lora":
        layer = peftops.nn.LoRALinear.from_peft(layer)
        layer.dropout_mode = "lora"
        return layer, trained
    model = nn.ModuleList([layer])
    return peftops.patch(model)[0], trained


def ours_lora(t: Problem, w, a, b):
    """Our LoRA; of multi-LoRA's adapters, all rows have the first."""
    if t.samples:
        a = a[0]
        b = b[0]
    return ours(replace(t, dora=""), w, a, b)


def on_backend(name):
    """A peer: ours, forced to this backend."""

    def build(t, w, a, b):
        layer, trained = builders(t)[OURS](t, w, a, b)

        def forced(x):
            with peftops.backend(name):
                return layer(x)

        return forced, trained

    return build


HERE = {  # in this process, on any device
    BASE: frozen,
    "torch": eager,
    "torch.compile": compiled,
    "PEFT": peft,
    "PEFT, narrow adapters": peft_narrow,
    "PEFT, compiled": peft_compiled,
    OURS: ours,
}
NF4 = {  # beside the frozen 16-bit layer and ours
    "bitsandbytes, frozen": bitsandbytes,
    "PEFT + bitsandbytes": peft_bitsandbytes,
    f"{OURS}, frozen": four_bits,
}
ABSENT = {  # from what a 16-bit LoRA layer is measured beside
    "bitsandbytes": "has no kernel for a 16-bit base",
    "liger_kernel": "has no LoRA kernel",
}
FORCED = {
    f"{OURS}, {name}": on_backend(name)
    for name in ("triton", "cuda", "cpu", "reference")
}
BUILDERS = HERE | NF4 | GPU | {LORA: ours_lora} | FORCED


def builders(t: Problem) -> dict:
    """{label: peer} of those that build layers for a problem."""
    if t.samples:
        return {BASE: frozen, LORA: ours_lora} | MULTI | MIXING | FORCED
    return BUILDERS


def known(texts: list[str]) -> list[str]:
    """The labels of peers in these texts.

    Args:
        texts: each is a label, which may hold a comma, or several labels with commas between them.

    Raises:
        BadInput: a label is unknown.
    """
    names = HERE | NF4 | GPU | MULTI
    labels = []
    for text in texts:
        if text in names:
            labels.append(text)
        else:
            labels += map(str.strip, text.split(","))
    if unknown := [label for label in labels if label not in names]:
        raise BadInput(
            f"--peers must each be one of {'; '.join(map(repr, names))}, got {unknown[0]!r}"
        )
    return labels


def contender(label: str, t: Problem) -> Contender:
    """The passes of a peer over a problem.

    Raises:
        Absent: the peer cannot take part.
    """
    if label in GPU and find_spec(label) is None:
        raise Absent("is not installed")
    build = builders(t)[label]
    weights, a, b, x, dy = t.tensors
    built = [build(t, w, a, b) for w in weights]
    if not t.few:
        x = x.clone().requires_grad_()
    calls = {"forward": [forward(layer, x, t) for layer, _ in built]}
    if t.few and t.base != "dense":
        # bitsandbytes has other kernels in training. It changes the layer at its first
        # evaluation, so training gets layers of its own.
        wanted = x.clone().requires_grad_()
        layers = [in_training(build(t, w, a, b)[0]) for w in weights]
        calls["forward, with gradient"] = [partial(layer, wanted) for layer in layers]
    if not t.few:
        calls["forward + backward"] = [
            both(layer, x, dy, trained, t) for layer, trained in built
        ]
    return Contender(calls, t.device, checked(label, calls["forward"][0], t))


def in_training(layer):
    return layer.train() if isinstance(layer, nn.Module) else layer


def forward(layer, x, t):
    """A call under autocast, as in training. For few rows it has neither autocast nor gradient."""

    def call():
        with (
            torch.autocast(t.device.type, t.dtype, enabled=t.mixed),
            torch.set_grad_enabled(not t.few),
        ):
            return layer(x)

    return call


def both(layer, x, dy, trained, t):
    """A call that goes forward and backward."""
    call = forward(layer, x, t)
    wanted = [x, *trained]
    return lambda: torch.autograd.grad(call(), wanted, dy)


def checked(label, call, t):
    """max|y − exact| / max|exact| over the first rows, or None under dropout.

    Raises:
        Absent: the error is more than rounding.
    """
    y = t.first(call().detach()).double()
    if t.p:
        return None
    weights, a, b, x, _ = t.tensors
    w = weights[0].double()
    a = a.double()
    b = b.double()
    x = t.first(x).double()
    if t.base != "dense" and label != BASE:
        w = peftops.NF4Weight.quantize(weights[0]).dequantize().double()
    if t.samples:
        slots = [0] * t.samples if label == LORA else t.slots
        a = a[slots]
        b = b[slots]
    exact = x @ w.T
    if "frozen" not in label:
        exact = exact + SCALING * (x @ a.mT @ b.mT)
        if (
            t.dora and label != LORA
        ):  # DoRA's magnitudes start as the norms of the weight alone
            exact *= w.norm(dim=1) / (w + SCALING * b @ a).norm(dim=1)
    error = ((y - exact).abs().max() / exact.abs().max()).item()
    if not error <= WRONG:
        raise Absent(f"computes something else: its error is {error:.2g}")
    return error
