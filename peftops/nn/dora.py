"""DoRA's norms: a buffer beside each magnitude, which forward only reads and an optimizer's step refreshes."""

import weakref
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..functional import dora_weight_norm
from ..ops.dora import no_zeros

LAYERS = weakref.WeakSet()  # whose norms are kept
PLAIN = torch.Tensor, nn.Parameter
HALF = torch.bfloat16, torch.float16
_hook, _checked = None, False


class Magnitude(nn.Module):
    """The lengths of a weight's rows, under the key of PEFT's layer."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)


class Normed(nn.Module):
    """A layer with lora_A, lora_B and lora_magnitude_vector of each adapter, and so with norms to keep.

    A magnitude stays in fp32, whatever the model is cast to: in bf16 a step is too small to change it.
    """

    def operands(self, name):
        """(weight, lora_A, lora_B, scaling, dtype) for dora_weight_norm of one adapter; None where it has no norm."""
        raise NotImplementedError

    def magnitudes(self):
        return dict(self._modules["lora_magnitude_vector"].items()) if "lora_magnitude_vector" in self._modules else {}

    def keep_norms(self):
        """From now on, norms of all adapters are kept; what has been kept before is refreshed."""
        watch(self)
        hooks = self._load_state_dict_post_hooks
        if loaded not in hooks.values():
            self.register_load_state_dict_post_hook(loaded)
        self.refresh_norms()

    def forget_norms(self):
        LAYERS.discard(self)
        for key in [key for key, hook in self._load_state_dict_post_hooks.items() if hook is loaded]:
            del self._load_state_dict_post_hooks[key]
        for magnitude in self.magnitudes().values():
            magnitude._buffers.pop("norm", None)
            magnitude._non_persistent_buffers_set.discard("norm")
            vars(magnitude).pop("norm_of", None)
        vars(self).pop("_peftops_norms", None)

    @torch.no_grad()
    def refresh_norms(self, stepped=None):
        """Those whose adapters are among `stepped`, ids of parameters, or all."""
        for name, magnitude in self.magnitudes().items():
            found = self.operands(name)
            if found is None:  # as of a base that FSDP2 has sharded: what is kept may be old by now
                magnitude.norm_of = None
                continue
            if stepped is not None and not {id(found[1]), id(found[2])} & stepped:
                continue
            weight, a, b, scaling, _ = found
            if magnitude.weight.dtype in HALF:  # cast behind our back
                magnitude.weight.data = magnitude.weight.data.float()
            if "norm" not in magnitude._buffers:
                magnitude.register_buffer("norm", torch.empty_like(magnitude.weight), persistent=False)
            magnitude.norm_of = scaling if ready(tensors_of(weight), magnitude.weight, a, b) else None
            if magnitude.norm_of is not None:
                norm = computed(*found)
                kept = norm if magnitude.norm.is_meta else magnitude.norm
                magnitude.norm = kept.to(norm.device, norm.dtype)
                magnitude.norm.copy_(norm)
                vars(self)["_peftops_norms"] = vars(self).get("_peftops_norms", 0) + 1

    def lengths(self, name, scaling):
        """(magnitude, norm) of dora_linear for this adapter; None for a norm that has to be computed in this call."""
        magnitude = self._modules["lora_magnitude_vector"]._modules[name]
        weight = magnitude._parameters["weight"]  # of a module's attributes the one that every token reads
        norm = self.norm(name, magnitude, weight, scaling)
        return weight.float() if weight.dtype in HALF else weight, norm

    def norm(self, name, magnitude, weight, scaling):
        if torch.compiler.is_compiling():
            return magnitude.norm if getattr(magnitude, "norm_of", None) == scaling else None
        half = weight.dtype in HALF
        if half and dist.is_available() and dist.is_initialized():
            return None  # a cast that FSDP2's policy of mixed precision wants, for this call
        if half or "norm" not in magnitude._buffers:
            self.keep_norms()
        elif magnitude.norm_of != scaling and magnitude.norm_of is not None:
            self.refresh_norms()
        if magnitude.norm_of is None:
            return None
        if _checked and not torch.equal(computed(*self.operands(name)).nan_to_num(-1), magnitude.norm.nan_to_num(-1)):
            raise RuntimeError(f"dora: the norm of {name} is of other weights; call peftops.refresh after a change")
        return magnitude._buffers["norm"]

    def _apply(self, fn, recurse=True):
        kept = {magnitude: magnitude.weight.data for magnitude in self.magnitudes().values()}
        super()._apply(fn, recurse)
        for magnitude, before in kept.items():
            now = magnitude.weight
            if now.dtype in HALF and before.dtype not in HALF:
                now.data = now.data.to(before.dtype) if now.is_meta else before.to(now.device)
        if self in LAYERS:
            self.refresh_norms()
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        if any("norm" in magnitude._buffers for magnitude in self.magnitudes().values()):
            watch(self)


@torch.no_grad()
def computed(weight, a, b, scaling, dtype):
    if dtype is torch.float32:
        a, b = a.float(), b.float()
    with torch.autocast(a.device.type, enabled=False):
        return no_zeros(dora_weight_norm(weight, a, b, scaling=scaling, dtype=dtype))


def ready(weights, *others):
    """Whether a norm can be made of these outside a forward: FSDP2 and ZeRO-3 have sharded none, no hook has to bring
    one, and weights are frozen, as those of a fused layer are."""
    device = weights[0].device
    if device.type == "meta" or any(t.requires_grad for t in weights):
        return False
    return all(type(t) in PLAIN and t.device == device and not hasattr(t, "ds_id") for t in (*weights, *others))


def tensors_of(weight):
    return weight.tensors if hasattr(weight, "tensors") else (weight,)


def watch(layer):
    global _hook
    LAYERS.add(layer)
    _hook = _hook or register_optimizer_step_post_hook(stepped)


def stepped(optimizer, args, kwargs):
    if LAYERS:
        parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for layer in tuple(LAYERS):
            layer.refresh_norms(parameters)


def loaded(layer, incompatible_keys):
    layer.refresh_norms()


def refresh(model):
    """Computes the norms of all DoRA layers of a model anew, and returns the model.

    Steps of any torch.optim.Optimizer, load_state_dict and .to() do it themselves. Call it after weights have changed
    in another way: by hand, by an average of weights, or by an optimizer that is none of torch's or whose parameters
    are copies of the model's. Parameters that FSDP2 has sharded have their norm computed in every forward.
    """
    for layer in model.modules():
        if isinstance(layer, Normed) and layer.magnitudes():
            layer.keep_norms()
    return model


@contextmanager
def checked_norms():
    """Inside, every forward of a DoRA layer computes its norm, and raises RuntimeError where another is kept."""
    global _checked
    before, _checked = _checked, True
    try:
        yield
    finally:
        _checked = before
