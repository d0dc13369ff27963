"""Two ranks equal one process; what they save is the same; one that dies ends the other."""

import pytest
import ranks
import torch

pytest.importorskip("peft")
pytest.importorskip("accelerate")

CASES = "ddp", "fsdp2", "parts", "mixed_precision", "saved", "tensor_parallel"


@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(case, tmp_path):
    assert ranks.run(f"from on_ranks import {case} as work\n", tmp_path, str(tmp_path)) == ""
