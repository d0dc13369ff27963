"""Packages with LoRA kernels for GPUs, as peers.

Each function takes a problem, a weight W and the factors A and B. It returns a layer(x) and the
list of tensors that the layer trains.
"""

import inspect

import torch
from torch.nn import functional

from .problem import SCALING, Absent, Problem


def unsloth(t: Problem, w, a, b):
    import unsloth  # noqa: F401  patches torch and transformers, so it has a process of its own
    from unsloth.kernels.fast_lora import LoRA_W

    without_dropout(t)
    a = a.clone().requires_grad_()
    b = b.clone().requires_grad_()

    def layer(x):
        return LoRA_W.apply(x[None], w, None, a, b, SCALING)[0]

    return layer, [a, b]


def axolotl(t: Problem, w, a, b):
    from axolotl.kernels.lora import LoRA_O

    without_dropout(t)
    a = a.clone().requires_grad_()
    b = b.clone().requires_grad_()
    values = {
        "X": None,
        "X_drop": None,
        "W": w,
        "bias": None,
        "W_quant": None,
        "A": a,
        "B": b,
        "s": SCALING,
    }
    # The parameters differ between the versions of axolotl. The first is autograd's context.
    names = list(inspect.signature(LoRA_O.forward).parameters)[1:]

    def layer(x):
        given = values | {"X": x[None]}
        return LoRA_O.apply(*(given.get(name) for name in names))[0]

    return layer, [a, b]


def lorafusion(t: Problem, w, a, b):
    from lorafusion.ops.lora_v1 import fused_linear_lora

    if not t.p and not t.few:
        raise Absent("its backward needs dropout")
    a = a.clone().requires_grad_()
    b = b.clone().requires_grad_()

    def layer(x):
        return fused_linear_lora(
            x[None].contiguous(),
            w,
            a,
            b,
            SCALING,
            dropout_p=t.p,
        )[0]

    return layer, [a, b]


def vllm(t: Problem, w, a, b):
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    for_serving(t)
    m = t.shape[0]
    r = t.shape[3]
    meta = LoRAKernelMeta.make(1, m, device=t.device)
    meta.prepare_tensors(torch.zeros(m, dtype=torch.int32, device=t.device))
    several = len(inspect.signature(meta.meta_args).parameters) > 1
    args = meta.meta_args(m, True) if several else meta.meta_args(m)
    a = a[None].contiguous()
    b = b[None].contiguous()

    def layer(x):
        y = functional.linear(x, w)
        h = torch.empty((1, m, r), dtype=torch.float32, device=x.device)
        lora_shrink(x, [a], h, *args, SCALING)
        lora_expand(
            h,
            [b],
            y,
            *args,
            offset_start=0,
            add_inputs=True,
        )
        return y

    return layer, []


def sglang(t: Problem, w, a, b):
    from sglang.srt.lora.utils import LoRABatchInfo

    try:
        from sglang.kernels.ops.lora.dense.sgemm_lora_a import sgemm_lora_a_fwd
        from sglang.kernels.ops.lora.dense.sgemm_lora_b import sgemm_lora_b_fwd
    except ImportError:
        from sglang.srt.lora.triton_ops import sgemm_lora_a_fwd, sgemm_lora_b_fwd

    for_serving(t)

    def ints(*values):
        return torch.tensor(values, dtype=torch.int32, device=t.device)

    m = t.shape[0]
    r = t.shape[3]
    info = LoRABatchInfo(
        use_cuda_graph=False,
        bs=1,
        num_segments=1,
        max_len=m,
        permutation=None,
        seg_indptr=ints(0, m),
        seg_lens=ints(m),
        weight_indices=ints(0),
        lora_ranks=ints(r),
        scalings=torch.tensor([SCALING], device=t.device),
    )
    a = a[None].contiguous()
    b = b[None].contiguous()

    def layer(x):
        h = sgemm_lora_a_fwd(x, a, info)
        return sgemm_lora_b_fwd(h, b, info, functional.linear(x, w))

    return layer, []


def flashinfer(t: Problem, w, a, b):
    from flashinfer.gemm import SegmentGEMMWrapper

    for_serving(t)
    gemm = SegmentGEMMWrapper(torch.empty(128 << 20, dtype=torch.int8, device=t.device))
    ends = torch.tensor(
        [0, t.shape[0]],
        dtype=torch.int64,
        device=t.device,
    )
    a = a[None].contiguous()
    b = (SCALING * b)[None].contiguous()

    def layer(x):
        h = gemm.run(x, a, 1, True, seg_indptr=ends)
        return functional.linear(x, w) + gemm.run(h, b, 1, True, seg_indptr=ends)

    return layer, []


def without_dropout(t):
    if t.p:
        raise Absent("its fast path has no dropout")
    if t.few:
        raise Absent("it is made for training")


def for_serving(t):
    if not t.few:
        raise Absent("it is made for serving, and has no backward")


# Each package changes torch for its whole process, so each has a process of its own. A label is
# also the name of the package.
GPU = {
    "unsloth": unsloth,
    "axolotl": axolotl,
    "lorafusion": lorafusion,
    "vllm": vllm,
    "sglang": sglang,
    "flashinfer": flashinfer,
}
