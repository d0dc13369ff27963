"""Layers with use_dora: the gain that a layer keeps always fits its weights, whoever moves them."""

import copy

import pytest
import torch
from law import bound, error
from test_dora_layers import BASES, gain, layer, magnitude, sgd, step
from torch import nn
from torch.autograd import forward_ad, functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import peftops
import peftops.functional as F
from peftops.nn import checked_norms

pytestmark = pytest.mark.usefixtures("one_thread")


def computed(layer):
    """How often the layer has computed its norm."""
    return vars(layer)["_peftops_norms"]


def right(layer):
    """Whether the layer's gain is that of its weights."""
    weight, a, b, scaling = layer.operands("default")
    norm = F.dora_weight_norm(
        weight, a.detach(), b.detach(), scaling=scaling, dtype=layer.computes_in()
    )
    return torch.equal(gain(layer), magnitude(layer).detach() / norm)


@pytest.mark.parametrize("base", BASES)
def test_only_calls_of_one_position_without_gradients_reuse_a_norm(base):
    new = layer(base)
    counts = []
    before = computed(new)
    calls = [
        (True, (2, 5, 64)),
        (True, (2, 1, 64)),
        (False, (2, 5, 64)),
        (False, (2, 1, 64)),
        (False, (64,)),
    ]
    for grad, shape in calls:
        with torch.set_grad_enabled(grad):
            new(torch.randn(shape))
        counts.append(computed(new) - before)
    assert counts == [1, 2, 3, 3, 3] and right(new)


class Raw(torch.optim.Optimizer):
    """Writes where no version counter notices, as kernels on raw pointers do."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for group in self.param_groups:
            write_raw(group["params"])


def write_raw(parameters):
    for p in parameters:
        p.detach().numpy()[...] += 0.1


def adapters(new):
    return [new.lora_A["default"].weight, new.lora_B["default"].weight]


@torch.no_grad()
def by_hand(new):
    for p in adapters(new):
        p.add_(0.1)


@torch.no_grad()
def interpolated(new):
    """Moves weights as schedule-free optimizers do between training and evaluation."""
    for p in adapters(new):
        p.lerp_(torch.ones_like(p), 0.1)


def in_data(new):
    for p in adapters(new):
        p.data.add_(0.1)


def other_data(new):
    for p in adapters(new):
        p.data = p.data + 0.1


def averaged(new):
    """Moves weights as averages of weights do before an evaluation."""
    for p in adapters(new):
        p.data.copy_((p.data + 0.1).clone())


def flat(new):
    """Moves weights as an optimizer does whose parameters are slices of one buffer."""
    buffer = torch.cat([p.data.flatten() for p in adapters(new)])
    slices = buffer.split([p.numel() for p in adapters(new)])
    for p, values in zip(adapters(new), slices, strict=True):
        p.data = values.view(p.shape)
    new(torch.randn(2, 3, 64))
    buffer += 0.1


def of_copies(new):
    """Takes a step of torch's optimizer on copies, and copies them back."""
    copies = [p.detach().clone().requires_grad_() for p in adapters(new)]
    for p in copies:
        p.grad = torch.ones_like(p)
    torch.optim.SGD(copies, 0.1).step()
    for p, moved in zip(adapters(new), copies, strict=True):
        p.data.copy_(moved.data)


def by_gradients(new):
    optimizer = sgd(new, 0.01)
    step(new, optimizer)


MOVES = {  # name: (a function that moves weights, whether the layer can notice)
    "an optimizer": (by_gradients, True),
    "an optimizer's kernel on raw pointers": (
        lambda new: Raw(adapters(new)).step(),
        True,
    ),
    "by hand": (by_hand, True),
    "interpolated": (interpolated, True),
    "vector_to_parameters": (
        lambda new: vector_to_parameters(
            parameters_to_vector(adapters(new)) + 0.1, adapters(new)
        ),
        True,
    ),
    "other .data": (other_data, True),
    "load_state_dict": (
        lambda new: new.load_state_dict(
            {key: tensor + 0.1 for key, tensor in new.state_dict().items()}
        ),
        True,
    ),
    "load_state_dict, assign": (
        lambda new: new.load_state_dict(
            {key: tensor.clone() * 2 for key, tensor in new.state_dict().items()},
            assign=True,
        ),
        True,
    ),
    "load_state_dict of a model": (
        lambda new: nn.Sequential(new).load_state_dict(
            {f"0.{key}": tensor + 1 for key, tensor in new.state_dict().items()}
        ),
        True,
    ),
    "scaling": (lambda new: setattr(new, "scaling", 2 * new.scaling), True),
    "base": (lambda new: new.base_layer.weight.data.copy_(torch.randn(48, 64)), False),
    "other base": (
        lambda new: setattr(new.base_layer.weight, "data", torch.randn(48, 64)),
        True,
    ),
    "in .data": (in_data, False),
    "averaged": (averaged, False),
    "raw pointers": (lambda new: write_raw(adapters(new)), False),
    "a flat buffer": (flat, False),
    # noticed by the optimizer's step, though it holds none of these parameters
    "copies": (of_copies, True),
}


def expected(new, x):
    """The layer's output with a norm that is computed now."""
    weight, a, b, scaling = new.operands("default")
    bias = new.base_layer.bias
    with torch.no_grad():
        return F.dora_linear(x, weight, a, b, magnitude(new), bias, scaling=scaling)


@pytest.mark.parametrize("move", MOVES)
def test_a_norm_is_never_stale(move):
    """The layer holds a norm, weights move, and then it trains, evaluates or generates."""
    new = layer()
    prompt = torch.randn(2, 40, 64)
    token = torch.randn(2, 1, 64)
    change, noticed = MOVES[move]

    def call(x, train=False):
        with torch.set_grad_enabled(train):
            return new(x).detach()

    sequences = [
        ["train"],
        ["prompt", "token"],
        ["prompt"],
        ["token"] if noticed else ["prompt", "token"],
        ["refresh", "token"],
    ]
    for sequence in sequences:
        call(prompt)
        call(token)
        before = expected(new, token)
        change(new)
        assert not torch.equal(expected(new, token), before)
        for action in sequence:
            if action == "refresh":
                peftops.refresh(nn.Sequential(new))
                continue
            x = token if action == "token" else prompt
            y = call(x, train=action == "train")
            assert torch.equal(y, expected(new, x)), (sequence, action)


def test_a_call_with_other_parameters():
    new = layer()
    prompt = torch.randn(2, 5, 64)
    token = torch.randn(2, 1, 64)
    other = {
        name: p.detach() + 0.1 for name, p in new.named_parameters() if "lora_" in name
    }
    twin = copy.deepcopy(new)
    twin.load_state_dict(other, strict=False)
    for x in (prompt, token):
        with torch.no_grad():
            new(prompt)
            new(token)
            assert torch.equal(
                torch.func.functional_call(new, other, x), expected(twin, x)
            )
            assert torch.equal(new(token), expected(new, token))


def test_a_tangent_of_the_magnitude():
    """The gain that the layer keeps has no tangent, so that it must be computed again."""
    new = layer()
    token = torch.randn(2, 1, 64)
    direction = torch.randn(48)
    name = "lora_magnitude_vector.default.weight"
    with torch.no_grad():
        new(torch.randn(2, 5, 64))
        new(token)

    def f(m):
        return torch.func.functional_call(new, {name: m}, token)

    def formula(dtype):
        weight, a, b, scaling = (
            tensor.detach().to(dtype) if isinstance(tensor, torch.Tensor) else tensor
            for tensor in new.operands("default")
        )
        x = token.to(dtype)
        product = x @ weight.T + scaling * (x @ a.T) @ b.T
        return direction.to(dtype) / (weight + scaling * b @ a).norm(dim=1) * product

    tangents = [
        torch.func.jvp(f, (magnitude(new),), (direction,))[1],
        functional.jvp(f, magnitude(new), direction)[1],
    ]
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(magnitude(new).detach(), direction)
        tangents.append(forward_ad.unpack_dual(f(dual)).tangent)
    exact = formula(torch.float64)
    for tangent in tangents:
        assert error(tangent.detach(), exact) <= bound(formula(torch.float32), exact)


def test_a_change_of_mode_is_a_change():
    """train() and eval() drop the gain, as averages of weights are swapped in and out there."""
    new = layer()
    token = torch.randn(2, 1, 64)
    with torch.no_grad():
        for mode in (False, True):
            new(torch.randn(2, 5, 64))
            in_data(new)
            nn.Sequential(new).train(mode)
            assert torch.equal(new(token), expected(new, token))


def test_a_cast_layer_has_a_norm_of_its_own():
    for change in (
        lambda new: new.to(torch.bfloat16),
        lambda new: nn.Sequential(new).half(),
    ):
        new = layer()
        change(new)
        assert right(new) and gain(new).dtype == magnitude(new).dtype == torch.float32


def test_a_backward_after_an_evaluation():
    """A later call must not overwrite what a call with gradients has saved for backward."""
    new = layer()
    x = torch.randn(2, 5, 64)
    y = new(x)
    with torch.no_grad():
        new(x)
        in_data(new)
        new(x)
    y.sum().backward()
    assert magnitude(new).grad.isfinite().all()


@torch.no_grad()
def test_checked_norms_finds_a_stale_one():
    new = layer()
    token = torch.randn(2, 1, 64)
    new(torch.randn(2, 5, 64))
    in_data(new)
    message = "dora: the norm of default is of other weights; call"
    with checked_norms(), pytest.raises(RuntimeError, match=message):
        new(token)
    peftops.refresh(nn.Sequential(new))
    with checked_norms():
        assert torch.equal(new(token), expected(new, token))


def test_a_copy_keeps_its_own():
    new = layer()
    twin = copy.deepcopy(new)
    with torch.no_grad():
        by_hand(twin)
        new(torch.randn(2, 5, 64))
        twin(torch.randn(2, 5, 64))
    assert right(twin) and right(new) and not torch.equal(gain(twin), gain(new))


@pytest.mark.parametrize("base", BASES)
def test_a_compiled_layer_of_a_frozen_adapter(base):
    """The graph of prompts writes the norm that the graph of tokens reads.

    This holds also where weights are swapped unnoticed.
    """
    torch._dynamo.reset()
    new = layer(base).requires_grad_(False)
    prompt = torch.randn(2, 5, 64)
    token = torch.randn(2, 1, 64)
    compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(compiled(prompt), expected(new, prompt))
            assert torch.equal(compiled(token), expected(new, token))
            in_data(new)
