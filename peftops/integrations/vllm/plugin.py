"""How vLLM comes to use the plugin. All that is added to vLLM is added here."""

import functools
import warnings
from collections.abc import Mapping
from typing import Any

from .layers import Embedding, Head, Linear, Slots, can_pool, can_serve, extended
from .staged import STAGED, expect_shapes, stage

TESTED = "0.32."  # the versions of vLLM whose layers are known
WRAPPER = f"{__name__}.peftops_punica_wrapper"  # vLLM logs the last part
ORIGINAL: dict[str, str] = {}  # vLLM's own wrapper, by the platform's name


def register() -> None:
    """Lets engines choose the plugin. vLLM calls it in each of its processes."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    name = platform.__name__
    if name in ORIGINAL:
        return
    ORIGINAL[name] = platform.get_punica_wrapper()

    def get_punica_wrapper(cls) -> str:
        return WRAPPER if chosen() else ORIGINAL[name]

    platform.get_punica_wrapper = classmethod(get_punica_wrapper)


def chosen(config: Any = None) -> bool:
    """Whether an engine asks for the plugin; without a config, the one that is being made.

    Raises:
        ValueError: it asks for something else.
    """
    from vllm.config import get_current_vllm_config

    more = (config or get_current_vllm_config()).additional_config
    asked = more.get("peftops", False) if isinstance(more, Mapping) else False
    if not isinstance(asked, bool):
        raise ValueError(
            f"additional_config: peftops must be true or false, got {asked!r}"
        )
    return asked


def peftops_punica_wrapper(*args: Any, **kwargs: Any) -> Any:
    """What vLLM calls for its punica wrapper."""
    from vllm.config import get_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname

    install()
    theirs = resolve_obj_by_qualname(ORIGINAL[type(current_platform).__name__])
    wrapper = extended(theirs)(*args, **kwargs)
    wrapper.dtype = get_current_vllm_config().model_config.dtype
    return wrapper


@functools.cache
def install() -> None:
    """Adds to vLLM what engines with the plugin need, and what all others never meet."""
    import msgspec
    import vllm
    from vllm.lora.layers import BaseLayerWithLoRA
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.v1.worker.worker_base import WorkerBase

    if not vllm.__version__.startswith(TESTED):
        warnings.warn(
            f"peftops: tested with vLLM {TESTED}*, this is {vllm.__version__}",
            stacklevel=2,
        )
    set_mapping = BaseLayerWithLoRA.set_mapping
    load = WorkerLoRAManager._load_adapter
    remove = WorkerLoRAManager.remove_adapter

    def set_mapping_and_adopt(layer, wrapper):
        set_mapping(layer, wrapper)
        if isinstance(wrapper, Slots):
            adopt(layer, wrapper)

    def load_and_check(manager, request):
        if request.lora_path in STAGED:
            with STAGED[request.lora_path].folder() as folder:
                adapter = load(
                    manager, msgspec.structs.replace(request, lora_path=folder)
                )
        else:
            adapter = load(manager, request)
        expect_shapes(request.lora_name, adapter, manager._adapter_manager)
        return adapter

    def remove_staged(manager, adapter_id):
        for path in [path for path, each in STAGED.items() if each.id == adapter_id]:
            del STAGED[path]
        return remove(manager, adapter_id)

    BaseLayerWithLoRA.set_mapping = set_mapping_and_adopt
    WorkerLoRAManager._load_adapter = load_and_check
    WorkerLoRAManager.remove_adapter = remove_staged
    WorkerBase.peftops_stage = stage


def adopt(layer: Any, wrapper: Any) -> None:
    """Gives a layer what serves it from now on, in the place of the wrapper."""
    from vllm.lora.layers import (
        ClassificationHeadWithLoRA,
        LogitsProcessorWithLoRA,
        VocabParallelEmbeddingWithLoRA,
    )
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    on_cpu = wrapper.table.device.type == "cpu"
    if isinstance(layer, LogitsProcessorWithLoRA):
        if can_pool([layer.lora_a_stacked], wrapper.dtype):
            layer.punica_wrapper = Head(wrapper, layer)
    elif isinstance(layer, VocabParallelEmbeddingWithLoRA):
        if on_cpu:  # a CUDA graph cannot leave it out
            layer.punica_wrapper = Embedding(wrapper, layer)
    elif isinstance(layer, BaseLinearLayerWithLoRA):
        whole = isinstance(layer, ClassificationHeadWithLoRA)
        if not whole and can_serve(layer, wrapper.dtype):
            layer.punica_wrapper = Linear(wrapper, layer)
