"""Two processes of torch.distributed on the CPU, each of which runs `work(rank)` of a script, or imported by it."""

import os
import subprocess
import sys

import isa

START = """
import datetime, os, sys, torch
import torch.distributed as dist
from torch import nn

def worker(rank, path):
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=wait)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work(rank)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of torch that want Python's lock while the interpreter ends would abort the process
"""
END = """
if __name__ == "__main__":
    torch.multiprocessing.start_processes(worker, (sys.argv[1],), nprocs=2, start_method="fork")  # imports once
"""


def run(work, folder, *args):
    """What `work`, Python's source, says on stderr where a rank fails; empty where none does."""
    script = folder / "ranks.py"
    script.write_text(isa.again() + START + work + END)
    env = os.environ | {"PYTHONPATH": python_path(), "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, str(script), str(folder / "store"), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    return done.stderr[-3000:] if done.returncode else ""


def python_path():
    """Where a process of its own finds what a test can import."""
    return os.pathsep.join([os.getcwd(), *filter(None, sys.path)])
