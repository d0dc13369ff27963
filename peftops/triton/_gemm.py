"""What the host decides: the machine, the tiles of a matrix product, and whether torch's own product is the better."""

import functools

import torch
import triton

from ._launch import cdiv, power_of_2

INTERPRET = triton.knobs.runtime.interpret
KINDS = {
    (8, 0): "sm_80",
    (9, 0): "sm_90",
    (10, 0): "sm_100",
    (10, 3): "sm_100",
    (11, 0): "sm_100",
}
SHARED = {  # bytes a program may use
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "gfx942": 65536,
}


def tile(warps, stages, **sizes):
    return {**sizes, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def gemm(bm, bn, bk, warps, stages):
    return tile(warps, stages, BM=bm, BN=bn, BK=bk)


TILES = {  # of 16-bit products, the largest that gives every multiprocessor a program is taken
    "sm_80": (gemm(128, 128, 64, 8, 4), gemm(64, 128, 64, 4, 4), gemm(64, 64, 64, 4, 4)),
    "sm_86": (
        gemm(128, 128, 64, 8, 3),
        gemm(64, 128, 64, 4, 3),
        gemm(64, 64, 64, 4, 3),
    ),  # 8.6, 8.9, 12.0
    "sm_90": (gemm(128, 256, 64, 8, 3), gemm(128, 128, 64, 8, 3), gemm(64, 128, 64, 4, 4)),
    "sm_100": (gemm(128, 128, 64, 8, 4), gemm(64, 128, 64, 4, 4)),
    "gfx942": (gemm(128, 128, 64, 8, 2), gemm(64, 128, 64, 4, 2), gemm(64, 64, 64, 4, 2)),
    "interpret": (gemm(32, 32, 32, 4, 1),),
}
NF4_TILES = {  # of products with 4-bit weights: decoding costs as many instructions whatever the number of rows
    "sm_80": (gemm(128, 128, 64, 8, 3), gemm(128, 64, 64, 8, 3), gemm(64, 64, 64, 4, 3)),
    "sm_86": (gemm(128, 128, 64, 8, 3), gemm(128, 64, 64, 8, 3), gemm(64, 64, 64, 4, 3)),
    "sm_90": (gemm(128, 128, 64, 8, 3), gemm(128, 64, 64, 8, 3), gemm(64, 64, 64, 4, 3)),
    "sm_100": (gemm(128, 128, 64, 8, 3), gemm(128, 64, 64, 8, 3), gemm(64, 64, 64, 4, 3)),
    "gfx942": (gemm(128, 128, 64, 8, 2), gemm(128, 64, 64, 8, 2), gemm(64, 64, 64, 4, 2)),
    "interpret": (gemm(32, 32, 32, 4, 1),),
}
EPILOGUE = {
    2: gemm(64, 128, 64, 4, 1),
    4: gemm(32, 64, 32, 4, 1),
}  # of passes over y or dx, by bytes an element
TINY = (
    1 << 21
)  # m·n·k: one launch is faster than two, and cuBLAS adds to what is rounded already
SLOWER = {  # ops a byte of the machine; how much slower than cuBLAS our product, and that which decodes 4 bits, is
    "sm_80": (350, 0.05, 0.5),  # taken to be, all but sm_90, which is an H200's
    "sm_86": (160, 0.03, 0.35),
    "sm_90": (367, 0.8, 4.0),
    "sm_100": (480, 0.20, 1.0),
    "gfx942": (325, 0.15, 0.6),
}
TMA = {}  # how much slower than cuBLAS lora_tma's product was measured to be; where it was not, it is not taken


@functools.cache
def machine(device):
    """The key of the tables, and the number of multiprocessors."""
    if INTERPRET:
        return "interpret", 4
    properties = torch.cuda.get_device_properties(device)
    kind = (
        "gfx942"
        if torch.version.hip
        else KINDS.get((properties.major, properties.minor), "sm_86")
    )
    return kind, properties.multi_processor_count


def choose_product(m, n, k, x, form="dense", passes=1):
    """The cheapest of "fused", "tma" and "cublas" with an epilogue, for m rows of x·Ŵᵀ with n columns and sums of k.

    Costs are shares of the time that cuBLAS takes. An epilogue reads and writes the result once more, 2·ops/(bytes·k),
    and `passes` counts such costs; products of ours are slower than cuBLAS by what the tables say. Without 16-byte rows
    they are slower still. All but "fused" need 4-bit weights decoded before: ½ byte read, 2 written and read again, but
    that read is the product's own, are 2.5 bytes a weight, 0.63·ops/m. That pays for decoding inside up to 500 rows or
    so, and on an H200, whose tensor cores wait for it, never.
    """
    kind, _ = machine(x.device)
    if x.dtype is torch.float32:
        return "cublas"
    if kind == "interpret" or m * n * k <= TINY:
        return "fused"
    if n % 8 or k % 8:
        return "cublas"
    budget, slower, decoding = SLOWER[kind]
    four_bits = form == "nf4"
    decoded = 0.63 * budget / max(1, m) if four_bits else 0.0
    costs = {
        "fused": decoding if four_bits else slower,
        "cublas": decoded + budget * passes / max(1, k),
    }
    if kind in TMA:
        costs["tma"] = decoded + TMA[kind]
    return min(costs, key=costs.get)


def pick(m, n, x, form="dense"):
    """The tile of a fused product with m rows and n columns."""
    kind, processors = machine(x.device)
    tile, _ = largest((NF4_TILES if form == "nf4" else TILES)[kind], m, n, processors)
    return tile


def largest(tiles, m, n, processors):
    """(tile, how many of it): the first that gives every multiprocessor a program, or the last."""
    for t in tiles:
        count = cdiv(m, t["BM"]) * cdiv(n, t["BN"])
        if count >= processors:
            break
    return t, count


def epilogue(x):
    return TILES["interpret"][0] if INTERPRET else EPILOGUE[x.element_size()]


def rank(r, most=64):
    """How many columns a tile of rank r holds: more take turns."""
    return min(max(16, power_of_2(r)), 16 if INTERPRET else most)


def stripes(length, block, programs, x, most=1024):
    """(number, length): the stripes, of whole blocks, that give every multiprocessor two programs."""
    wanted = min(cdiv(2 * machine(x.device)[1], programs), most)
    blocks = max(1, cdiv(length, block))
    span = cdiv(blocks, wanted)
    return cdiv(blocks, span), span * block
