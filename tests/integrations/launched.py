"""A training run under a launcher, for test_distributed.py.

It dies after two steps, or resumes a run that did.
"""

import os
import signal
import sys

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from on_ranks import adam, by_accelerate, load, save, steps
from tiny import pair

import peftops


def start(method):
    """A sharded model and its optimizer. The plugin reads the launcher's configuration."""
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2, plugin
    assert "transformer" in plugin.auto_wrap_policy.__name__, plugin
    model = by_accelerate(peftops.patch(pair(method, lora_dropout=0.3)[1]), plugin)
    return model, adam(model)


def main(folder, dies):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for method in ("qlora", "dora"):
        model, optimizer = start(method)
        if dies:
            steps(model, optimizer, 2)
            save(model, optimizer, f"{folder}/{method}")
            continue
        load(model, optimizer, f"{folder}/{method}")
        resumed = steps(model, optimizer, 2, first=2)
        uninterrupted = steps(*start(method), 4)
        assert resumed == uninterrupted[2:], (method, resumed, uninterrupted)
    if dies:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        steps(model, optimizer)  # which waits for the other rank
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "dies")
