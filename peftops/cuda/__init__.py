"""The backend for NVIDIA GPUs in CUDA C++.

It has the ops that memory or latency bounds, where it beats Triton: LoRA and multi-LoRA for few
rows, DoRA's norm and 4-bit weights. The kernels are in csrc/cuda.
"""

REPLAYED = True  # launchers call _C by _replay.noted


def runs(device):
    """Whether kernels can be launched on tensors of this type of device, such as "cuda".

    They have to be built, and for the GPU that is the current one.
    """
    import torch

    from .._C import cuda

    return (
        device == "cuda"
        and hasattr(cuda, "runs")
        and cuda.runs(torch.cuda.current_device()) == 0
    )
