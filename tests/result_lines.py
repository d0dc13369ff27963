"""Lines of results as benches write them, for tests of what reads them."""

from peftops.bench.peers import OURS


def result_line(**changes):
    """A line of `bench lora` with every field, some of them changed."""
    line = {
        "commit": "c",
        "date": "2026-01-01",
        "device": "A B",
        "versions": {"torch": "2"},
        "row": "lora",
        "dtype": "bf16",
        "layer": "q",
        "shape": [512, 64, 64, 8],
        "dropout": 0.0,
        "op": "lora_fwd",
        "backend": "cpu",
        "path": "fused",
        "pass": "forward + backward",
        "ms": {"frozen": [1, 1, 1], "PEFT": [2, 2, 2], OURS: [1, 1.1, 1.2]},
        "ratio": {"frozen": 1.1, "PEFT": 0.55},
        "absent": {"unsloth": "runs on a GPU"},
        "roofline": 0.5,
        "flops": 100,
        "bytes": 10,
        "tflops": 1,
        "gemm_tflops": 2.0,
        "copy_gbps": 50.0,
    }
    return line | changes
