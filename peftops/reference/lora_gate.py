"""The specification of the gate: how a router weighs what each expert makes of h."""


def repeat(h, b):
    return h.repeat(1, b.shape[1] // h.shape[1])


def spread(h, gate, b):
    """(m, e·r): each expert's columns of h times its gate"""
    return (
        h
        if gate is None
        else repeat(h, b) * gate.repeat_interleave(b.shape[1] // gate.shape[1], 1)
    )


def fold(dhg, gate, a, b):
    """(m, r): the transpose of spread"""
    return dhg if gate is None else spread(dhg, gate, b).unflatten(1, (-1, a.shape[0])).sum(1)
