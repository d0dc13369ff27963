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

    The patch is the elements to which taking away what was added does not lead back.

    Attributes:
        delta: what was added.
        transposed: whether the weight is stored as (k, n).
        checksum: of the merged weight.
        copy: the weight before, as it is stored, or None where there is a patch.
        index: of the elements that the patch holds, in the flattened weight as it is stored.
        values: of these elements.
    """

    delta: Delta
    transposed: bool
    checksum: Tensor
    copy: Tensor | None = None
    index: Tensor | None = None
    values: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The weight's."""
        kept = self.values if self.copy is None else self.copy
        assert kept is not None
        return kept.dtype

    @property
    def nbytes(self) -> int:
        """How much memory it takes."""
        kept = [t for t in (self.copy, self.index, self.values) if t is not None]
        return self.delta.nbytes + sum(t.nbytes for t in kept)


@explained("merge", weight=tensor, factors=factors_fault)
@torch.no_grad()
def merge_lora_(
    weight: Tensor,
    factors: Factors,
    *,
    magnitudes: Sequence[Tensor | None] | None = None,
    record: MergeRecord | None = None,
) -> MergeRecord:
    """Makes weight what merge_lora would return, in place.

    Args:
        weight: (n, k), in fp32, bf16 or fp16.
        factors: as for merge_lora, like magnitudes. They are copied, so they may change afterwards.
        record: of adapters that are merged into the weight already, and stay so. The result is that
            of merging all of them into the weight before, in one rounding.

    Returns:
        The record with which unmerge_lora_ brings every bit back. For adapters whose delta is a
        percent of the weight it takes about 2 % of the weight's memory, beside the adapters.

    Raises:
        ValueError: as merge_lora, like TypeError; or somebody changed the weight since the record
            was made. The weight is unchanged then.
    """
    merged, new = merged_with_record(weight.detach(), factors, magnitudes, record)
    stored = weight.detach()
    (stored.T if new.transposed else stored).copy_(merged)
    return new


def merged_with_record(
    weight: Tensor,
    factors: Factors,
    magnitudes: Sequence[Tensor | None] | None,
    record: MergeRecord | None,
) -> tuple[Tensor, MergeRecord]:
    """What merge_lora_ makes of a weight, laid out as it is stored, and its record."""
    base = Base.of(weight)
    if record is not None:
        base = base._replace(tensors=[original(weight, record)])
    (stored,) = base.tensors
    delta = delta_of(base, factors, magnitudes)
    if record is not None:
        delta = record.delta.to(weight.device).joined(delta)
    merged, lost = add(base, delta, weight.dtype, undo=True)
    turned = base.form == "transposed"
    plain = MergeRecord(delta, turned, checksum(merged))
    index = positions(lost, stored.shape[1])
    values = stored.flatten()[index]
    if index.nbytes + values.nbytes < stored.nbytes:
        return merged, plain._replace(index=index, values=values)
    return merged, plain._replace(copy=stored.clone())


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
    before = original(weight, record)
    (weight.T if record.transposed else weight).copy_(before)


def unchanged(weight: Tensor, record: MergeRecord) -> bool:
    """Whether a weight is what it was when it was merged."""
    stored = weight.T if record.transposed else weight
    if stored.dtype is not record.dtype:
        return False
    return torch.equal(checksum(stored), record.checksum.to(weight.device))


def original(weight: Tensor, record: MergeRecord) -> Tensor:
    """The weight before it was merged, laid out as it is stored.

    Raises:
        ValueError: somebody changed the weight since.
    """
    if not unchanged(weight, record):
        raise ValueError("merge: weight must be as merged, but it was changed since")
    device = weight.device
    if record.copy is not None:
        return record.copy.to(device)
    stored = weight.T if record.transposed else weight
    back = merge_undo(stored, *record.delta.to(device), transposed=record.transposed)
    assert record.index is not None
    assert record.values is not None
    back.view(-1)[record.index.to(device)] = record.values.to(device)
    return back


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
