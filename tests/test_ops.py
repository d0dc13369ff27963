"""The law: an error is at most twice the reference's in the same dtype, and one rounding."""

import pytest
import torch

import peftops.functional  # noqa: F401  registers the ops
from peftops import backend, backends
from peftops._op import CONTRACTS
from peftops._ready import expect_one_device
from peftops.testing.cases import CASES, SHAPES
from peftops.testing.law import call, check, double, function

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CELLS = [
    (op, name) for op in CONTRACTS for name in backends.NAMES if backends.cell(name, op)
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op, name", CELLS)
def test_law(op, name, shape, dtype, request):
    if name == "cuda":
        request.getfixturevalue("cuda_on_cpu")
    for label, error, bound in check(op, name, shape, dtype):
        assert error <= bound, label


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(200, 300, 260, 70), (16, 700, 650, 17)], ids=str)
@pytest.mark.parametrize("op", CONTRACTS)
def test_law_where_threads_share_the_work(op, shape, dtype):
    if not backends.cell("cpu", op):
        pytest.skip("the extension is not built")
    for label, error, bound in check(op, "cpu", shape, dtype):
        assert error <= bound, label


# the ops themselves have no gradient
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("op", CONTRACTS)
def test_opcheck(op):
    # outputs of integers, or none
    differentiable = op not in ("nf4_quantize", "multi_add_")
    for _, args in CASES[op]((5, 16, 24, 4), torch.float32):
        for arg in args:
            real = isinstance(arg, torch.Tensor) and arg.dtype == torch.float32
            if differentiable and real:
                arg.requires_grad_()
        torch.library.opcheck(getattr(torch.ops.peftops, op).default, args)


def test_strides_and_alignment_do_not_matter():
    _, args = next(CASES["lora_fwd"]((5, 16, 24, 4), torch.float32))
    expected = call("lora_fwd", "cpu", args)[0]
    shifted = torch.empty(5 * 16 + 1)[1:].view(5, 16).copy_(args[0])
    strided = torch.empty(16, 5).T.copy_(args[0])
    for x in (shifted, strided):
        assert torch.equal(call("lora_fwd", "cpu", [x, *args[1:]])[0], expected)


IN_PLACE = [op for op in CONTRACTS if op.endswith("_")]


@pytest.mark.parametrize("op", IN_PLACE)
def test_what_changes_may_lie_anywhere(op):
    _, args = next(CASES[op]((5, 16, 24, 4), torch.float32))
    (expected,) = call(op, "cpu", args)
    shifted = torch.empty(args[0].numel() + 1)[1:].view(args[0].shape)
    strided = torch.empty(args[0].shape[::-1]).T
    for run in (function(op), getattr(torch.ops.peftops, op)):
        for y in (shifted, strided):
            y.copy_(args[0])
            assert run(y, *args[1:]) is None
            assert torch.equal(y, expected)


@pytest.mark.parametrize("op", IN_PLACE)
def test_autograd_sees_a_change(op):
    """What was kept for backward may not change, and what wants a gradient gets an error."""
    run = function(op)
    _, args = next(CASES[op]((5, 16, 24, 4), torch.float32))
    factor = torch.ones_like(args[0]).requires_grad_()
    product = (args[0] * factor).sum()
    with torch.no_grad():
        run(*args)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with pytest.raises(
        RuntimeError, match=r"multi_add_ has no gradients; call it in torch\.no_grad"
    ):
        run(args[0], args[1].requires_grad_(), *args[2:])


@pytest.mark.parametrize("op", IN_PLACE)
def test_a_change_inside_a_graph(op):
    run = function(op)
    _, args = next(CASES[op]((5, 16, 24, 4), torch.float32))

    def twice(y, *rest):
        y = y * 2
        run(y, *rest)
        return y + 1

    expected = twice(*args)
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), expected)


def test_tensors_are_of_one_device():
    _, args = next(CASES["lora_fwd"]((5, 16, 24, 4), torch.float32))
    args[3] = args[3].to("meta")
    with pytest.raises(ValueError, match="lora_fwd: b must be on cpu, got meta"):
        expect_one_device(CONTRACTS["lora_fwd"], args)


def test_threads_leave_a_backend_in_any_order():
    first = backend("reference")
    second = backend("cpu")
    first.__enter__()
    second.__enter__()
    assert backends.forced() == "cpu"
    first.__exit__(None, None, None)
    assert backends.forced() == "cpu"
    second.__exit__(None, None, None)
    assert backends.forced() is None


def test_forced_backend_never_falls_back():
    _, args = next(CASES["lora_bwd"]((5, 16, 24, 4), torch.float32))
    with pytest.raises(NotImplementedError, match="lora_bwd: not on cuda"):
        call("lora_bwd", "cuda", args)
    with pytest.raises(NotImplementedError, match=r"not on cpu for float64 on cpu"):
        call("lora_bwd", "cpu", double(args))
