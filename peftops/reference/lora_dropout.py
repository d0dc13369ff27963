"""The specification of dropout: which entries are kept is a function of (seed, row, column, p) alone."""

import torch


def keep_bits(seed, m, k, p):
    """(m, 4⌈k/32⌉) uint8. Byte i of a row holds its columns 8i to 8i + 7, lowest bit first; 1 is kept.

    Philox4x32-7, key = seed, counter = row · 4⌈k/32⌉ + byte, both as (low, high) words, the rest of the counter 0.
    One draw is eight 16-bit numbers, word by word, low half first; kept are those of at least round(p · 2¹⁶).
    """
    low, width = 0xFFFFFFFF, 4 * -(-k // 32)
    counter = torch.arange(m * width, device=seed.device)
    c = [counter & low, counter >> 32, counter * 0, counter * 0]
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(7):
        (h0, l0), (h2, l2) = multiply(c[0], 0xD2511F53), multiply(c[2], 0xCD9E8D57)
        c = [h2 ^ c[1] ^ k0, l2, h0 ^ c[3] ^ k1, l0]
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    draws = torch.stack([half for word in c for half in (word & 0xFFFF, word >> 16)], -1)
    bits = (draws >= round(p * 65536)).long() << torch.arange(8, device=seed.device)
    return bits.sum(-1).to(torch.uint8).view(m, width)


def multiply(word, constant):
    """High and low 32 bits of a product of 32-bit words; int64 alone cannot hold it."""
    high = (word * (constant >> 16) + (word * (constant & 0xFFFF) >> 16)) >> 16
    return high, word * constant & 0xFFFFFFFF


def keep(bits, k):
    """(m, k) bool"""
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits[:, :, None] >> shifts & 1).flatten(1)[:, :k].bool()


def drop(x, bits, p):
    """mask ⊙ x / (1 - p), and zero at p = 1"""
    return x * keep(bits, x.shape[1]) * (1 / (1 - p) if p < 1 else 0) if p else x
