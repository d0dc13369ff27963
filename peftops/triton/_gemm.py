"""What the host decides before a launch: tiles for this GPU, and which product is the fastest.

The tables are keyed by architecture. An NVIDIA GPU that has no key of its own uses "sm_86", whose
GPUs have the least shared memory. "interpret" is Triton's interpreter, for tests.
"""

import functools

import torch
import triton

from ._launch import cdiv, power_of_2

INTERPRET = triton.knobs.runtime.interpret
ARCHS = {  # compute capability -> key of the tables
    (8, 0): "sm_80",
    (9, 0): "sm_90",
    (10, 0): "sm_100",
    (10, 3): "sm_100",
    (11, 0): "sm_100",
}
SHARED = {  # bytes of shared memory that a program may use
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "gfx942": 65536,
}


def tile(warps: int, stages: int, **sizes: int) -> dict:
    """The options of a launch: block sizes such as BM, warps and pipeline stages."""
    return {**sizes, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def gemm(bm: int, bn: int, bk: int, warps: int, stages: int) -> dict:
    """The tile of a matrix product: (bm, bn) of the result, bk of the sum at a time."""
    return tile(warps, stages, BM=bm, BN=bn, BK=bk)


# Tiles of 16-bit products, the largest first. The first that gives every multiprocessor a
# program is taken.
TILES = {
    "sm_80": (
        gemm(128, 128, 64, 8, 4),
        gemm(64, 128, 64, 4, 4),
        gemm(64, 64, 64, 4, 4),
    ),
    # also 8.9 and 12.0
    "sm_86": (
        gemm(128, 128, 64, 8, 3),
        gemm(64, 128, 64, 4, 3),
        gemm(64, 64, 64, 4, 3),
    ),
    "sm_90": (
        gemm(128, 256, 64, 8, 3),
        gemm(128, 128, 64, 8, 3),
        gemm(64, 128, 64, 4, 4),
    ),
    "sm_100": (gemm(128, 128, 64, 8, 4), gemm(64, 128, 64, 4, 4)),
    "gfx942": (
        gemm(128, 128, 64, 8, 2),
        gemm(64, 128, 64, 4, 2),
        gemm(64, 64, 64, 4, 2),
    ),
    "interpret": (gemm(32, 32, 32, 4, 1),),
}
# Tiles of products with 4-bit weights. They stay tall, since a tile of the weight costs the same
# instructions to decode whatever the number of rows.
NF4_TILES = {
    "sm_80": (
        gemm(128, 128, 64, 8, 3),
        gemm(128, 64, 64, 8, 3),
        gemm(64, 64, 64, 4, 3),
    ),
    "sm_86": (
        gemm(128, 128, 64, 8, 3),
        gemm(128, 64, 64, 8, 3),
        gemm(64, 64, 64, 4, 3),
    ),
    "sm_90": (
        gemm(128, 128, 64, 8, 3),
        gemm(128, 64, 64, 8, 3),
        gemm(64, 64, 64, 4, 3),
    ),
    "sm_100": (
        gemm(128, 128, 64, 8, 3),
        gemm(128, 64, 64, 8, 3),
        gemm(64, 64, 64, 4, 3),
    ),
    "gfx942": (
        gemm(128, 128, 64, 8, 2),
        gemm(128, 64, 64, 8, 2),
        gemm(64, 64, 64, 4, 2),
    ),
    "interpret": (gemm(32, 32, 32, 4, 1),),
}
EPILOGUE = {  # tiles of a pass over y or dx, by bytes an element
    2: gemm(64, 128, 64, 4, 1),
    4: gemm(32, 64, 32, 4, 1),
}
# m·n·k up to which "fused" is always taken: one launch is faster than two, and cuBLAS would add
# to a delta that is rounded already.
TINY = 1 << 21
# (budget, loss, loss with 4-bit weights). The budget is 2 · operations / bytes, of what the GPU
# does in a second. A loss is how much slower than cuBLAS our product is; with 4-bit weights it
# includes decoding. sm_90 was measured on an H200, the others are assumed.
SLOWER = {
    "sm_80": (350, 0.05, 0.5),
    "sm_86": (160, 0.03, 0.35),
    "sm_90": (367, 0.8, 4.0),
    "sm_100": (480, 0.20, 1.0),
    "gfx942": (325, 0.15, 0.6),
}
# How much slower than cuBLAS lora_tma's product was measured to be. It is taken only on GPUs
# that have an entry.
TMA = {}


@functools.cache
def machine(device: torch.device) -> tuple[str, int]:
    """The key of the tables for this GPU, and its number of multiprocessors."""
    if INTERPRET:
        return "interpret", 4
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = "gfx942"
    else:
        arch = ARCHS.get((properties.major, properties.minor), "sm_86")
    return arch, properties.multi_processor_count


def choose_product(m, n, k, x, form="dense", passes=1):
    """Chooses how x·Ŵᵀ is made, for m rows like x, n columns and sums of k products.

    Costs are compared as fractions of the time that cuBLAS takes for the product:
        - An epilogue reads and writes the result once more, which costs 2·ops/(bytes·k),
          that is budget/k.
        - Our own products are slower than cuBLAS by what SLOWER and TMA say. Where rows do not
          start at multiples of 16 bytes they would be slower still, and cuBLAS is taken.
        - "tma" and "cublas" need 4-bit weights decoded before. For each weight half a byte is
          read and two are written, which costs 0.63·budget/m. (The product reads the two, as it
          would read any weight.) So decoding inside the product pays up to about 500 rows, and
          on an H200, whose tensor cores wait for it, up to about 60.

    Args:
        passes: epilogues that "cublas" needs.

    Returns:
        "fused" (our product, with the update in the same sum), "tma" (the same by lora_tma), or
        "cublas" (torch's product, and an epilogue that adds the update).
    """
    arch, _ = machine(x.device)
    if x.dtype is torch.float32:
        return "cublas"
    if arch == "interpret" or m * n * k <= TINY:
        return "fused"
    if n % 8 or k % 8:
        return "cublas"
    budget, loss, nf4_loss = SLOWER[arch]
    decode_first = 0.0
    if form == "nf4":
        loss = nf4_loss
        decode_first = 0.63 * budget / max(1, m)
    costs = {
        "fused": loss,
        "cublas": decode_first + budget * passes / max(1, k),
    }
    if arch in TMA:
        costs["tma"] = decode_first + TMA[arch]
    return min(costs, key=costs.get)


def product_tile(m, n, x, form="dense"):
    """The tile of a fused product with m rows and n columns."""
    arch, processors = machine(x.device)
    tiles = NF4_TILES if form == "nf4" else TILES
    sizes, _ = largest_tile(tiles[arch], m, n, processors)
    return sizes


def largest_tile(tiles, m, n, processors):
    """(tile, programs): the first that gives every multiprocessor a program, or the last."""
    for candidate in tiles:
        programs = cdiv(m, candidate["BM"]) * cdiv(n, candidate["BN"])
        if programs >= processors:
            break
    return candidate, programs


def epilogue_tile(x):
    """The tile of a pass over a result like x, which multiplies by the update alone."""
    return TILES["interpret"][0] if INTERPRET else EPILOGUE[x.element_size()]


def rank_block(r: int, most: int = 64) -> int:
    """BR, how many ranks a tile holds: a power of 2. Larger ranks take several tiles."""
    return min(max(16, power_of_2(r)), 16 if INTERPRET else most)


def stripes(length, block, programs, x, most=1024):
    """Splits a sum of this length so that every multiprocessor gets two programs.

    Args:
        block: elements that a program adds at a time; stripes are multiples of it.
        programs: how many programs there are for each stripe.
        most: the largest number of stripes.

    Returns:
        (number of stripes, their length)
    """
    _, processors = machine(x.device)
    wanted = min(cdiv(2 * processors, programs), most)
    blocks = max(1, cdiv(length, block))
    blocks_each = cdiv(blocks, wanted)
    return cdiv(blocks, blocks_each), blocks_each * block
