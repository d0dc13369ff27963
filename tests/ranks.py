"""Two processes of torch.distributed on the CPU, each of which runs `work(rank)` of a script."""

import os
import subprocess
import sys

START = """
import os, sys, torch
import torch.distributed as dist
from torch import nn

def worker(rank, path):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")  # as launchers do
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work(rank)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of torch that want Python's lock while the interpreter ends would abort the process
"""
END = """
if __name__ == "__main__":
    torch.multiprocessing.spawn(worker, (sys.argv[1],), nprocs=2)
"""


def run(work, folder, *args):
    """What `work`, Python's source, says on stderr where a rank fails; empty where none does."""
    script = folder / "two_ranks.py"
    script.write_text(START + work + END)
    (folder / "store").unlink(missing_ok=True)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]), "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, str(script), str(folder / "store"), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    return done.stderr[-3000:] if done.returncode else ""
