"""What launchers ask of the GPU."""

import functools

import torch

from .._replay import Stream


@functools.cache
def processors(device: torch.device) -> int:
    """The number of multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def hopper(device: torch.device) -> bool:
    """Whether the GPU is an H100, H200 or alike."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def stream(device: torch.device) -> Stream:
    """The handle of torch's current stream."""
    return Stream(torch._C._cuda_getCurrentRawStream(device.index))
