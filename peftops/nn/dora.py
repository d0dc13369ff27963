"""DoRA's gain, magnitude / norm: made in every call but those that generate, which read what is kept of the prompt's.

Weights move in more ways than anybody can watch: optimizers over flat copies, averages, `.data`, raw pointers. So a
call that trains, or that reads more than one position, computes its norm, at the price of one more read of the weight.
A generated token would pay that price in full. It takes the gain of the prompt's call, if its stamp is unchanged.
"""

import sys
import weakref
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..functional import dora_weight_norm
from ..ops.dora import no_zeros
from ..ops.lora_formula import by_formula

PLAIN = torch.Tensor, nn.Parameter
HALF = torch.bfloat16, torch.float16
CHECKING = []  # one entry for each checked_norms() that some thread is inside of
WIDENED = {}  # by id, references to magnitudes that somebody had cast to 16 bits
_moves = (
    0  # steps of optimizers and changes of mode, after either of which no kept norm is trusted
)


class Magnitude(nn.Module):
    """The lengths of a weight's rows, under the key of PEFT's layer."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)


class Normed(nn.Module):
    """A layer with lora_A, lora_B and lora_magnitude_vector of each adapter, and so with gains to keep.

    A magnitude stays in fp32, whatever the model is cast to: in bf16 a step is too small to change it.
    """

    def operands(self, name):
        """(weight, lora_A, lora_B, scaling) for dora_weight_norm of one adapter; None where it has no norm."""
        raise NotImplementedError

    def computes_in(self):
        """The dtype of the product that the norm is for."""
        raise NotImplementedError

    def magnitudes(self):
        return (
            dict(self._modules["lora_magnitude_vector"].items())
            if "lora_magnitude_vector" in self._modules
            else {}
        )

    def keep_gains(self):
        """From now on, gains of all adapters are kept; what has been kept before is refreshed."""
        if loaded not in self._load_state_dict_post_hooks.values():
            self.register_load_state_dict_post_hook(loaded)
        self.refresh_gains()

    def forget_gains(self):
        for key in [
            key for key, hook in self._load_state_dict_post_hooks.items() if hook is loaded
        ]:
            del self._load_state_dict_post_hooks[key]
        Normed.drop_gains(self)

    def drop_gains(self):
        """What calls have left; the layer may be of another class already."""
        for magnitude in Normed.magnitudes(self).values():
            magnitude._buffers.pop("gain", None)
            magnitude._non_persistent_buffers_set.discard("gain")
            vars(magnitude).pop("gain_of", None)
        vars(self).pop("_peftops_norms", None)

    @torch.no_grad()
    def refresh_gains(self):
        """Those of all adapters whose weights are whole outside of a forward."""
        for name, magnitude in self.magnitudes().items():
            weight, operands = widened(magnitude), self.operands(name)
            magnitude.gain_of = None
            if operands is not None and ready(tensors_of(operands[0]), weight, *operands[1:3]):
                keep(
                    magnitude,
                    self.computed(type(self), weight, operands),
                    stamp(weight, *operands),
                )

    def gain(self, kind, name, x, *operands):
        """(n,), differentiable in the magnitude; operands: weight, lora_A, lora_B and scaling of this call.

        kind: the layer's class when the call began, which another thread may replace before it ends.
        """
        magnitude = self._modules["lora_magnitude_vector"]._modules[name]
        weight = magnitude._parameters[
            "weight"
        ]  # of a module's attributes the one that every token reads
        if weight.dtype in HALF:
            weight = widened(magnitude)
        _, a, b, _ = operands
        training = torch.is_grad_enabled() and (
            weight.requires_grad or a.requires_grad or b.requires_grad
        )
        if training or by_formula():
            return kind.computed(self, kind, weight, operands)
        if torch.compiler.is_compiling():
            return kind.traced_gain(self, kind, magnitude, weight, x, operands)
        now = stamp(weight, *operands)
        known = (
            now is not None
            and vars(magnitude).get("gain_of") == now
            and one_position(x)
            and not sharded()
        )
        kept = (
            magnitude._buffers.get("gain") if known else None
        )  # unpatch may have taken it away meanwhile
        if kept is not None:
            if CHECKING and not same(kept, kind.computed(self, kind, weight, operands)):
                raise RuntimeError(
                    f"dora: the norm of {name} is of other weights; call peftops.refresh after a change"
                )
            return kept
        gain = kind.computed(self, kind, weight, operands)
        keep(magnitude, gain, now)
        return gain

    def traced_gain(self, kind, magnitude, weight, x, operands):
        """Under torch.compile no stamp can be compared: what is kept serves one position of a frozen adapter."""
        _, a, b, _ = operands
        frozen = "gain" in magnitude._buffers and not (a.requires_grad or b.requires_grad)
        if frozen and one_position(x):
            return magnitude.gain
        gain = kind.computed(self, kind, weight, operands)
        if frozen:
            magnitude.gain.copy_(gain)
        return gain

    def computed(self, kind, weight, operands):
        if not torch.compiler.is_compiling():
            vars(self)["_peftops_norms"] = vars(self).get("_peftops_norms", 0) + 1
        return weight / norm_of(*operands, kind.computes_in(self))

    def train(self, mode=True):
        moved()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        kept = {magnitude: magnitude.weight.data for magnitude in self.magnitudes().values()}
        super()._apply(fn, recurse)
        for magnitude, before in kept.items():
            now = magnitude.weight
            if now.dtype in HALF and before.dtype not in HALF:
                now.data = now.data.to(before.dtype) if now.is_meta else before.to(now.device)
        if any("gain" in magnitude._buffers for magnitude in kept):
            self.refresh_gains()
        return self


def norm_of(weight, a, b, scaling, dtype):
    """Constant, since the weight is frozen and the adapters are detached.

    Autocast is left only where it is on: an exported graph would hold the context.
    """
    a, b = a.detach(), b.detach()  # of forward-mode AD too
    if dtype is torch.float32:
        a, b = a.float(), b.float()
    kind = a.device.type
    with (
        torch.autocast(kind, enabled=False)
        if torch.is_autocast_enabled(kind)
        else nullcontext()
    ):
        return no_zeros(dora_weight_norm(weight, a, b, scaling=scaling, dtype=dtype))


def same(a, b):
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def keep(magnitude, gain, of):
    """In place, where graphs read it. No graph of autograd has saved it: a call that trains has a gain of its own."""
    kept = magnitude._buffers.get("gain")
    if kept is None or (kept.device, kept.dtype, kept.shape) != (
        gain.device,
        gain.dtype,
        gain.shape,
    ):
        with torch.inference_mode(False):
            kept = torch.empty_like(gain)
        magnitude.register_buffer("gain", kept, persistent=False)
    kept.copy_(gain)
    magnitude.gain_of = of


def stamp(magnitude, weight, a, b, scaling):
    """What a gain is of, as far as it shows from outside; None for what shows nothing."""
    if type(a) is not nn.Parameter or type(b) is not nn.Parameter:
        return None  # views that somebody has made for this call
    try:
        return (
            _moves,
            scaling,
            [(t.data_ptr(), t._version) for t in (magnitude, a, b, *tensors_of(weight))],
        )
    except RuntimeError:
        return None  # tensors of inference_mode count no versions


def one_position(x):
    """Whether x (..., k) is one token of each sequence."""
    return (x.shape[-2] if x.dim() > 1 else 1) == 1


def sharded():
    """Whether FSDP2 is at work in this process: what it gathers has the versions of what it gathered before."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return hasattr(fsdp, "FSDPModule") and bool(fsdp.FSDPModule.__subclasses__())


def ready(weights, *others):
    """Whether a norm can be made of these outside a forward: FSDP2 and ZeRO-3 have sharded none, no hook has to bring
    one, and weights are frozen, as those of a fused layer are."""
    device = weights[0].device
    if device.type == "meta" or any(t.requires_grad for t in weights):
        return False
    return all(
        type(t) in PLAIN and t.device == device and not hasattr(t, "ds_id")
        for t in (*weights, *others)
    )


def tensors_of(weight):
    return weight.tensors if hasattr(weight, "tensors") else (weight,)


def widened(magnitude):
    """Its weight in fp32, which a magnitude that somebody has cast behind our back gets again.

    Under a policy of FSDP2 the cast may be for this call alone, and the parameter is left alone.
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


def follow(optimizer, args, kwargs):
    """Widens what an optimizer has kept of a magnitude from before it was widened."""
    for weight in [reference() for reference in WIDENED.values()]:
        state = {} if weight is None else optimizer.state.get(weight, {})
        for key, value in state.items():
            if (
                isinstance(value, torch.Tensor)
                and value.dtype in HALF
                and value.shape == weight.shape
            ):
                state[key] = value.float()


def moved(*args):
    global _moves
    _moves += 1


register_optimizer_step_pre_hook(follow)
register_optimizer_step_post_hook(moved)


def loaded(layer, incompatible_keys):
    layer.refresh_gains()


def refresh(model):
    """Computes the norms of all DoRA layers of a model anew, and returns the model.

    Calls that train, and calls of more than one position, compute the norm themselves. What is kept from them serves
    the tokens that follow, until an optimizer steps, the model's mode changes, or a weight does in a way that torch
    counts. So refresh is only needed before a call of a single position (as the first token of an empty prompt), or
    before a compiled one with a frozen adapter, where weights were written through `.data` or a raw pointer.
    """
    for layer in model.modules():
        if isinstance(layer, Normed) and layer.magnitudes():
            layer.keep_gains()
    return model


@contextmanager
def checked_norms():
    """Inside, a DoRA layer that would take a kept norm computes it, and raises RuntimeError where another is kept."""
    CHECKING.append(True)
    try:
        yield
    finally:
        CHECKING.pop()
