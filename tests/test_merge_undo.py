"""Merging in place: whatever happened meanwhile, every bit comes back, or nothing changes."""

import pytest
import torch

import peftops.functional as F
from peftops import backend
from peftops.ops.merge_undo import checksum

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def adapters(count=1, n=70, k=96, size=0.01):
    return [
        (torch.randn(4 + i, k), torch.randn(n, 4 + i) * size, 0.5 + i)
        for i in range(count)
    ]


def bits(t):
    return t.contiguous().view(torch.uint8).clone()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cycles_with_adapters_that_change(dtype, turned, dora):
    """With the same adapter a weight that was rounded twice stays; with others it walks away."""
    w = torch.randn(70, 96).to(dtype)
    w = w.T.contiguous().T if turned else w
    before = bits(w)
    for cycle in range(30):
        factors = adapters(1 + cycle % 3, size=0.01 * 2.0 ** (cycle % 5))
        magnitudes = [torch.rand(70) + 0.5 if dora else None for _ in factors]
        merged = F.merge_lora(w, factors, magnitudes=magnitudes)
        record = F.merge_lora_(w, factors, magnitudes=magnitudes)
        assert torch.equal(w, merged)
        assert not torch.equal(bits(w), before)
        for lora_A, lora_B, _ in factors:  # as an optimizer would
            lora_A.mul_(2)
            lora_B.add_(1)
        F.unmerge_lora_(w, record)
        assert torch.equal(bits(w), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, 1e-45, 3e38])
def test_strange_weights_come_back(value):
    for dtype in DTYPES:
        w = torch.randn(70, 96).to(dtype)
        w[3] = value
        w[:, 5] = -value
        before = bits(w)
        for size in (0.0, 0.01, 1e30):
            F.unmerge_lora_(w, F.merge_lora_(w, adapters(2, size=size)))
            assert torch.equal(bits(w), before)


def test_a_record_is_the_smaller_of_a_patch_and_a_copy():
    w = torch.randn(512, 768).bfloat16()
    small = F.merge_lora_(w.clone(), adapters(n=512, k=768))
    assert small.copy is None
    assert small.nbytes < w.nbytes / 10
    large = F.merge_lora_(w.clone(), adapters(n=512, k=768, size=1e4))
    assert torch.equal(large.copy, w)
    assert large.nbytes == w.nbytes + large.delta.nbytes


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("size", [0.01, 1e4])
def test_merging_more_is_merging_all_at_once(size, dora):
    w = torch.randn(70, 96).bfloat16()
    before = bits(w)
    factors = adapters(3, size=size)
    factors[1] = *[t.bfloat16() for t in factors[1][:2]], 1.5
    magnitudes = [None, torch.rand(70) + 0.5 if dora else None, None]
    expected = F.merge_lora(w, factors, magnitudes=magnitudes)
    record = None
    for factor, magnitude in zip(factors, magnitudes, strict=True):
        record = F.merge_lora_(w, [factor], magnitudes=[magnitude], record=record)
        factor[0].zero_()  # what is merged already does not change with it
    assert torch.equal(w, expected)
    F.unmerge_lora_(w, record)
    assert torch.equal(bits(w), before)


def test_a_weight_in_another_dtype_is_refused():
    w = torch.randn(70, 96)
    record = F.merge_lora_(w, adapters())
    with pytest.raises(ValueError, match="weight must be as merged"):
        F.unmerge_lora_(w.bfloat16(), record)


def test_a_record_of_one_backend_undoes_on_another():
    w = torch.randn(70, 96).bfloat16()
    before = bits(w)
    factors = adapters(2)
    magnitudes = [torch.rand(70), None]
    for one, other in (
        ("cpu", "triton"),
        ("triton", "reference"),
        ("reference", "cpu"),
    ):
        with backend(one):
            record = F.merge_lora_(w, factors, magnitudes=magnitudes)
        with backend(other):
            F.unmerge_lora_(w, record)
        assert torch.equal(bits(w), before)


def test_a_weight_that_somebody_changed_stays():
    w = torch.randn(70, 96).bfloat16()
    record = F.merge_lora_(w, adapters())
    for change in (
        lambda: w[3, 5].mul_(1.01),
        lambda: w.copy_(w.flip(0)),
        lambda: w.neg_(),
    ):
        merged = w.clone()
        change()
        changed = bits(w)
        with pytest.raises(
            ValueError, match="weight must be as merged, but it was changed"
        ):
            F.unmerge_lora_(w, record)
        assert torch.equal(bits(w), changed)
        w.copy_(merged)
    F.unmerge_lora_(w, record)


def test_the_checksum_sees_each_bit():
    for shape in ((3, 4), (2, 5), (4, 1)):
        for dtype in DTYPES:
            w = torch.randn(shape).to(dtype)
            whole = checksum(w)
            for i in range(w.numel() * w.element_size() * 8):
                flat = w.clone().view(-1).view(torch.uint8)
                flat[i // 8] ^= 1 << i % 8
                assert not torch.equal(checksum(flat.view(dtype).view(shape)), whole)
            assert torch.equal(checksum(w.clone()), whole)


def test_what_raises_leaves_the_weight():
    w = torch.randn(70, 96)
    before = bits(w)
    with pytest.raises(
        ValueError, match=r"merge: w must be \(70, 95\), got \(70, 96\)"
    ):
        F.merge_lora_(w, adapters(k=95))
    with pytest.raises(ValueError, match="merge: magnitudes must be 1, got 2"):
        F.merge_lora_(w, adapters(), magnitudes=[None, None])
    assert torch.equal(bits(w), before)
