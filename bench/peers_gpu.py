"""Packages with LoRA kernels for GPUs, as peers.

Each function takes a problem, a weight W and the factors A and B. It returns a layer(x) and the
list of tensors that the layer trains.
"""

import inspect

import torch
from torch.nn import functional

from .problem import SCALING, Absent, Problem

CHUNK = 16  # rows at most of one adapter in SGLang's segments, by its default


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


def lorafusion_multi(t: Problem, w, a, b):
    """Its layer for a batch in which each adapter has one run of whole blocks of rows."""
    if t.few:
        raise Absent("it is made for training")
    if t.adapters > 4:
        raise Absent("it takes at most 4 adapters")
    if t.p:
        raise Absent("it drops the frozen weight's input, not the adapters'")
    if t.samples != t.adapters:
        raise Absent("it wants the rows of each adapter in one run")
    from lorafusion.ops.multi_lora import (
        fused_linear_multi_lora,
        prepare_multi_lora_batch_info,
    )
    from lorafusion.ops.triton_ops.config import get_lora_kernel_config

    info = prepare_multi_lora_batch_info(
        seq_len_list=[t.shape[0] // t.adapters] * t.adapters,
        lora_idx_list=t.slots,
        lora_rank_list=t.ranks,
        dropout_p_list=[t.p] * t.adapters,
        alpha_list=[SCALING] * t.adapters,
        block_size_m=get_lora_kernel_config("fused_multi_lora_block_size_m"),
        output_dtype=t.dtype,
    )
    if info.padded_seq_len_list != info.seq_len_list:
        raise Absent(f"it wants runs of whole blocks of {info.block_size_m} rows")
    each_a = [leaf(a[slot, :rank]) for slot, rank in enumerate(t.ranks)]
    each_b = [leaf(b[slot, :, :rank]) for slot, rank in enumerate(t.ranks)]

    def layer(x):
        y = fused_linear_multi_lora(
            x.reshape(1, t.shape[0], -1),
            w,
            lora_a_list=list(each_a),  # it pads the lists in place
            lora_b_list=list(each_b),
            seq_len_list=info.seq_len_list,
            padded_seq_len_list=info.padded_seq_len_list,
            block_to_lookup_table=info.block_to_lookup_table,
            block_to_dropout_p=info.block_to_dropout_p,
            block_to_alpha=info.block_to_alpha,
            enable_dropout=info.enable_dropout,
            same_dropout_p_value=info.same_dropout_p_value,
            max_r=info.max_r,
        )
        return y.view(*x.shape[:-1], -1)

    return layer, [*each_a, *each_b]


def leaf(values):
    """A contiguous copy that wants a gradient."""
    return values.clone(memory_format=torch.contiguous_format).requires_grad_()


def vllm(t: Problem, w, a, b):
    on_gpu = t.device.type == "cuda"
    return serving(t, w, a, b, vllm_triton if on_gpu else vllm_torch)


def vllm_triton(t: Problem, a, b, slots):
    """Its kernels for GPUs, see serving()."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    if t.dtype == torch.float32:
        raise Absent("its kernels are for 16 bits")
    m = t.shape[0]
    r = t.shape[3]
    meta = LoRAKernelMeta.make(t.adapters, m, device=t.device)
    meta.prepare_tensors(slots.int())
    several = len(inspect.signature(meta.meta_args).parameters) > 1
    args = meta.meta_args(m, True) if several else meta.meta_args(m)

    def add(y, x):
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

    return add


def vllm_torch(t: Problem, a, b, slots):
    """What it has for the decode of a CPU, see serving()."""
    from vllm.lora.ops.torch_ops import bgmv_expand_slice, bgmv_shrink

    m, _, n, r = t.shape

    def add(y, x):
        h = torch.zeros((m, r), dtype=torch.float32, device=x.device)
        bgmv_shrink(x, a, h, slots, SCALING)
        bgmv_expand_slice(
            h,
            b,
            y,
            slots,
            0,
            n,
            add_inputs=True,
        )

    return add


def sglang(t: Problem, w, a, b):
    return serving(t, w, a, b, csgmv)


def csgmv(t: Problem, a, b, slots):
    """SGLang's default backend: chunks of rows of one adapter, see serving()."""
    from sglang.srt.lora.utils import LoRABatchInfo

    try:
        from sglang.kernels.ops.lora.dense.chunked_sgmv_expand import (
            chunked_sgmv_lora_expand_forward,
        )
        from sglang.kernels.ops.lora.dense.chunked_sgmv_shrink import (
            chunked_sgmv_lora_shrink_forward,
        )
    except ImportError:
        from sglang.srt.lora.triton_ops import (
            chunked_sgmv_lora_expand_forward,
            chunked_sgmv_lora_shrink_forward,
        )

    def ints(values):
        return torch.tensor(values, dtype=torch.int32, device=t.device)

    m, _, n, _ = t.shape
    starts, adapters = chunks(slots)
    info = LoRABatchInfo(
        use_cuda_graph=False,
        bs=m,
        num_segments=len(adapters),
        max_len=CHUNK,
        seg_lens=None,
        permutation=slots.argsort(stable=True).int(),
        seg_indptr=ints(starts),
        weight_indices=ints(adapters),
        lora_ranks=ints(t.ranks),
        scalings=torch.tensor([SCALING] * t.adapters, device=t.device),
    )
    outputs = ints([0, n])

    def add(y, x):
        h = chunked_sgmv_lora_shrink_forward(x, a, info, 1)
        chunked_sgmv_lora_expand_forward(
            h,
            b,
            info,
            outputs,
            n,
            y,
        )

    return add


def chunks(slots):
    """(starts, adapters) of chunks of the rows sorted by adapter; starts has the end too."""
    starts = [0]
    adapters = []
    for adapter, left in enumerate(slots.bincount().tolist()):
        while left > 0:
            starts.append(starts[-1] + min(left, CHUNK))
            adapters.append(adapter)
            left -= CHUNK
    return starts, adapters


def serving(t: Problem, w, a, b, prepare):
    """A layer of one adapter or of several, without backward.

    Args:
        prepare: takes t, the stacked A and B and each row's adapter. It returns add(y, x), which
            adds the adapters' products to rows.
    """
    for_serving(t)
    if t.samples:
        tokens = t.shape[0] // t.samples
        slots = torch.tensor(t.slots, device=t.device).repeat_interleave(tokens)
    else:
        a = a[None]
        b = b[None]
        slots = torch.zeros(t.shape[0], dtype=torch.int64, device=t.device)
    add = prepare(t, a, b, slots)

    def layer(x):
        rows = x.flatten(0, -2)
        y = functional.linear(rows, w)
        add(y, rows)
        return y.view(*x.shape[:-1], -1)

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
MIXING = {  # those whose batches mix adapters
    "lorafusion": lorafusion_multi,
    "vllm": vllm,  # on a CPU too
    "sglang": sglang,
}
