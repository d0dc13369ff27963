"""The magnitude of a DoRA layer. It stays in fp32, and so does what optimizers keep of it.

In bf16, an optimizer's step is too small to change it.
"""

import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

HALF = torch.bfloat16, torch.float16
# id of a magnitude that `widened` made fp32 -> a weak reference to it
WIDENED: dict[int, weakref.ref] = {}


class Magnitude(nn.Module):
    """The lengths of a weight's rows, under the key of PEFT's layer."""

    if TYPE_CHECKING:  # what nn.Module finds for these names, here and in PEFT's module
        weight: nn.Parameter
        gain: Tensor  # the kept gain, if there is one
        gain_of: tuple | None  # its stamp

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


def widened(magnitude: Magnitude) -> Tensor:
    """The magnitude's weight in fp32. A parameter that somebody has cast to 16 bits is cast back.

    Under a policy of FSDP2 the cast may be for this call alone, so the parameter is left alone.
    """
    weight = magnitude.weight
    if weight.dtype not in HALF:
        return weight
    if torch.compiler.is_compiling() or (dist.is_available() and dist.is_initialized()):
        return weight.float()
    weight.data = weight.data.float()
    if weight.grad is not None:
        weight.grad = weight.grad.float()
    WIDENED[id(weight)] = weakref.ref(weight)
    return weight


def widen_state(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Before a step: casts to fp32 what the optimizer keeps of magnitudes that `widened` cast."""
    for reference in [*WIDENED.values()]:
        weight = reference()
        if weight is None:
            continue
        state = optimizer.state.get(weight, {})
        for key, value in state.items():
            if not isinstance(value, torch.Tensor):
                continue
            if value.dtype in HALF and value.shape == weight.shape:
                state[key] = value.float()


register_optimizer_step_pre_hook(widen_state)
