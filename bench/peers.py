"""Who a LoRA layer is measured beside: each peer makes of the same weights a layer(x) and says what it trains."""

import inspect
import logging
import warnings
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.util import find_spec

import torch
from torch import nn
from torch.nn import functional

import peftops
from peftops.cli import BadInput

from .timing import Contender, copies

FEW = 64  # rows of a generation: no gradient, no dropout, no autocast
WRONG = 0.05  # of the largest output: a peer that is further off computes something else
OURS, BASE, LORA, COPY = "peftops", "frozen", "peftops, LoRA", "copy of w"
FUSE = f"{OURS}, fuse"  # with integrations.peft.mlp.fuse
MICROSECONDS = "µs"  # in place of a peer in a target that is no ratio
SCALING = 2.0

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(
    logging.ERROR
)  # it warns of a kernel on a hub


class Absent(Exception):
    """Why a peer does not take part, in words."""


@dataclass(frozen=True)
class Problem:
    """One layer, on as many copies of its weight as no cache holds: every peer gets the same tensors."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device
    p: float = 0.0
    base: str = "dense"  # "nf4", or "nf4, double": what peers and we make of the weight
    dora: str = ""  # the dropout_mode, where the layer is DoRA's

    @cached_property
    def tensors(self):
        (m, k, n, r), generator = self.shape, torch.Generator(self.device).manual_seed(0)

        def normal(*shape, scale=1.0):
            return (torch.randn(shape, generator=generator, device=self.device) * scale).to(
                self.dtype
            )

        size = n * k * self.dtype.itemsize // (1 if self.base == "dense" else 4)
        weights = [normal(n, k, scale=k**-0.5) for _ in range(copies(size, self.device))]
        return (
            weights,
            normal(r, k, scale=k**-0.5),
            normal(n, r, scale=r**-0.5),
            normal(m, k),
            normal(m, n),
        )

    @property
    def few(self):
        return self.shape[0] <= FEW

    @property
    def mixed(self):
        return self.dtype != torch.float32 and not self.few


def frozen(t, w, a, b):
    layer = nn.Linear(*reversed(w.shape), bias=False, device="meta")
    layer.weight = nn.Parameter(w, requires_grad=False)
    return layer, []


def eager(t, w, a, b):
    """The formula in plain torch, with adapters in the weight's dtype."""
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()

    def layer(x):
        h = functional.linear(functional.dropout(x, t.p, training=True) if t.p else x, a)
        return functional.linear(x, w) + SCALING * functional.linear(h, b)

    return layer, [a, b]


def compiled(t, w, a, b):
    layer, trained = eager(t, w, a, b)
    return torch.compile(layer, dynamic=False), trained


def peft(t, w, a, b, fp32=True, base=frozen):
    """PEFT's own layer; adapters are fp32 by its default."""
    from peft import LoraConfig, get_peft_model

    model = nn.Module()
    model.linear, _ = base(t, w, a, b)
    model.is_loaded_in_4bit = base is bitsandbytes  # which PEFT asks
    options = {"lora_dropout": t.p, "use_dora": bool(t.dora), "target_modules": ["linear"]}
    config = LoraConfig(r=t.shape[3], lora_alpha=SCALING * t.shape[3], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = get_peft_model(
            model, config, autocast_adapter_dtype=fp32
        ).base_model.model.linear
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
    return layer.train(not t.few), [p for p in layer.parameters() if p.requires_grad]


def bitsandbytes(t, w, a, b):
    """Its 4-bit layer; in evaluation it has kernels that it has not in training."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    double = t.base == "nf4, double"
    layer = Linear4bit(*reversed(w.shape), bias=False, compute_dtype=t.dtype, device="meta")
    layer.weight = Params4bit(
        w.clone(), requires_grad=False, quant_type="nf4", compress_statistics=double
    )
    return layer.to(w.device).train(not t.few), []


def peft_bitsandbytes(t, w, a, b):
    return peft(t, w, a, b, base=bitsandbytes)


def four_bits(t, w, a, b):
    layer, _ = frozen(t, w, a, b)
    return peftops.nn.LinearNF4.from_linear(layer, double_quant=t.base == "nf4, double"), []


def peft_narrow(t, w, a, b):
    if t.dtype == torch.float32:
        raise Absent("its adapters are fp32 anyway")
    return peft(t, w, a, b, fp32=False)


def peft_compiled(t, w, a, b):
    layer, trained = peft(t, w, a, b)
    return torch.compile(layer, dynamic=False), trained


def ours(t, w, a, b):
    layer, trained = peft(t, w, a, b, base=frozen if t.base == "dense" else four_bits)
    if t.dora == "lora":
        layer = peftops.nn.LoRALinear.from_peft(layer)
        layer.dropout_mode = "lora"
        return layer, trained
    model = nn.ModuleList([layer])
    return peftops.patch(model)[0], trained


def ours_lora(t, w, a, b):
    return ours(replace(t, dora=""), w, a, b)


def on_backend(name):
    def build(t, w, a, b):
        layer, trained = ours(t, w, a, b)

        def forced(x):
            with peftops.backend(name):
                return layer(x)

        return forced, trained

    return build


def unsloth(t, w, a, b):
    import unsloth  # noqa: F401  patches torch and transformers, which is why it has a process of its own
    from unsloth.kernels.fast_lora import LoRA_W

    without_dropout(t)
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    return lambda x: LoRA_W.apply(x[None], w, None, a, b, SCALING)[0], [a, b]


def axolotl(t, w, a, b):
    from axolotl.kernels.lora import LoRA_O

    without_dropout(t)
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    named = {
        "X": None,
        "X_drop": None,
        "W": w,
        "bias": None,
        "W_quant": None,
        "A": a,
        "B": b,
        "s": SCALING,
    }
    wanted = list(inspect.signature(LoRA_O.forward).parameters)[
        1:
    ]  # they differ between its versions
    return lambda x: LoRA_O.apply(*((named | {"X": x[None]}).get(name) for name in wanted))[
        0
    ], [a, b]


def lorafusion(t, w, a, b):
    from lorafusion.ops.lora_v1 import fused_linear_lora

    if not t.p and not t.few:
        raise Absent("its backward needs dropout")
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    return lambda x: fused_linear_lora(x[None].contiguous(), w, a, b, SCALING, dropout_p=t.p)[
        0
    ], [a, b]


def vllm(t, w, a, b):
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    serving(t)
    m, r = t.shape[0], t.shape[3]
    meta = LoRAKernelMeta.make(1, m, device=t.device)
    meta.prepare_tensors(torch.zeros(m, dtype=torch.int32, device=t.device))
    several = len(inspect.signature(meta.meta_args).parameters) > 1
    args = meta.meta_args(m, True) if several else meta.meta_args(m)
    a, b = a[None].contiguous(), b[None].contiguous()

    def layer(x):
        y, h = (
            functional.linear(x, w),
            torch.empty((1, m, r), dtype=torch.float32, device=x.device),
        )
        lora_shrink(x, [a], h, *args, SCALING)
        lora_expand(h, [b], y, *args, offset_start=0, add_inputs=True)
        return y

    return layer, []


def sglang(t, w, a, b):
    from sglang.srt.lora.utils import LoRABatchInfo

    try:
        from sglang.kernels.ops.lora.dense.sgemm_lora_a import sgemm_lora_a_fwd
        from sglang.kernels.ops.lora.dense.sgemm_lora_b import sgemm_lora_b_fwd
    except ImportError:
        from sglang.srt.lora.triton_ops import sgemm_lora_a_fwd, sgemm_lora_b_fwd

    serving(t)

    def ints(*values):
        return torch.tensor(values, dtype=torch.int32, device=t.device)

    m, r = t.shape[0], t.shape[3]
    info = LoRABatchInfo(
        use_cuda_graph=False, bs=1, num_segments=1, max_len=m, permutation=None, seg_indptr=ints(0, m),
        seg_lens=ints(m), weight_indices=ints(0), lora_ranks=ints(r),
        scalings=torch.tensor([SCALING], device=t.device),
    )  # fmt: skip
    a, b = a[None].contiguous(), b[None].contiguous()
    return lambda x: sgemm_lora_b_fwd(
        sgemm_lora_a_fwd(x, a, info), b, info, functional.linear(x, w)
    ), []


def flashinfer(t, w, a, b):
    from flashinfer.gemm import SegmentGEMMWrapper

    serving(t)
    gemm = SegmentGEMMWrapper(torch.empty(128 << 20, dtype=torch.int8, device=t.device))
    ends = torch.tensor([0, t.shape[0]], dtype=torch.int64, device=t.device)
    a, b = a[None].contiguous(), (SCALING * b)[None].contiguous()

    def layer(x):
        h = gemm.run(x, a, 1, True, seg_indptr=ends)
        return functional.linear(x, w) + gemm.run(h, b, 1, True, seg_indptr=ends)

    return layer, []


def without_dropout(t):
    if t.p:
        raise Absent("its fast path has no dropout")
    if t.few:
        raise Absent("it is made for training")


def serving(t):
    if not t.few:
        raise Absent("it is made for serving, and has no backward")


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
GPU = {  # their package is their name; each changes torch for all of its process, and so has one of its own
    "unsloth": unsloth,
    "axolotl": axolotl,
    "lorafusion": lorafusion,
    "vllm": vllm,
    "sglang": sglang,
    "flashinfer": flashinfer,
}
ABSENT = {  # from what a 16-bit LoRA layer is measured beside
    "bitsandbytes": "has no kernel for a 16-bit base",
    "liger_kernel": "has no LoRA kernel",
}
BUILDERS = (
    HERE
    | NF4
    | GPU
    | {LORA: ours_lora}
    | {f"{OURS}, {name}": on_backend(name) for name in ("triton", "cuda", "cpu", "reference")}
)


def known(texts):
    """The names in texts, each a name, which may hold a comma, or names between commas; BadInput for others."""
    names = HERE | NF4 | GPU
    found = [
        name
        for text in texts
        for name in ([text] if text in names else map(str.strip, text.split(",")))
    ]
    if unknown := [name for name in found if name not in names]:
        raise BadInput(
            f"--peers must each be one of {'; '.join(map(repr, names))}, got {unknown[0]!r}"
        )
    return found


def contender(label, t):
    """The peer's passes over a problem, or Absent."""
    if label in GPU and find_spec(label) is None:
        raise Absent("is not installed")
    weights, a, b, x, dy = t.tensors
    built = [BUILDERS[label](t, w, a, b) for w in weights]
    x = x if t.few else x.clone().requires_grad_()
    calls = {"forward": [forward(layer, x, t) for layer, _ in built]}
    if (
        t.few and t.base != "dense"
    ):  # bitsandbytes has other kernels then, and other layers after evaluation
        wanted, trained = (
            x.clone().requires_grad_(),
            [BUILDERS[label](t, w, a, b)[0] for w in weights],
        )
        trained = [
            layer.train() if isinstance(layer, nn.Module) else layer for layer in trained
        ]
        calls["forward, with gradient"] = [partial(layer, wanted) for layer in trained]
    if not t.few:
        calls["forward + backward"] = [
            both(layer, x, dy, trained, t) for layer, trained in built
        ]
    return Contender(calls, t.device, checked(label, calls["forward"][0], t))


def forward(layer, x, t):
    """A call, under autocast as trainers do; few rows go forward only, without a gradient."""

    def call():
        with (
            torch.autocast(t.device.type, t.dtype, enabled=t.mixed),
            torch.set_grad_enabled(not t.few),
        ):
            return layer(x)

    return call


def both(layer, x, dy, trained, t):
    call, wanted = forward(layer, x, t), [x, *trained]
    return lambda: torch.autograd.grad(call(), wanted, dy)


def checked(label, call, t):
    """max|y − exact| / max|exact| over the first rows, None under dropout; Absent where that is more than rounding."""
    y = call().detach()[:FEW].double()
    if t.p:
        return None
    (w, *_), *rest = t.tensors
    w, a, b, x = (v[:FEW].double() if v is rest[2] else v.double() for v in (w, *rest[:3]))
    if t.base != "dense" and label != BASE:
        w = peftops.NF4Weight.quantize(t.tensors[0][0]).dequantize().double()
    exact = x @ w.T if "frozen" in label else x @ w.T + SCALING * (x @ a.T @ b.T)
    if (
        t.dora and label != LORA and "frozen" not in label
    ):  # which starts with the magnitudes of the weight alone
        exact *= w.norm(dim=1) / (w + SCALING * b @ a).norm(dim=1)
    error = ((y - exact).abs().max() / exact.abs().max()).item()
    if not error <= WRONG:
        raise Absent(f"computes something else: its error is {error:.2g}")
    return error
