"""FSDP2: a sharded layer is judged as it is inside its forward, where its parameters are whole."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, parameters that FSDP2 shards are plain tensors: this rank's shards of them.

    A child of a layer that is sharded by itself stays as it is: the layer's forward never sees it
    gathered.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    modules = list(model.modules())
    sharded: list[tuple[dict, str, Any]] = []  # (_parameters, name, DTensor)
    if fsdp and any(isinstance(module, fsdp.FSDPModule) for module in modules):
        for module in modules:
            if isinstance(module, fsdp.FSDPModule):
                continue
            for name, parameter in module._parameters.items():
                if hasattr(parameter, "to_local"):
                    sharded.append((module._parameters, name, parameter))
    try:
        for group, name, parameter in sharded:
            group[name] = nn.Parameter(
                parameter.detach().to_local(), parameter.requires_grad
            )
        yield
    finally:
        for group, name, parameter in sharded:
            group[name] = parameter
