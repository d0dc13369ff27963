"""What patch and report have to know of FSDP2: a sharded layer is judged as it is in its forward, not outside of it."""

import sys
from contextlib import contextmanager

from torch import nn


@contextmanager
def gathered(model):
    """Inside, parameters that FSDP2 has sharded are plain, as in forward, though only this rank's part of them.

    Those of a part that is sharded by itself stay as they are: no forward of a whole layer sees them gathered.
    """
    fsdp, sharded = sys.modules.get("torch.distributed.fsdp"), []
    modules = list(model.modules())
    if fsdp and any(isinstance(module, fsdp.FSDPModule) for module in modules):
        groups = [vars(module)["_parameters"] for module in modules if not isinstance(module, fsdp.FSDPModule)]
        sharded = [(group, name, p) for group in groups for name, p in group.items() if hasattr(p, "to_local")]
    try:
        for group, name, p in sharded:
            group[name] = nn.Parameter(p.detach().to_local(), p.requires_grad)
        yield
    finally:
        for group, name, p in sharded:
            group[name] = p
