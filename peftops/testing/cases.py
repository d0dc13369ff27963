"""Named inputs, for doctor, tests and bench. A case yields (label, arguments of the op)."""

import torch

from peftops.ops.nf4_tables import bounds, eight_bits, four_bits

SHAPES = [
    (1, 1, 1, 1),
    (0, 16, 24, 4),
    (37, 96, 130, 5),
    (5, 133, 33, 20),
    (70, 64, 48, 16),
    (3, 72, 88, 40),
    (9, 64, 40, 0),
]  # m, k, n, r
VARIANTS = {  # what differs from a plain dense layer
    "plain": {},
    "dropout": {"p": 0.3, "bias": True},
    "all-dropped": {"p": 1.0},
    "transposed": {"form": "transposed", "fp32": True, "bias": True},
    "given": {"form": "given", "gain": True, "bias": True, "p": 0.1},
    "gain": {"gain": True, "bias": True},
    "transposed-gain": {"form": "transposed", "gain": True, "p": 0.1},
    "experts": {"experts": 3, "p": 0.5},
    "nf4": {"form": "nf4", "fp32": True, "bias": True, "p": 0.1},
    "nf4-few": {"form": "nf4", "block": 32},
    "nf4-nested": {"form": "nf4", "nested": True, "gain": True},
    "nf4-experts": {"form": "nf4", "nested": True, "block": 128, "experts": 2},
    "shared-a": {"experts": 2, "shared": True, "fp32": True},
}


def lora(
    m, k, n, r, dtype, device="cpu", form="dense", p=0.0, fp32=False, bias=False, gain=False, experts=0, shared=False,
    block=64, nested=False,
):  # fmt: skip
    """Every tensor of the row, by its name."""
    generator = torch.Generator(device).manual_seed(m + k + n + r)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    wide = torch.promote_types(dtype, torch.float32)
    narrow = torch.float32 if fp32 else dtype
    rb = r * max(1, experts)
    ra = r if shared else rb
    biased = normal(n, dtype=narrow) if bias else None
    bits = torch.randint(
        256, (m, 4 * -(-k // 32) if p else 0), generator=generator, device=device
    ).to(torch.uint8)
    x = normal(m, k)
    if form == "nf4":
        base = nf4(n * k, block, nested, generator, wide, device)
    else:
        base = [normal(*{"dense": (n, k), "transposed": (k, n), "given": (m, n)}[form])]
    return {
        "x": x, "base": base, "a": normal(ra, k, dtype=narrow), "b": normal(n, rb, dtype=narrow),
        "scale": torch.tensor([0.7], dtype=wide, device=device), "bias": biased,
        "gain": normal(n, dtype=wide) if gain else None,
        "gate": normal(m, experts, dtype=wide).abs() if experts else None,
        "seed": torch.tensor([0x123456789ABCDEF], device=device) if p else None,
        "form": form, "block": block if form == "nf4" else 0, "p": p, "keep_z": gain,
        "dy": normal(m, n), "h": normal(m, ra), "bits": bits, "z": normal(m, n if gain else 0),
        "need": [True, True, True, bias, gain, experts > 0],
    }  # fmt: skip


def nf4(size, block, nested, generator, wide=torch.float32, device="cpu"):
    """Codes and scales of a weight of this many elements, as a lora op takes them."""

    def random(high, count, dtype):
        return torch.randint(high, (count,), generator=generator, device=device).to(dtype)

    blocks = -(-size // block)
    table = four_bits("nf4", torch.device(device)).to(wide)
    codes = random(256, -(-size // 2), torch.uint8)
    if not nested:
        return [codes, table, (random(1000, blocks, wide) + 1) / 1000]
    eight = eight_bits(torch.device(device)).to(wide)
    groups = (random(1000, -(-blocks // 256), wide) + 1) / 1000
    return [
        codes,
        table,
        random(256, blocks, torch.uint8),
        groups,
        eight,
        torch.tensor(0.7, dtype=wide, device=device),
    ]


FWD = [
    "x",
    "base",
    "a",
    "b",
    "scale",
    "bias",
    "gain",
    "gate",
    "seed",
    "form",
    "block",
    "p",
    "keep_z",
]
GEMV = ["x", "base", "a", "b", "scale", "bias", "gain", "gate", "form", "block"]
BWD = [
    "dy",
    "x",
    "base",
    "a",
    "b",
    "scale",
    "h",
    "bits",
    "bias",
    "gain",
    "gate",
    "z",
    "form",
    "block",
    "p",
    "need",
]


NORM = ["x", "base", "a", "b", "scale", "form", "block"]


def arguments(names, dropout=True):
    def make(shape, dtype, device="cpu"):
        for label, options in VARIANTS.items():
            ranked = shape[3] or not options.get("experts")
            if ranked and (dropout or not options.get("p")):
                tensors = lora(*shape, dtype, device, **options)
                yield label, [tensors[name] for name in names]

    return make


def mask(shape, dtype, device="cpu"):
    for p in (0.0, 0.1, 1.0):
        yield (
            f"p={p}",
            [torch.tensor([0x123456789ABCDEF], device=device), shape[0], shape[1], p],
        )


def quantize(shape, dtype, device="cpu"):
    """Weights whose rows may end within a block, and one that ends within a byte."""
    _, k, n, _ = shape
    for encoding, block in (("nf4", 64), ("nf4", 32), ("fp4", 128)):
        generator = torch.Generator(device).manual_seed(k + n)
        w = torch.randn(n * k, generator=generator, device=device).to(dtype)
        w[:block] *= 0 if encoding == "fp4" else 1
        yield f"{encoding}, {block}", [w, *bounds(four_bits(encoding, w.device)), block]


def dequantize(shape, dtype, device="cpu"):
    _, k, n, _ = shape
    for block, nested in ((64, False), (64, True), (32, False), (4096, True)):
        generator = torch.Generator(device).manual_seed(k + n)
        codes, table, *scales = nf4(n * k, block, nested, generator, device=device)
        yield (
            f"block={block}{', nested' if nested else ''}",
            [codes, table, scales, block, n * k, dtype],
        )


# Variants that a norm can tell from each other.
NORMS = ("plain", "transposed", "nf4", "nf4-few", "nf4-nested")


def norms(names):
    def make(shape, dtype, device="cpu"):
        for label in NORMS:
            tensors = lora(*shape, dtype, device, **VARIANTS[label])
            dn = torch.linspace(-1, 1, shape[2], dtype=tensors["scale"].dtype, device=device)
            n = dn.abs() + 1
            n[::7], n[1::7] = 0, float("inf")
            tensors |= {"dn": dn, "n": n, "need": [True, True]}
            yield label, [tensors[name] for name in names]

    return make


def drop(shape, dtype, device="cpu"):
    for p in (0.1, 0.5, 1.0):
        tensors = lora(*shape, dtype, device, p=p)
        yield f"p={p}", [tensors["x"], tensors["seed"], p]


def mix(shape, dtype, device="cpu"):
    for p in (0.1, 0.5, 1.0):
        tensors = lora(*shape, dtype, device, p=p)
        for label, v in ((", one", None), ("", tensors["x"].flip(0))):
            yield f"p={p}{label}", [tensors["x"], v, tensors["bits"], p]


CASES = {
    "lora_fwd": arguments(FWD),
    "lora_bwd": arguments(BWD),
    "lora_gemv": arguments(GEMV, dropout=False),
    "lora_mask": mask,
    "dora_norm": norms(NORM),
    "dora_norm_bwd": norms(["dn", "n", *NORM, "need"]),
    "dora_drop": drop,
    "dora_mix": mix,
    "nf4_quantize": quantize,
    "nf4_dequantize": dequantize,
}
