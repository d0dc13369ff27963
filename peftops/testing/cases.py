"""Named inputs of every op, for doctor, tests and bench.

CASES maps the name of an op to a function of (shape, dtype, device), which yields its cases:
(label, list of the op's arguments). Shapes are (m, k, n, r). Values are the same each time.
"""

import inspect
from collections.abc import Callable, Iterator

import torch

import peftops.ops.dora_contract
import peftops.ops.merge_contract
import peftops.ops.multi_contract  # noqa: F401  registers the ops of multi-LoRA
from peftops._op import CONTRACTS
from peftops.ops.lora_base import mask_bytes, wide_dtype
from peftops.ops.nf4_tables import bounds, eight_bits, four_bits

from . import merge_cases, multi_cases

Cases = Iterator[tuple[str, list]]

SHAPES = [
    (1, 1, 1, 1),
    (0, 16, 24, 4),
    (37, 96, 130, 5),
    (5, 133, 33, 20),
    (70, 64, 48, 16),
    (3, 72, 88, 40),
    (9, 64, 40, 0),
]
VARIANTS = {  # arguments of `lora` for what differs from a plain dense layer
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


SEED = 0x123456789ABCDEF


def lora(
    m: int,
    k: int,
    n: int,
    r: int,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    form: str = "dense",
    p: float = 0.0,
    fp32: bool = False,
    bias: bool = False,
    gain: bool = False,
    experts: int = 0,
    shared: bool = False,
    block: int = 64,
    nested: bool = False,
) -> dict:
    """Every argument of LoRA's ops, forward and backward, by its name.

    Args:
        m, k, n, r: sizes of x (m, k), of the weight (n, k) and of the adapter.
        dtype: of x and of all else that is not said to be in another.
        form: how the base is stored: "dense", "transposed", "given" or "nf4".
        p: probability of dropout.
        fp32: whether the adapter and the bias are in fp32.
        bias, gain: whether there is one.
        experts: how many experts gates choose from; 0 for no gates.
        shared: whether all experts share one a.
        block, nested: of an "nf4" base: elements of a scale, and whether scales are quantized.
    """
    generator = torch.Generator(device).manual_seed(m + k + n + r)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    wide = wide_dtype(dtype)
    narrow = torch.float32 if fp32 else dtype
    rb = r * max(1, experts)
    ra = r if shared else rb
    t = {"form": form, "block": block if form == "nf4" else 0, "p": p, "keep_z": gain}
    t["scale"] = torch.tensor([0.7], dtype=wide, device=device)
    t["seed"] = torch.tensor([SEED], device=device) if p else None
    t["need"] = [True, True, True, bias, gain, experts > 0]
    # From here on the order decides the values.
    t["bias"] = normal(n, dtype=narrow) if bias else None
    t["bits"] = random_bits(m, k if p else 0, generator, device)
    t["x"] = normal(m, k)
    if form == "nf4":
        t["base"] = nf4(n * k, block, nested, generator, wide, device)
    else:
        shape = {"dense": (n, k), "transposed": (k, n), "given": (m, n)}[form]
        t["base"] = [normal(*shape)]
    t["a"] = normal(ra, k, dtype=narrow)
    t["b"] = normal(n, rb, dtype=narrow)
    t["gain"] = normal(n, dtype=wide) if gain else None
    t["gate"] = normal(m, experts, dtype=wide).abs() if experts else None
    t["dy"] = normal(m, n)
    t["h"] = normal(m, ra)
    t["z"] = normal(m, n if gain else 0)
    return t


def random_bits(
    m,
    k,
    generator,
    device,
):
    """Bits of dropout for an (m, k) matrix: rows of whole 32-bit words."""
    shape = m, mask_bytes(k)
    return torch.randint(256, shape, generator=generator, device=device).to(torch.uint8)


def nf4(
    size: int,
    block: int,
    nested: bool,
    generator: torch.Generator,
    wide: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> list[torch.Tensor]:
    """Codes and scales of a 4-bit weight of `size` elements, as the base of a LoRA op.

    Returns:
        [codes, table, absmax], or [codes, table, absmax8, nested_absmax, nested_table, offset]
        where scales are nested. All but codes and absmax8 are of the dtype `wide`.
    """

    def random(
        high,
        count,
        dtype,
    ):
        return torch.randint(high, (count,), generator=generator, device=device).to(
            dtype
        )

    blocks = -(-size // block)
    table = four_bits("nf4", torch.device(device)).to(wide)
    codes = random(256, -(-size // 2), torch.uint8)
    if not nested:
        return [codes, table, (random(1000, blocks, wide) + 1) / 1000]
    nested_table = eight_bits(torch.device(device)).to(wide)
    nested_absmax = (random(1000, -(-blocks // 256), wide) + 1) / 1000
    absmax8 = random(256, blocks, torch.uint8)
    offset = torch.tensor(0.7, dtype=wide, device=device)
    return [codes, table, absmax8, nested_absmax, nested_table, offset]


def names(contract: Callable) -> list[str]:
    """The arguments of an op, in order."""
    return [*inspect.signature(contract).parameters]


FWD = names(CONTRACTS["lora_fwd"])
GEMV = names(CONTRACTS["lora_gemv"])
BWD = names(CONTRACTS["lora_bwd"])
NORM = names(CONTRACTS["dora_norm"])
NORM_BWD = names(CONTRACTS["dora_norm_bwd"])
STORED = "form", "fp32", "block", "nested"  # of a weight and its adapter
NORMS = (
    "plain",
    "transposed",
    "nf4",
    "nf4-few",
    "nf4-nested",
)  # variants that a norm can tell


def arguments(names: list[str], dropout: bool = True) -> Callable[..., Cases]:
    """The cases of an op of LoRA that has these arguments. Without dropout there are fewer."""

    def make(
        shape,
        dtype,
        device="cpu",
    ):
        for label, options in VARIANTS.items():
            if options.get("p") and not dropout:
                continue
            if options.get("experts") and shape[3] == 0:
                continue
            tensors = lora(*shape, dtype, device, **options)
            yield label, [tensors[name] for name in names]

    return make


def mixed(op: str, dropout: bool = True) -> Callable[..., Cases]:
    """The cases of an op of multi-LoRA. Without dropout there are fewer."""

    def make(
        shape,
        dtype,
        device="cpu",
    ):
        for label, options in multi_cases.VARIANTS.items():
            p = options.get("p", 0.0)
            if p and not dropout:
                continue
            single = {key: value for key, value in options.items() if key != "route"}
            tensors = lora(*shape, dtype, device, **single)
            tensors = multi_cases.multi(tensors, options["route"], shape[3], p)
            yield label, [tensors[name] for name in names(CONTRACTS[op])]

    return make


def added(
    shape,
    dtype,
    device="cpu",
) -> Cases:
    """Cases of multi_add_."""
    for label in ("runs", "mixed", "base"):
        options = multi_cases.VARIANTS[label]
        fp32 = options.get("fp32", False)
        tensors = lora(*shape, dtype, device, fp32=fp32)
        tensors = multi_cases.multi(tensors, options["route"], shape[3], 0.0)
        tensors = multi_cases.parts(tensors)
        yield label, [tensors[name] for name in names(CONTRACTS["multi_add_"])]


def merged(op: str) -> Callable[..., Cases]:
    """The cases of an op of merging. Those that undo have no weight in 4 bits."""

    def make(
        shape,
        dtype,
        device="cpu",
    ):
        for label, options in merge_cases.VARIANTS.items():
            single = {name: options[name] for name in options if name in STORED}
            own = {name: options[name] for name in options if name not in STORED}
            tensors = lora(*shape, dtype, device, **single)
            undo = tensors["form"] != "nf4"
            if op == "merge_undo" and not undo:
                continue
            tensors = merge_cases.merge(tensors, **own)
            tensors |= {"dtype": dtype, "undo": undo, "w": tensors["base"][0]}
            yield label, [tensors[name] for name in names(CONTRACTS[op])]

    return make


def mask(
    shape,
    dtype,
    device="cpu",
) -> Cases:
    """Cases of lora_mask."""
    m, k, _, _ = shape
    for p in (0.0, 0.1, 1.0):
        yield f"p={p}", [torch.tensor([SEED], device=device), m, k, p]


def quantize(
    shape,
    dtype,
    device="cpu",
) -> Cases:
    """Weights whose rows may end within a block, and one that ends within a byte."""
    _, k, n, _ = shape
    for encoding, block in (("nf4", 64), ("nf4", 32), ("fp4", 128)):
        generator = torch.Generator(device).manual_seed(k + n)
        w = torch.randn(n * k, generator=generator, device=device).to(dtype)
        if encoding == "fp4":
            w[:block] *= 0
        yield f"{encoding}, {block}", [w, *bounds(four_bits(encoding, w.device)), block]


def dequantize(
    shape,
    dtype,
    device="cpu",
) -> Cases:
    """Weights with small and large blocks, and with nested scales."""
    _, k, n, _ = shape
    for block, nested in ((64, False), (64, True), (32, False), (4096, True)):
        generator = torch.Generator(device).manual_seed(k + n)
        codes, table, *scales = nf4(n * k, block, nested, generator, device=device)
        label = f"block={block}, nested" if nested else f"block={block}"
        yield label, [codes, table, scales, block, n * k, dtype]


def norms(names: list[str]) -> Callable[..., Cases]:
    """The cases of an op of DoRA's norm that has these arguments. Some norms are 0 or infinite."""

    def make(
        shape,
        dtype,
        device="cpu",
    ):
        for label in NORMS:
            tensors = lora(*shape, dtype, device, **VARIANTS[label])
            dn = torch.linspace(
                -1, 1, shape[2], dtype=tensors["scale"].dtype, device=device
            )
            n = dn.abs() + 1
            n[::7] = 0
            n[1::7] = float("inf")
            tensors |= {"dn": dn, "n": n, "need": [True, True]}
            yield label, [tensors[name] for name in names]

    return make


def drop(
    shape,
    dtype,
    device="cpu",
) -> Cases:
    """Cases of dora_drop."""
    for p in (0.1, 0.5, 1.0):
        tensors = lora(*shape, dtype, device, p=p)
        yield f"p={p}", [tensors["x"], tensors["seed"], p]


def mix(
    shape,
    dtype,
    device="cpu",
) -> Cases:
    """Cases of dora_mix, with one operand and with two."""
    for p in (0.1, 0.5, 1.0):
        tensors = lora(*shape, dtype, device, p=p)
        x, bits = tensors["x"], tensors["bits"]
        v = x.flip(0)  # before a test may let x require grad
        yield f"p={p}, one", [x, None, bits, p]
        yield f"p={p}", [x, v, bits, p]


CASES: dict[str, Callable[..., Cases]] = {
    "lora_fwd": arguments(FWD),
    "lora_bwd": arguments(BWD),
    "lora_gemv": arguments(GEMV, dropout=False),
    "lora_mask": mask,
    "multi_fwd": mixed("multi_fwd"),
    "multi_bwd": mixed("multi_bwd"),
    "multi_gemv": mixed("multi_gemv", dropout=False),
    "multi_add_": added,
    "merge_add": merged("merge_add"),
    "merge_undo": merged("merge_undo"),
    "dora_norm": norms(NORM),
    "dora_norm_bwd": norms(NORM_BWD),
    "dora_drop": drop,
    "dora_mix": mix,
    "nf4_quantize": quantize,
    "nf4_dequantize": dequantize,
}
