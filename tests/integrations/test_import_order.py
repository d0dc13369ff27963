"""PEFT knows LinearNF4 in whatever order a script imports PEFT and peftops."""

import os
import subprocess
import sys

import pytest
import ranks

pytest.importorskip("peft")
pytest.importorskip("transformers")

MADE = """
import torch
from torch import nn
from peftops.nn import LinearNF4
model = nn.Sequential(LinearNF4.from_linear(nn.Linear(64, 64)))
"""
ADAPTED = """
import peft
config = peft.LoraConfig(target_modules=["0"], r=8, init_lora_weights="pissa")
layer = peft.get_peft_model(model, config).base_model.model[0]
assert type(layer.base_layer) is LinearNF4
assert layer.lora_A["default"].weight.abs().sum() > 0
print("adapted")
"""
ORDERS = {
    "enable first": "from peftops.integrations.transformers import enable\n" + MADE,
    "peft first": "import peft\n" + MADE,
    "patch in between": MADE + "import peftops\npeftops.report\n",
}


@pytest.mark.parametrize("order", ORDERS)
def test_pissa_over_linear_nf4(order):
    environment = os.environ | {"PYTHONPATH": ranks.python_path()}
    run = subprocess.run(
        [sys.executable, "-c", ORDERS[order] + ADAPTED],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "adapted" in run.stdout
