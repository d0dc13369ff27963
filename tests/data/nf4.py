"""Writes nf4.json beside it: what bitsandbytes 0.50 makes of a few small tensors on a CPU. Run where it is installed.

Codes and scales are bytes in hexadecimal, and of the dequantized values there is the SHA-256.
"""

import hashlib
import json
from pathlib import Path

import torch

CASES = [  # shape, block, type, double quantization, dtype
    ((4, 128), 64, "nf4", False, "float32"),
    ((4, 96), 32, "nf4", True, "bfloat16"),
    ((3, 33), 64, "nf4", True, "float16"),
    ((4, 128), 128, "fp4", False, "bfloat16"),
    ((300, 64), 64, "nf4", True, "float32"),
]


def weight(shape, dtype):
    """Numbers that need no generator: the fractional parts of multiples of √2, and one large one."""
    count = torch.Size(shape).numel()
    w = (torch.arange(1, count + 1, dtype=torch.float64) * 2**0.5).frac() - 0.5
    w[count // 3] *= 3
    return w.view(shape).to(getattr(torch, dtype))


def text(t):
    return t.contiguous().view(torch.uint8).numpy().tobytes().hex()


def digest(t):
    return hashlib.sha256(bytes.fromhex(text(t))).hexdigest()


def main():
    import bitsandbytes.functional as bnb

    found = []
    for shape, block, kind, double, dtype in CASES:
        w = weight(shape, dtype)
        codes, state = bnb.quantize_4bit(
            w, blocksize=block, quant_type=kind, compress_statistics=double
        )
        scales = [state.absmax]
        if double:
            scales += [state.state2.absmax, state.offset]
        found.append(
            [
                text(codes),
                [text(t.flatten()) for t in scales],
                digest(bnb.dequantize_4bit(codes, state)),
            ]
        )
    Path(__file__).with_suffix(".json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
