"""lora_linear with dropout: its masks, and recomputation, which draws the same ones."""

import pytest
import torch
from law import bound, error
from lora_calls import DROPOUT, linear, trained
from torch.utils.checkpoint import checkpoint

import peftops.functional as F
from peftops import backend, backends
from peftops.testing.cases import CASES, SHAPES, lora

HERE = [
    name
    for name in backends.NAMES
    if name != "cuda" and backends.cell(name, "lora_fwd")
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", HERE)
def test_masks_are_the_references_bit_for_bit(name, shape):
    for label, args in CASES["lora_fwd"](shape, torch.bfloat16):
        with backend("reference"):
            expected = torch.ops.peftops.lora_fwd(*args)[2]
        with backend(name):
            assert torch.equal(torch.ops.peftops.lora_fwd(*args)[2], expected), label
    for label, args in CASES["lora_mask"](shape, torch.bfloat16):
        with backend("reference"):
            expected = torch.ops.peftops.lora_mask(*args)
        if backends.cell(name, "lora_mask"):
            with backend(name):
                assert torch.equal(torch.ops.peftops.lora_mask(*args), expected), label


def test_dropout_mask_is_the_mask_of_the_op():
    m, k = 7, 45
    seed = torch.tensor([-77])
    inputs = lora(m, k, 24, 4, torch.float32)
    operands = [inputs[name] for name in ("x", "base", "a", "b", "scale")]
    bias = gain = gate = None
    bits = torch.ops.peftops.lora_fwd(
        *operands, bias, gain, gate, seed, "dense", 0, DROPOUT, False
    )[2]
    unpacked = (bits[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)
    assert torch.equal(unpacked[:, :k].bool(), F.dropout_mask(seed, m, k, DROPOUT))
    assert unpacked[:, k:].any()  # the padding is drawn too


@pytest.mark.parametrize(
    "name", [name for name in HERE if backends.cell(name, "lora_mask")]
)
def test_the_generator_is_philox(name):
    """Random123's known answer for philox4x32-7, with counter and key zero.

    It is 5f6fb709 0d893f64 4f121f81 4f730a48.
    """
    halves = [0xB709, 0x5F6F, 0x3F64, 0x0D89, 0x1F81, 0x4F12, 0x0A48, 0x4F73]
    for threshold in (*halves, *(half + 1 for half in halves)):
        with backend(name):
            mask = F.dropout_mask(torch.tensor([0]), 1, 8, threshold / 65536)
        assert mask.tolist() == [[half >= threshold for half in halves]]


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_mask_statistics(p):
    mask, other = (
        F.dropout_mask(torch.tensor([seed]), 256, 1000, p).double() for seed in (5, 6)
    )
    sigma = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 5 * sigma
    assert (mask.mean(0) - (1 - p)).abs().max() < 5 * sigma * 1000**0.5
    assert (mask.mean(1) - (1 - p)).abs().max() < 5 * sigma * 256**0.5
    for a, b in [(mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1]), (mask, other)]:
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 5 / mask.numel() ** 0.5


def test_no_and_full_dropout():
    inputs = lora(70, 16, 24, 4, torch.float32)
    assert torch.equal(linear(inputs, 0.0), linear(inputs, DROPOUT, training=False))
    exact = inputs["x"].double() @ inputs["base"][0].double().T
    assert error(linear(inputs, 1.0), exact) <= bound(
        inputs["x"] @ inputs["base"][0].T, exact
    )
    grads = trained(inputs, 1.0, "dense")
    assert not grads[2].any() and not grads[3].any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_draws_the_same_mask(reentrant):
    inputs = lora(70, 16, 24, 4, torch.float32)

    def plain(x, a, b):
        return F.lora_linear(x, inputs["base"][0], a, b, dropout_p=DROPOUT)

    def checkpointed(x, a, b):
        return checkpoint(plain, x, a, b, use_reentrant=reentrant)

    runs = []
    for call in (plain, checkpointed):
        leaves = [inputs[name].clone().requires_grad_() for name in ("x", "a", "b")]
        torch.manual_seed(1)
        y = call(*leaves)
        if reentrant:  # such a checkpoint refuses autograd.grad
            y.square().sum().backward()
            grads = [leaf.grad for leaf in leaves]
        else:
            grads = torch.autograd.grad(y.square().sum(), leaves)
        runs.append([y, *grads])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_a_probability_is_between_0_and_1(p):
    with pytest.raises(ValueError, match=rf"lora: p must be in \[0, 1\], got {p}"):
        linear(lora(5, 16, 24, 4, torch.float32), p)
