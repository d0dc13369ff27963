"""How adapters get into the pages of pools: many small matrices at once, in compiled code.

On a GPU, and for dtypes that the kernels do not know, torch copies them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .multi_contract import PAGE

try:
    from .._C import cpu as _C
except ImportError:  # without the compiled extension torch copies
    _C = None

DTYPES = torch.float32, torch.bfloat16, torch.float16


class Put(NamedTuple):
    """An adapter of one layer, and the pools that get it.

    Attributes:
        a, b: the layer's pools (R, k) and (R, n).
        lora_A, lora_B: (r, k) and (n, r).
    """

    a: Tensor
    b: Tensor
    lora_A: Tensor
    lora_B: Tensor


def put(puts: Sequence[Put], pages: Sequence[int]) -> None:
    """Copies adapters into these pages of their pools, lora_B turned, in the pools' dtype."""
    each_a, each_b, lora_A, lora_B = zip(*puts, strict=True)
    if not (compiled([*each_a, *each_b]) and compiled([*lora_A, *lora_B])):
        put_by_torch(puts, pages)
        return
    addresses = [map(Tensor.data_ptr, ts) for ts in (each_a, each_b, lora_A, lora_B)]
    sizes = [(a.shape[1], *b.shape) for a, b in zip(lora_A, lora_B, strict=True)]
    jobs = [(*at, *size) for *at, size in zip(*addresses, sizes, strict=True)]
    _C.multi_put(
        each_a[0],
        lora_A[0],
        torch.tensor(jobs, dtype=torch.int64),
        torch.tensor(pages, dtype=torch.int32),
    )


def put_by_torch(puts: Sequence[Put], pages: Sequence[int]) -> None:
    """The same by torch's copies: from the host to a GPU, all in one piece of pinned memory."""
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for each in puts:
        for pool, matrix in (each.a, each.lora_A), (each.b, each.lora_B.T):
            for place, rows in stretches(pages, matrix.shape[0]):
                targets.append(pool[place : place + len(rows)])
                sources.append(matrix[rows.start : rows.stop])
    dtype = targets[0].dtype
    device = targets[0].device
    if (
        device.type == "cuda"
        and all(target.dtype is dtype for target in targets)
        and not any(source.is_cuda for source in sources)
    ):
        blob = torch.empty(
            sum(target.numel() for target in targets), dtype=dtype, pin_memory=True
        )
        torch._foreach_copy_(pieces_like(blob, targets), sources)
        sources = pieces_like(blob.to(device, non_blocking=True), targets)
    torch._foreach_copy_(targets, sources)


def stretches(pages: Sequence[int], rank: int) -> list[tuple[int, range]]:
    """(row of a pool, rank-rows that begin there) for each run of pages that lie together."""
    runs: list[tuple[int, range]] = []
    for start, page in zip(range(0, rank, PAGE), pages, strict=False):
        stop = min(start + PAGE, rank)
        if runs and runs[-1][0] + len(runs[-1][1]) == PAGE * page:
            runs[-1] = runs[-1][0], range(runs[-1][1].start, stop)
        else:
            runs.append((PAGE * page, range(start, stop)))
    return runs


def pieces_like(blob: Tensor, shapes: Sequence[Tensor]) -> list[Tensor]:
    """The consecutive pieces of a tensor, in the shapes of these."""
    pieces = blob.split([t.numel() for t in shapes])
    return [piece.view(t.shape) for piece, t in zip(pieces, shapes, strict=True)]


def not_finite(tensors: Sequence[Tensor]) -> int | None:
    """The place of the first tensor that holds NaN or infinity, or None."""
    if compiled(tensors):
        finite = torch.empty(len(tensors), dtype=torch.bool)
        pieces = [(t.data_ptr(), t.numel()) for t in tensors]
        _C.multi_finite(finite, tensors[0], torch.tensor(pieces, dtype=torch.int64))
        answers = finite.tolist()
    else:
        answers = [bool(torch.isfinite(t).all()) for t in tensors]
    return None if all(answers) else answers.index(False)


def compiled(tensors: Sequence[Tensor]) -> bool:
    """Whether compiled code may read these: on a CPU, contiguous, of one dtype that it knows."""
    if _C is None or not tensors or tensors[0].dtype not in DTYPES:
        return False
    dtype = tensors[0].dtype
    return all([t.dtype is dtype and t.is_cpu and t.is_contiguous() for t in tensors])
