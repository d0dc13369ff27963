"""The model of a checkpoint on the meta device: modules and parameters without values."""

import warnings
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..._errors import sentence
from .folder import CONFIG

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Header = dict[str, tuple[str, tuple[int, ...]]]  # key -> (dtype, shape)
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# A stacked tensor of a checkpoint may be as many experts of the model.
PARAMETERS_PER_TENSOR = 64
PARAMETERS = 10_000


def make_on_meta(
    folder: Path, tensors: Header
) -> "tuple[PreTrainedModel, torch.dtype]":
    """Makes the model as transformers would.

    Args:
        folder: that of the checkpoint.
        tensors: {key: (dtype, shape)} of its shards.

    Returns:
        The model, and the dtype in which it is loaded.

    Raises:
        ValueError: transformers cannot make it, or it is far larger than the tensors.
    """
    import transformers

    try:
        from transformers.initialization import (
            meta_device_safe_creation_ops,
            no_tie_weights,
        )
        from transformers.modeling_utils import local_torch_dtype
    except ImportError:
        raise ValueError(
            f"transformers must be 5.0 or newer, got {transformers.__version__}"
        ) from None
    most = PARAMETERS + PARAMETERS_PER_TENSOR * len(tensors)
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        # Another implementation may be code that is fetched from the hub.
        config._attn_implementation = "eager"
        stored = (DTYPES[dtype] for dtype, _ in tensors.values() if dtype in DTYPES)
        dtype: Any = config.dtype or next(stored, None)
        if dtype not in DTYPES.values():
            raise ValueError(f"it must be in float32, float16 or bfloat16, got {dtype}")
        with ExitStack() as stack:
            stack.enter_context(torch.device("meta"))
            stack.enter_context(local_torch_dtype(dtype))
            stack.enter_context(no_tie_weights())
            stack.enter_context(meta_device_safe_creation_ops())
            stack.enter_context(bounded_parameters(most))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            model = make_model(config)
    except Exception as error:  # a model's own code may raise anything
        raise ValueError(
            f"transformers cannot make the model of {folder}: {sentence(error)}"
        ) from None
    return model, dtype


def make_model(config: "PretrainedConfig") -> "PreTrainedModel":
    """A model of the class that config names. Code that comes with a model never runs."""
    import transformers

    named = getattr(transformers, (config.architectures or [""])[0], None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named(config)
    return transformers.AutoModelForCausalLM.from_config(
        config, trust_remote_code=False
    )


def bounded_parameters(most: int) -> AbstractContextManager:
    """A context in which making a model of more parameters fails."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    made = 0

    def count(module, name, parameter):
        nonlocal made
        made += 1
        if made > most:
            raise ValueError(
                f"{CONFIG} asks for more than {most} parameters, "
                "far more than the tensors of the weights"
            )

    return register_module_parameter_registration_hook(count)
