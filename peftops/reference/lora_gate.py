"""The specification of the gate: a router's weight for each expert, by which h is multiplied."""


def repeat(h, b):
    """(m, e·r): h once for each expert."""
    return h.repeat(1, b.shape[1] // h.shape[1])


def spread(h, gate, b):
    """(m, e·r): for each expert, h times the expert's gate."""
    if gate is None:
        return h
    return repeat(h, b) * gate.repeat_interleave(b.shape[1] // gate.shape[1], 1)


def fold(dhg, gate, a, b):
    """(m, r): the transpose of spread, each expert's columns times its gate, summed."""
    if gate is None:
        return dhg
    return spread(dhg, gate, b).unflatten(1, (-1, a.shape[0])).sum(1)
