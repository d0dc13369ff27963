"""Adapters from memory, for a running engine of vLLM."""

import itertools
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...adapter_file.config import fields_of
from .plugin import chosen

FOLDER = "/peftops"  # where adapters from memory pretend to be: it never exists
FIRST_ID = 1 << 20  # of adapters from memory; people count theirs from 1
IDS = itertools.count(FIRST_ID)


def load_lora(
    llm: Any,
    name: str,
    tensors: Mapping[str, Tensor],
    config: Any,
) -> Any:
    """Loads an adapter from memory into a running engine, without files.

    Every call makes a new version, which has an id and a name of its own: requests that are under
    way go on with the version they began with, and no cache takes one for another. The workers
    keep it, so that vLLM may drop its copy and load it again, until it is removed by
    `llm.llm_engine.remove_lora(request.lora_int_id)`.

    Args:
        llm: a vllm.LLM, made with enable_lora and additional_config={"peftops": True}.
        name: of the adapter.
        tensors: as peft.get_peft_model_state_dict names them, on any device.
        config: the adapter's LoraConfig, or its fields as a dict.

    Returns:
        The LoRARequest to generate with.

    Raises:
        ValueError: the engine was made without the plugin or without LoRA.
        TypeError: config or tensors are of another type.
        Exception: what vLLM raises for an adapter that it refuses; nothing has changed then.
    """
    engine = llm.llm_engine
    request, staged = staged_for(engine.vllm_config, name, tensors, config)
    engine.collective_rpc("peftops_stage", args=staged)
    try:
        engine.add_lora(request)
    except BaseException:
        engine.remove_lora(request.lora_int_id)
        raise
    return request


async def load_lora_async(
    engine: Any, name: str, tensors: Mapping[str, Tensor], config: Any
) -> Any:
    """load_lora for a vllm.AsyncLLM."""
    request, staged = staged_for(engine.vllm_config, name, tensors, config)
    await engine.collective_rpc("peftops_stage", args=staged)
    try:
        await engine.add_lora(request)
    except BaseException:
        await engine.remove_lora(request.lora_int_id)
        raise
    return request


def staged_for(
    engine: Any,
    name: str,
    tensors: Any,
    config: Any,
) -> tuple[Any, tuple]:
    """The request for a new version of an adapter, and what `stage` takes.

    Args:
        engine: its VllmConfig.
    """
    from safetensors.torch import save
    from vllm.lora.request import LoRARequest

    if not chosen(engine):
        raise ValueError(
            'load_lora: llm must be made with additional_config={"peftops": True}'
        )
    if engine.lora_config is None:
        raise ValueError("load_lora: llm must be made with enable_lora=True")
    if not isinstance(tensors, Mapping) or not tensors:
        got = type(tensors).__name__
        raise TypeError(f"load_lora: tensors must be a dict of tensors, got {got}")
    text = json.dumps(fields_of(config, "load_lora"), default=str)
    number = next(IDS)
    version = f"{name}@{number - FIRST_ID + 1}"
    request = LoRARequest(version, number, f"{FOLDER}/{version}")
    data = save({key: t.detach().contiguous().cpu() for key, t in tensors.items()})
    return request, (request.lora_path, number, text, data)
