"""Merging in place, and the record that brings every bit of the weight back."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._arguments import explained, instance, tensor
from .lora_base import Base
from .merge import Delta, Factors, add, delta_of, factors_fault
from .merge_contract import merge_undo

WORDS = {2: torch.int16, 4: torch.int32}  # by the bytes of an element


class MergeRecord(NamedTuple):
    """What undoes a merge: the smaller of a copy of the weight, and a patch.

    The patch is what was added, and the elements to which rounding does not lead back.

    Attributes:
        copy: the weight before, as it is stored, or None where there is a patch.
        delta: what was added, or None where there is a copy.
        index: of the elements that the patch holds, in the flattened weight as it is stored.
        values: of these elements.
        transposed: whether the weight is stored as (k, n).
        checksum: of the merged weight.
    """

    copy: Tensor | None
    delta: Delta | None
    index: Tensor | None
    values: Tensor | None
    transposed: bool
    checksum: Tensor

    @property
    def nbytes(self) -> int:
        """How much memory it takes."""
        if self.copy is not None:
            return self.copy.nbytes
        return self.delta.nbytes + self.index.nbytes + self.values.nbytes


@explained("merge", weight=tensor, factors=factors_fault)
@torch.no_grad()
def merge_lora_(
    weight: Tensor,
    factors: Factors,
    *,
    magnitudes: Sequence[Tensor | None] | None = None,
) -> MergeRecord:
    """Makes weight what merge_lora would return, in place.

    Args:
        weight: (n, k), in fp32, bf16 or fp16.
        factors: as for merge_lora, like magnitudes. They are copied, so they may change afterwards.

    Returns:
        The record with which unmerge_lora_ brings every bit back. For adapters whose delta is a
        percent of the weight it takes about 2 % of the weight's memory, beside the adapters.

    Raises:
        ValueError, TypeError: as merge_lora; the weight is unchanged then.
    """
    base = Base.of(weight.detach())
    (stored,) = base.tensors
    delta = delta_of(base, factors, magnitudes)
    merged, lost = add(base, delta, weight.dtype, undo=True)
    index = positions(lost, stored.shape[1])
    values = stored.flatten()[index]
    turned = base.form == "transposed"
    record = MergeRecord(None, delta, index, values, turned, checksum(merged))
    if record.nbytes >= stored.nbytes:
        record = MergeRecord(stored.clone(), None, None, None, turned, record.checksum)
    stored.copy_(merged)
    return record


@explained("merge", weight=tensor, record=instance(MergeRecord))
@torch.no_grad()
def unmerge_lora_(weight: Tensor, record: MergeRecord) -> None:
    """Gives a weight the bits that it had before merge_lora_ returned this record.

    Args:
        weight: the merged weight. It may be on another device by now.
        record: what merge_lora_ returned.

    Raises:
        ValueError: somebody changed the weight since it was merged; it stays as it is.
    """
    weight = weight.detach()
    stored = weight.T if record.transposed else weight
    device = weight.device
    if not torch.equal(checksum(stored), record.checksum.to(device)):
        raise ValueError("merge: weight must be as merged, but it was changed since")
    if record.copy is not None:
        stored.copy_(record.copy)
        return
    back = merge_undo(stored, *record.delta.to(device), transposed=record.transposed)
    back.view(-1)[record.index.to(device)] = record.values.to(device)
    stored.copy_(back)


def positions(lost: Tensor, columns: int) -> Tensor:
    """Where bits are set, in the flattened matrix: int32 where that suffices.

    Args:
        lost: (rows, bytes) a bit for each column, the lowest first.
    """
    words = lost.view(torch.int32)
    rows, at = words.nonzero(as_tuple=True)
    shifts = torch.arange(32, device=lost.device, dtype=torch.int32)
    which, bit = (words[rows, at][:, None] >> shifts & 1).nonzero(as_tuple=True)
    index = rows[which] * columns + at[which] * 32 + bit
    fits = lost.shape[0] * columns < 2**31
    return index.to(torch.int32) if fits else index


def checksum(w: Tensor) -> Tensor:
    """A number (1,) that depends on each bit of a matrix, and on the order of its rows."""
    w = w.contiguous()
    word = WORDS[w.element_size()]
    if w.shape[1] * w.element_size() % 8 == 0 and w.data_ptr() % 8 == 0:
        word = torch.int64
    rows = w.view(word).sum(1, dtype=torch.int64)
    odd = torch.arange(1, 2 * len(rows), 2, device=w.device)
    return (rows * odd).sum()[None]
