"""What somebody has hung on a module: hooks, which wait for a call of it, and a forward in the place of its class's.

And how a layer becomes one of another class, and PEFT's again.
"""

from ..nn.dora import Normed


def hooked(part):
    """Somebody waits for a call of this module, and the fused path calls none."""
    state = vars(part)
    return (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def hung(layer):
    """Whether the instance has a forward of its own, which is called in place of its class's.

    accelerate sets one when it dispatches a model, and calls the one before as `_old_forward`, which `become` changes.
    """
    return "forward" in vars(layer) and not follows(layer)


def follows(layer):
    return getattr(vars(layer).get("_old_forward"), "__func__", None) is type(layer).forward


def become(layer, kind):
    """Makes the layer one of this class, and what accelerate calls its forward."""
    following = follows(layer)
    layer.__class__ = kind
    if following:
        layer._old_forward = kind.forward.__get__(layer)


def restore(layer, kind):
    """Makes the layer one of this class again; where that is PEFT's, nothing of ours is left on it.

    The class changes first: a call that another thread is in the middle of looks at it after each thing that it leaves
    on the layer, and takes that away again where the class is not ours.
    """
    ours = isinstance(layer, Normed) and not issubclass(kind, Normed)
    become(layer, kind)
    if ours:
        vars(layer).pop("_peftops_calls", None)
        Normed.forget_gains(layer)
