"""Small adapters of PEFT for `peftops check`, made without PEFT or torch."""

import json

import numpy as np
import pytest

from peftops.__main__ import main
from peftops.cli import check as command

LAYER = "base_model.model.model.layers.0"
Q = f"{LAYER}.self_attn.q_proj"
V = f"{LAYER}.self_attn.v_proj"
EXPERTS = f"{LAYER}.mlp.experts"
GATE_UP = "mlp.experts.gate_up_proj"
DOWN = "mlp.experts.down_proj"
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "uint16": "BF16",
    "int8": "I8",
}


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def factor_a(module, r=4, k=8, dtype=np.float32):
    return {f"{module}.lora_A.weight": ones(r, k, dtype=dtype)}


def factor_b(module, r=4, n=6, dtype=np.float32):
    return {f"{module}.lora_B.weight": ones(n, r, dtype=dtype)}


def pair(module, r=4, k=8, n=6, dtype=np.float32):
    """Both factors of one module, by the keys of PEFT's files."""
    return factor_a(module, r, k, dtype) | factor_b(module, r, n, dtype)


PLAIN = pair(Q) | pair(V)
HEAD = {"base_model.model.lm_head.weight": ones(6, 8)}
DORA = PLAIN | {f"{module}.lora_magnitude_vector": ones(6) for module in (Q, V)}
BIASED = PLAIN | {f"{module}.lora_B.bias": ones(6) for module in (Q, V)}
STACKED = PLAIN | pair(f"{EXPERTS}.base_layer", r=12) | pair(EXPERTS, r=12)


def save(folder, tensors, **config):
    """Writes what PEFT would save, and returns the folder.

    Args:
        tensors: arrays by key; those of uint16 hold the bits of bf16.
        config: fields of adapter_config.json.
    """
    folder.mkdir(exist_ok=True)
    defaults = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(defaults | config))
    header = {"__metadata__": {"format": "pt"}}
    data = b""
    for key, array in tensors.items():
        header[key] = {
            "dtype": DTYPES[array.dtype.name],
            "shape": array.shape,
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    text = json.dumps(header).encode()
    length = len(text).to_bytes(8, "little")
    (folder / "adapter_model.safetensors").write_bytes(length + text + data)
    return folder


@pytest.fixture
def check(tmp_path, capsys):
    """Runs `peftops check` on an adapter and returns the rows of its table.

    It also asserts that the exit code is 1 exactly where one of the rows is bad.
    """

    def run(target, tensors=PLAIN, **config):
        code = main(["check", str(save(tmp_path, tensors, **config)), "--for", target])
        rows = [
            line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()[1:]
        ]
        assert code == any(verdict in command.BAD for _, verdict, *_ in rows)
        return [" ".join(row) for row in rows]

    return run
