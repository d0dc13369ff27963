"""The specification of multi-LoRA's routes: which rows of the adapters a row of x meets."""

import torch

PAGE = 8  # rank-rows of a page


def each_row(values, slots, default):
    """values (S, ...) of each row's slot (m, ...), and `default` for a slot of -1."""
    none = values.new_full((1, *values.shape[1:]), default)
    return torch.cat([values, none])[slots]


def lines(table):
    """(S, 8P): the rank-rows of each slot's pages."""
    return (PAGE * table[:, :, None] + torch.arange(PAGE, device=table.device)).flatten(
        1
    )


def live(table, rank):
    """(S, 8P) bool: the rank-rows that are a slot's own."""
    return torch.arange(PAGE * table.shape[1], device=rank.device) < rank[:, None]


def paged(t, table, rank):
    """(S, 8P, columns): each slot's rows of t, and zeros beyond its rank."""
    alive = live(table, rank)
    return t[lines(table) * alive].masked_fill(~alive[:, :, None], 0)


def sum_by_slot(values, slots, slot_count):
    """(S, ...): the sum of values (m, ...) over the rows of each slot."""
    out = values.new_zeros(slot_count + 1, *values.shape[1:])
    return out.index_add_(0, slots % (slot_count + 1), values)[:-1]


def put(out, h, x, slots, table, rank):
    """out = Σ hᵀ·x over the rows of each slot, in the slot's rows, and zeros elsewhere."""
    sums = sum_by_slot(h[:, :, None] * x[:, None], slots, table.shape[0])
    alive = live(table, rank)
    out.zero_()
    out[lines(table)[alive]] = sums[alive].to(out.dtype)
