"""DoRA's gain, magnitude / norm, and when a layer may reuse one.

A weight can change without a layer's notice: optimizers over flat copies, averages, `.data`, raw
pointers. So a call that trains, or that has more than one position, computes its norm. This costs
one more read of the weight. For a generated token that would be the price of the whole layer, so it
takes the gain that the prompt's call has kept, if the stamp of that gain is unchanged.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..functional import Base, dora_weight_norm
from ..ops.dora import no_zeros
from ..ops.lora_formula import by_formula
from .dora_magnitude import HALF, Magnitude, widened

if TYPE_CHECKING:
    from typing_extensions import Self

Weight = Tensor | Base
Operands = tuple[Weight, Tensor, Tensor, float]  # weight, lora_A, lora_B, scaling
PLAIN = torch.Tensor, nn.Parameter
# One entry for each checked_norms() that some thread is inside of.
CHECKING: list[bool] = []
# Counts steps of optimizers and changes of mode. No norm that was kept before either is trusted.
_moves = 0


class Normed(nn.Module):
    """A layer that keeps the gains of its DoRA adapters.

    It has lora_A, lora_B and lora_magnitude_vector of each adapter. A magnitude stays in fp32 when
    the model is cast to 16 bits: in bf16, an optimizer's step is too small to change it.
    """

    if TYPE_CHECKING:
        _modules: dict[str, Any]

    def operands(self, name: str) -> Operands | None:
        """(weight, lora_A, lora_B, scaling) for dora_weight_norm of one adapter.

        None where the adapter has no norm.
        """
        raise NotImplementedError

    def computes_in(self) -> torch.dtype:
        """The dtype of the product that the norm is for."""
        raise NotImplementedError

    def magnitudes(self) -> dict[str, Magnitude]:
        """{name of an adapter: its Magnitude} of the DoRA adapters."""
        if "lora_magnitude_vector" not in self._modules:
            return {}
        return dict(self._modules["lora_magnitude_vector"].items())

    def keep_gains(self) -> None:
        """From now on, keeps the gains of all adapters. Those kept before are refreshed."""
        if loaded not in self._load_state_dict_post_hooks.values():
            self.register_load_state_dict_post_hook(loaded)
        self.refresh_gains()

    def forget_gains(self) -> None:
        """Undoes keep_gains."""
        for key, hook in [*self._load_state_dict_post_hooks.items()]:
            if hook is loaded:
                del self._load_state_dict_post_hooks[key]
        Normed.drop_gains(self)

    def drop_gains(self) -> None:
        """Removes what calls have left on the layer, whose class may be another already."""
        for magnitude in Normed.magnitudes(self).values():
            magnitude._buffers.pop("gain", None)
            magnitude._non_persistent_buffers_set.discard("gain")
            vars(magnitude).pop("gain_of", None)
        vars(self).pop("_peftops_norms", None)

    @torch.no_grad()
    def refresh_gains(self) -> None:
        """Computes the gains of all adapters whose weights are whole outside of a forward."""
        for name, magnitude in self.magnitudes().items():
            weight = widened(magnitude)
            operands = self.operands(name)
            magnitude.gain_of = None
            if operands is None:
                continue
            base_weight, a, b, _ = operands
            if ready(tensors_of(base_weight), weight, a, b):
                gain = self.computed(type(self), weight, operands)
                keep(magnitude, gain, stamp(weight, *operands))

    def gain(
        self, layer_class: type["Normed"], name: str, x: Tensor, *operands: Any
    ) -> Tensor:
        """The gain (n,) of one adapter for a call with x, differentiable in the magnitude.

        Args:
            layer_class: the layer's class when the call began. Another thread may change it before
                the call ends.
            name: the adapter.
            x: the input (..., k); only its shape is read.
            operands: weight, lora_A, lora_B and scaling of this call.

        Raises:
            RuntimeError: inside checked_norms, the kept gain is of other weights.
        """
        magnitude = self._modules["lora_magnitude_vector"]._modules[name]
        weight = magnitude._parameters[
            "weight"
        ]  # every token reads it; __getattr__ is slower
        if weight.dtype in HALF:
            weight = widened(magnitude)
        _, a, b, _ = operands
        training = torch.is_grad_enabled() and (
            weight.requires_grad or a.requires_grad or b.requires_grad
        )
        if training or by_formula():
            return layer_class.computed(self, layer_class, weight, operands)
        if torch.compiler.is_compiling():
            return layer_class.traced_gain(
                self, layer_class, magnitude, weight, x, operands
            )
        now = stamp(weight, *operands)
        known = (
            now is not None
            and vars(magnitude).get("gain_of") == now
            and one_position(x)
            and not sharded()
        )
        # unpatch in another thread may have taken the buffer away by now.
        kept = magnitude._buffers.get("gain") if known else None
        if kept is None:
            gain = layer_class.computed(self, layer_class, weight, operands)
            keep(magnitude, gain, now)
            return gain
        if CHECKING and not same(
            kept, layer_class.computed(self, layer_class, weight, operands)
        ):
            raise RuntimeError(
                f"dora: the norm of {name} is of other weights; "
                "call peftops.refresh after a change"
            )
        return kept

    def traced_gain(
        self,
        layer_class: type["Normed"],
        magnitude: Magnitude,
        weight: Tensor,
        x: Tensor,
        operands: Operands,
    ) -> Tensor:
        """The gain under torch.compile, where no stamp can be compared.

        A kept gain serves one position of a frozen adapter; all other calls compute theirs.
        """
        _, a, b, _ = operands
        frozen = "gain" in magnitude._buffers and not (
            a.requires_grad or b.requires_grad
        )
        if frozen and one_position(x):
            return magnitude.gain
        gain = layer_class.computed(self, layer_class, weight, operands)
        if frozen:
            magnitude.gain.copy_(gain)
        return gain

    def computed(
        self, layer_class: type["Normed"], weight: Tensor, operands: Operands
    ) -> Tensor:
        """The gain of these weights, computed now. `report` counts it outside of torch.compile."""
        if not torch.compiler.is_compiling():
            vars(self)["_peftops_norms"] = vars(self).get("_peftops_norms", 0) + 1
        return weight / norm_of(*operands, layer_class.computes_in(self))

    def train(self, mode: bool = True) -> "Self":
        moved()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        kept = {
            magnitude: magnitude.weight.data for magnitude in self.magnitudes().values()
        }
        super()._apply(fn, recurse)
        for magnitude, before in kept.items():
            now = magnitude.weight
            if now.dtype not in HALF or before.dtype in HALF:
                continue
            if now.is_meta:
                now.data = now.data.to(before.dtype)
            else:
                now.data = before.to(now.device)
        if any("gain" in magnitude._buffers for magnitude in kept):
            self.refresh_gains()
        return self


def norm_of(
    weight: Weight, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    """The norm (n,), a constant: the weight is frozen and the adapters are detached.

    Autocast is left only where it is on: an exported graph would hold the context.
    """
    a, b = a.detach(), b.detach()  # this keeps forward-mode AD out, too
    if dtype is torch.float32:
        a, b = a.float(), b.float()
    device_type = a.device.type
    if torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            norm = dora_weight_norm(weight, a, b, scaling=scaling, dtype=dtype)
            return no_zeros(norm)
    return no_zeros(dora_weight_norm(weight, a, b, scaling=scaling, dtype=dtype))


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two gains are equal; NaN equals itself."""
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def keep(magnitude: Magnitude, gain: Tensor, gain_stamp: tuple | None) -> None:
    """Copies a gain and its stamp to the magnitude.

    It is copied in place where a buffer fits, since graphs read that buffer. Autograd has not saved
    the buffer for any backward: a call that trains has a gain of its own.
    """
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
    magnitude.gain_of = gain_stamp


def stamp(
    magnitude: Tensor, weight: Weight, a: Tensor, b: Tensor, scaling: float
) -> tuple | None:
    """Identifies the weights that a gain is of, as far as versions and addresses show.

    None where they do not show a change: a gain without a stamp is never reused.
    """
    if type(a) is not nn.Parameter or type(b) is not nn.Parameter:
        return None  # views that somebody has made for this call
    try:
        return (
            _moves,
            scaling,
            [
                (t.data_ptr(), t._version)
                for t in (magnitude, a, b, *tensors_of(weight))
            ],
        )
    except RuntimeError:
        return None  # tensors of inference_mode count no versions


def one_position(x: Tensor) -> bool:
    """Whether x (..., k) is one token of each sequence."""
    return (x.shape[-2] if x.dim() > 1 else 1) == 1


def sharded() -> bool:
    """Whether FSDP2 is at work in this process.

    What it gathers has the same versions as what it gathered before, so stamps show no change.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return hasattr(fsdp, "FSDPModule") and bool(fsdp.FSDPModule.__subclasses__())


def ready(weights: Sequence[Tensor], *others: Tensor) -> bool:
    """Whether a norm can be computed of these outside of a forward.

    The weights must be frozen, as those of a fused layer are, and there: not on the meta device,
    sharded by FSDP2 or ZeRO-3, or brought by a hook.
    """
    device = weights[0].device
    if device.type == "meta" or any(t.requires_grad for t in weights):
        return False
    return all(
        type(t) in PLAIN and t.device == device and not hasattr(t, "ds_id")
        for t in (*weights, *others)
    )


def tensors_of(weight: Weight) -> Sequence[Tensor]:
    """The tensors that a weight consists of: several for a Base in 4 bits."""
    return weight.tensors if hasattr(weight, "tensors") else (weight,)


def moved(*args: Any) -> None:
    """No kept norm is trusted any more. A hook after each step of an optimizer, too."""
    global _moves
    _moves += 1


def moves() -> int:
    """How often optimizers have stepped or models have changed their mode: see `moved`."""
    return _moves


register_optimizer_step_post_hook(moved)


def loaded(layer: Normed, incompatible_keys: Any) -> None:
    """A hook after load_state_dict: the gains follow the new weights."""
    layer.refresh_gains()


def refresh(model: nn.Module) -> nn.Module:
    """Computes the norms of all DoRA layers of a model anew.

    The norm of row n is ‖W[n] + scaling · (B·A)[n]‖₂.

    Calls that train, and calls of more than one position, compute the norm themselves. The tokens
    that follow reuse it, until an optimizer steps, the model's mode changes, or a weight changes in
    a way that torch counts. So refresh is only needed where weights were written through `.data` or
    a raw pointer, and then only before a call of a single position (such as the first token of an
    empty prompt) or a compiled call with a frozen adapter.

    Args:
        model: a model with patched PEFT layers or LoRALinear layers, changed in place. Layers
            without DoRA are skipped.

    Returns:
        The model.

    Source: Liu et al., DoRA, arXiv 2402.09353.
    """
    for layer in model.modules():
        if isinstance(layer, Normed) and layer.magnitudes():
            layer.keep_gains()
    return model


@contextmanager
def checked_norms() -> Iterator[None]:
    """Inside, a DoRA layer that would reuse a norm computes it too, and compares the two.

    It finds a missing `refresh`. Calls cost as much as if no norm were kept.

    Raises:
        RuntimeError: in a layer's call, where the kept norm is not that of its weights.
    """
    CHECKING.append(True)
    try:
        yield
    finally:
        CHECKING.pop()
