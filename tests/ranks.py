"""Runs a script as two processes of torch.distributed on the CPU.

The script defines or imports `work(rank)`, which each process calls.
"""

import os
import subprocess
import sys

import isa

START = """
import datetime, os, sys, torch
import torch.distributed as dist
from torch import nn

def worker(rank, path):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work(rank)
    dist.barrier()
    dist.destroy_process_group()
    # Threads of torch that want Python's lock while the interpreter ends would abort the process.
    os._exit(0)
"""
# Processes are forked, so that they import everything once.
END = """
if __name__ == "__main__":
    torch.multiprocessing.start_processes(
        worker, (sys.argv[1],), nprocs=2, start_method="fork"
    )
"""


def run(work, folder, *args):
    """Runs the Python source `work` on both ranks.

    Returns:
        What was written to stderr where a rank failed; "" where none did.
    """
    script = folder / "ranks.py"
    script.write_text(isa.again() + START + work + END)
    env = os.environ | {"PYTHONPATH": python_path(), "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, str(script), str(folder / "store"), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    if done.returncode:
        return done.stderr[-3000:]
    return ""


def python_path():
    """The PYTHONPATH with which another process imports what a test can import."""
    return os.pathsep.join([os.getcwd(), *filter(None, sys.path)])
