"""The specification of the frozen product, in each form that a base may have."""


def product(x, w, form):
    return w if form == "given" else x @ (w if form == "transposed" else w.T)


def product_bwd(dz, base, form):
    return 0 if form == "given" else dz @ (base[0].T if form == "transposed" else base[0])
