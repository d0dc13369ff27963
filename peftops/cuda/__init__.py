"""The backend for NVIDIA GPUs in CUDA C++: what is bound by memory or latency, where it beats Triton."""

REPLAYED = True  # launchers call _C by _replay.noted


def runs(device):
    """Whether kernels can be launched on tensors of this type of device: they were built, and for this GPU."""
    import torch

    from .._C import cuda

    return (
        device == "cuda"
        and hasattr(cuda, "runs")
        and cuda.runs(torch.cuda.current_device()) == 0
    )
