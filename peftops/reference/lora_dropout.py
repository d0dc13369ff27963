"""The specification of dropout: seed, row, column and p alone decide which entries are kept."""

import torch


def keep_bits(seed, m, k, p):
    """(m, 4⌈k/32⌉) uint8. p is a number, or a tensor (m, 1) of one for each row.

    Byte i of a row holds columns 8i to 8i + 7, lowest bit first; 1 is kept.

    Each byte is one draw of Philox4x32-7. Its key is the seed, and its counter is
    row · 4⌈k/32⌉ + byte, both as (low, high) words; the other words of the counter are 0. A draw is
    eight 16-bit numbers, word by word, low half first. Numbers of at least round(p · 2¹⁶) are kept.
    """
    low = 0xFFFFFFFF
    width = 4 * -(-k // 32)
    counter = torch.arange(m * width, device=seed.device)
    c = [counter & low, counter >> 32, counter * 0, counter * 0]
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(7):
        (h0, l0), (h2, l2) = multiply(c[0], 0xD2511F53), multiply(c[2], 0xCD9E8D57)
        c = [h2 ^ c[1] ^ k0, l2, h0 ^ c[3] ^ k1, l0]
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    draws = torch.stack(
        [half for word in c for half in (word & 0xFFFF, word >> 16)], -1
    )
    if isinstance(p, torch.Tensor):
        limit = (p.double() * 65536).round()[:, :, None]
    else:
        limit = round(p * 65536)
    kept = draws.view(m, width, 8) >= limit
    bits = kept.long() << torch.arange(8, device=seed.device)
    return bits.sum(-1).to(torch.uint8)


def multiply(word, constant):
    """High and low 32 bits of the product of two 32-bit words, which int64 cannot hold."""
    high = (word * (constant >> 16) + (word * (constant & 0xFFFF) >> 16)) >> 16
    return high, word * constant & 0xFFFFFFFF


def keep(bits, k):
    """(m, k) bool: the bits as a mask."""
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits[:, :, None] >> shifts & 1).flatten(1)[:, :k].bool()


def drop(x, bits, p):
    """mask ⊙ x / (1 - p), and zero at p = 1. p is a number, or a tensor (m, 1)."""
    if isinstance(p, torch.Tensor):
        factor = (1 / (1 - p)).masked_fill(p >= 1, 0)
    elif p:
        factor = 1 / (1 - p) if p < 1 else 0
    else:
        return x
    return x * keep(bits, x.shape[1]) * factor
