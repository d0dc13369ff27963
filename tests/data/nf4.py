"""Writes nf4.json beside this file: what bitsandbytes 0.50 makes of small tensors on a CPU.

Codes and scales are bytes in hexadecimal; the dequantized values are a SHA-256. Running it needs
bitsandbytes.
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
    """Fractional parts of multiples of √2, which need no generator, and one larger number."""
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

    vectors = []
    for shape, block, quant_type, double, dtype in CASES:
        w = weight(shape, dtype)
        codes, state = bnb.quantize_4bit(
            w, blocksize=block, quant_type=quant_type, compress_statistics=double
        )
        scales = [state.absmax]
        if double:
            scales += [state.state2.absmax, state.offset]
        values = digest(bnb.dequantize_4bit(codes, state))
        vectors.append([text(codes), [text(t.flatten()) for t in scales], values])
    Path(__file__).with_suffix(".json").write_text(json.dumps(vectors) + "\n")


if __name__ == "__main__":
    main()
