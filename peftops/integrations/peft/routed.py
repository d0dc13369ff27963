"""adapter_names: each LoRA layer is told the adapter of each sample, in training too.

Generation tells its layers the adapter of each beam and of each returned sequence.

Blocks that are checkpointed run a second time, in backward, and are told again. PEFT tells its
layers by hooks that it removes when the model's forward returns. A block that runs again after that
would train the active adapter, whatever the names were.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...nn.multi import copies_of_samples
from . import layer_merge
from .call import in_backward
from .layer import FusedLinear, Patched, become
from .mixed import remembered


class RoutedModel(Patched, LoraModel):
    """PEFT's LoraModel, which takes adapter_names in training too, and for copies of samples."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None or kwargs.get("alora_offsets") is not None:
            # not super(): another thread may restore the class in between
            with LoraModel._enable_peft_forward_hooks(self, *args, **kwargs):
                yield
            return
        if not isinstance(names, (list, tuple)):
            raise TypeError(
                f"Got adapter names of type {type(names)}, expected a list of str."
            )
        modules = [*modules_of(self)]
        expect_known(modules, names)
        with (
            told(modules, names),
            bound(modules, names),
            copied(self.model, modules, names),
        ):
            yield

    def unmerge_adapter(self) -> None:
        for name, layer in self.model.named_modules():
            if isinstance(layer, FusedLinear) and (why := layer_merge.fault(layer)):
                raise ValueError(f"unmerge: {name} cannot be unmerged: {why}")
        LoraModel.unmerge_adapter(self)

    def refusal(self) -> str | None:
        if type(self) is not RoutedModel:
            return f"has been made a {type(self).__name__} since patch"
        return None

    def restore(self) -> None:
        become(self, LoraModel)


def expect_known(modules: Sequence[nn.Module], names: Sequence[str]) -> None:
    """Raises PEFT's ValueError for names of adapters that no layer has."""
    known = {"__base__"}
    for layer in modules:
        if isinstance(layer, LoraLayer):
            known |= layer.lora_A.keys()
            known |= layer.lora_embedding_A.keys()
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}"
        )


def modules_of(module: nn.Module) -> Iterator[nn.Module]:
    """The module and those below it, without what a LoRA layer is made of.

    With many adapters the parts of LoRA layers are nearly all modules of a model.
    """
    seen = set()
    left: list[nn.Module | None] = [module]
    while left:
        found = left.pop()
        if found is None or found in seen:
            continue
        seen.add(found)
        yield found
        if not isinstance(found, LoraLayer):
            left += found._modules.values()


@contextmanager
def told(modules: Sequence[nn.Module], names: Sequence[str]) -> Iterator[None]:
    """Inside, every LoRA layer among the modules gets the argument adapter_names, as PEFT's do."""
    route = tuple(names)

    def tell(layer, args, kwargs):
        return args, kwargs | {"adapter_names": route}

    handles = []
    try:
        for layer in modules:
            if isinstance(layer, (LoraLayer, AuxiliaryTrainingWrapper)):
                hook = layer.register_forward_pre_hook(tell, with_kwargs=True)
                handles.append(hook)
        with remembered(route):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def copied(
    model: Any, modules: Sequence[nn.Module], names: Sequence[str]
) -> Iterator[None]:
    """Inside, model.generate tells the layers of a decoder the name of each copy of a sample.

    Beams and returned sequences are such copies. An encoder sees each sample once.
    """
    if not hasattr(model, "generate") or torch.compiler.is_compiling():
        yield
        return
    own = vars(model).get("generate")
    generate = model.generate
    inside = True  # a call in another thread may put the function back after the end

    def generate_copies(*args, **kwargs):
        copies = copies_of_samples(model, args, kwargs)
        if copies == 1 or not inside:
            return generate(*args, **kwargs)
        encoder = model.get_encoder() if hasattr(model, "get_encoder") else model
        encoding = set() if encoder in (None, model) else {*encoder.modules()}
        decoding = [module for module in modules if module not in encoding]
        with told(decoding, [name for name in names for _ in range(copies)]):
            return generate(*args, **kwargs)

    model.generate = generate_copies
    try:
        yield
    finally:
        inside = False
        if vars(model).get("generate") is generate_copies:
            del model.generate
            if own is not None:
                model.generate = own


@contextmanager
def bound(modules: Sequence[nn.Module], names: Sequence[str]) -> Iterator[None]:
    """Inside, those of the modules that are checkpointed are told the names when they run again."""
    blocks: list[Any] = [
        module
        for module in modules
        if getattr(module, "gradient_checkpointing", False)
        and "_gradient_checkpointing_func" in vars(module)
    ]
    before = [block._gradient_checkpointing_func for block in blocks]
    try:
        # dynamo traces what a checkpoint runs, and then there is nothing to tell again
        if not torch.compiler.is_compiling():
            for block, checkpoint in zip(blocks, before, strict=True):
                block._gradient_checkpointing_func = partial(
                    checkpointed, checkpoint, modules, names
                )
        yield
    finally:
        for block, checkpoint in zip(blocks, before, strict=True):
            block._gradient_checkpointing_func = checkpoint


def checkpointed(
    checkpoint: Callable[..., Any],
    modules: Sequence[nn.Module],
    names: Sequence[str],
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """checkpoint(function, ...), whose layers are told the names when it runs in backward."""

    def run(*args, **kwargs):
        if not in_backward():
            return function(*args, **kwargs)
        block = block_of(function)
        with told(modules if block is None else [*modules_of(block)], names):
            return function(*args, **kwargs)

    return checkpoint(run, *args, **kwargs)


def block_of(function: Callable[..., Any]) -> nn.Module | None:
    """The module that a checkpointed function runs: a partial of its forward, or a method of it."""
    if isinstance(function, partial):
        block = function.args[0] if function.args else None
        block = block or getattr(function.func, "__self__", None)
    else:
        block = getattr(function, "__self__", None)
    return block if isinstance(block, nn.Module) else None
