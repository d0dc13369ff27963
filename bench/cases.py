"""Named inputs, for tests and bench alike. A case yields (label, arguments of the op)."""

import torch

SHAPES = [
    (1, 1, 1, 1),
    (0, 16, 24, 4),
    (37, 96, 130, 5),
    (5, 133, 33, 20),
    (70, 64, 48, 16),
    (3, 72, 88, 40),
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
    "shared-a": {"experts": 2, "shared": True, "fp32": True},
}


def lora(
    m, k, n, r, dtype, device="cpu", form="dense", p=0.0, fp32=False, bias=False, gain=False, experts=0, shared=False
):
    """Every tensor of the row, by its name."""
    generator = torch.Generator(device).manual_seed(m + k + n + r)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    wide, narrow = torch.promote_types(dtype, torch.float32), torch.float32 if fp32 else dtype
    ra, rb = (r if shared else r * max(1, experts)), r * max(1, experts)
    base = {"dense": (n, k), "transposed": (k, n), "given": (m, n)}[form]
    biased = normal(n, dtype=narrow) if bias else None
    bits = torch.randint(256, (m, 4 * -(-k // 32) if p else 0), generator=generator, device=device).to(torch.uint8)
    return {
        "x": normal(m, k), "base": [normal(*base)], "a": normal(ra, k, dtype=narrow), "b": normal(n, rb, dtype=narrow),
        "scale": torch.tensor([0.7], dtype=wide, device=device), "bias": biased,
        "gain": normal(n, dtype=wide) if gain else None,
        "gate": normal(m, experts, dtype=wide).abs() if experts else None,
        "seed": torch.tensor([0x123456789ABCDEF], device=device) if p else None,
        "form": form, "block": 0, "p": p, "keep_z": gain,
        "dy": normal(m, n), "h": normal(m, ra), "bits": bits, "z": normal(m, n if gain else 0),
        "need": [True, True, True, bias, gain, experts > 0],
    }  # fmt: skip


FWD = ["x", "base", "a", "b", "scale", "bias", "gain", "gate", "seed", "form", "block", "p", "keep_z"]
GEMV = ["x", "base", "a", "b", "scale", "bias", "gain", "gate", "form", "block"]
BWD = ["dy", "x", "base", "a", "b", "scale", "h", "bits", "bias", "gain", "gate", "z", "form", "block", "p", "need"]


def arguments(names, dropout=True):
    def make(shape, dtype, device="cpu"):
        for label, options in VARIANTS.items():
            if dropout or not options.get("p"):
                tensors = lora(*shape, dtype, device, **options)
                yield label, [tensors[name] for name in names]

    return make


def mask(shape, dtype, device="cpu"):
    for p in (0.0, 0.1, 1.0):
        yield f"p={p}", [torch.tensor([0x123456789ABCDEF], device=device), shape[0], shape[1], p]


CASES = {
    "lora_fwd": arguments(FWD),
    "lora_bwd": arguments(BWD),
    "lora_gemv": arguments(GEMV, dropout=False),
    "lora_mask": mask,
}
