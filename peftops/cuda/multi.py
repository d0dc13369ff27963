"""Multi-LoRA's forward for few rows in CUDA C++: the products of lora.py, with an adapter a row."""

import torch

from .._C import cuda as _C
from .._replay import noted
from . import _device
from .lora import describe, operands

PAGE = 8  # rank-rows


def multi_gemv(
    y,
    x,
    base,
    a,
    b,
    slots,
    table,
    rank,
    scale,
    bias,
    gain,
    form,
    block,
):
    if not y.numel():
        return
    m, k, n = *x.shape, b.shape[1]
    width = PAGE * table.shape[1]
    product = describe("lora_gemv", x, m, n, k, width, form)
    w, scales, given = operands(y, x, base, product, form, block)
    noted(
        _C.multi_gemv,
        y,
        x.new_empty(m, width, dtype=torch.float32),
        x,
        w,
        *scales,
        a,
        b,
        slots,
        table,
        rank,
        scale,
        bias,
        gain,
        block,
        given,
        _device.processors(x.device),
        _device.stream(x.device),
    )
