"""The specification of the frozen product, in each form that a base may have."""

from .nf4 import decode


def matrix(base, form, block, n, k):
    """Ŵ (n, k), not yet rounded to x's dtype; for "given", the product itself."""
    if form == "nf4":
        return decode(base, block, n * k).view(n, k)
    return base[0].T if form == "transposed" else base[0]


def product(x, w, form):
    """x·Ŵᵀ"""
    return w if form == "given" else x @ w.T
