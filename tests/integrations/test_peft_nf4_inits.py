"""How PEFT starts an adapter over a LinearNF4."""

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from test_peft_nf4 import K, N, layer_of, linear_of, ours
from tiny import Net, adapted

import peftops
from peftops.integrations.peft import FusedLinear
from peftops.nn import LinearNF4

pytestmark = pytest.mark.usefixtures("one_thread")


INITS = ["gaussian", "orthogonal", True, False]


@pytest.mark.parametrize("init", INITS)
def test_initialisations(init):
    """What PEFT makes of a dense base of the same seed."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N)
    models = []
    for lin in (linear, LinearNF4.from_linear(linear)):
        torch.manual_seed(3)
        models.append(
            layer_of(adapted(Net(lin), target_modules=["lin"], init_lora_weights=init))
        )
    for child in ("lora_A", "lora_B"):
        assert torch.equal(
            *(getattr(model, child)["default"].weight for model in models)
        )


def test_dora_starts_at_the_norm_of_the_weight():
    layer = layer_of(
        adapted(
            Net(ours()),
            target_modules=["lin"],
            use_dora=True,
            init_lora_weights=True,
        )
    )
    norm = layer.base_layer.dequantize().norm(dim=1)
    assert torch.equal(layer.lora_magnitude_vector["default"].weight, norm)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_residuals_are_quantized_after_pefts_decomposition(init):
    """PiSSA and OLoRA change a dense weight. What is left of it is quantized afterwards."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N)
    before = linear.weight.detach().clone()
    x = torch.randn(5, K)
    layer = layer_of(
        adapted(Net(linear), target_modules=["lin"], init_lora_weights=init)
    )
    layer.base_layer = LinearNF4.from_linear(layer.base_layer)
    model = peftops.patch(Net(layer), strict=True)
    plain = LinearNF4.from_linear(linear_of(before), double_quant=True)
    whole = layer.base_layer.dequantize() + layer.get_delta_weight("default")
    # PiSSA promises that less is lost than by quantizing the weight itself.
    assert (whole - before).norm() < (plain.dequantize() - before).norm()
    assert isinstance(model.lin, FusedLinear)
    assert torch.isfinite(model(x)).all()


def test_loftq_over_what_is_quantized():
    """Over a quantized weight, LoftQ is one decomposition of what quantization lost."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N)
    layer = layer_of(
        adapted(
            Net(LinearNF4.from_linear(linear)),
            target_modules=["lin"],
            r=8,
            lora_alpha=8,
        )
    )
    lost = linear.weight - peft.utils.integrations.dequantize_module_weight(
        layer.base_layer
    )
    u, s, v = torch.linalg.svd(lost, full_matrices=False)
    layer.lora_A["default"].weight.data = s[:8].sqrt()[:, None] * v[:8]
    layer.lora_B["default"].weight.data = u[:, :8] * s[:8].sqrt()
    assert (lost - layer.get_delta_weight("default")).norm() < lost.norm()
