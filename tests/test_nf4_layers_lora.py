"""LoRALinear over LinearNF4: numbers, the same layer in PEFT, FSDP2 and distributed checkpoints."""

import copy

import pytest
import ranks
import torch
from law import bound, error
from nf4_layers import DTYPES, bits, dense, linear, same_bits
from torch import nn

import peftops
from peftops.nn import LinearNF4, LoRALinear

pytestmark = pytest.mark.usefixtures("one_thread")


def formula(layer, x, dtype):
    """The formula in the docstring of LoRALinear, in torch."""
    name = layer.adapter_name
    base = dense(layer.base_layer, dtype).to(x.dtype)
    return base(x) + layer.scaling * layer.lora_B[name](layer.lora_A[name](x))


def trained(module, x, call):
    """The output, and the gradients of x and of the adapter, where `call` uses the module."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = call(x)
    y.float().square().sum().backward()
    return [
        y.detach(),
        x.grad,
        *(p.grad for p in module.parameters() if p.requires_grad),
    ]


@pytest.mark.parametrize(
    "options", [{}, {"lora_bias": True, "use_rslora": True}], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_over_4_bits(dtype, options):
    base = LinearNF4.from_linear(linear(dtype=dtype))
    model = LoRALinear(base, 4, lora_alpha=6, init_lora_weights=False, **options)
    trainable = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trainable == {torch.float32}  # as in PEFT
    x = torch.randn(80, 64, dtype=dtype)
    wide = copy.deepcopy(model).double()
    narrow = copy.deepcopy(model).to(dtype)
    exact = trained(wide, x.double(), lambda x: formula(wide, x, torch.float64))
    same = trained(narrow, x, lambda x: formula(narrow, x, dtype))
    out = trained(model, x, model)
    assert out[0].dtype == dtype
    assert {gradient.dtype for gradient in out[2:]} == {torch.float32}
    assert error(out, exact) <= bound(same, exact)


def test_lora_keeps_the_compute_dtype():
    base = LinearNF4.from_linear(linear(), compute_dtype=torch.bfloat16)
    x = torch.randn(3, 64)
    y = LoRALinear(base, 4, lora_alpha=6)(x)
    assert y.dtype == torch.float32
    assert error(y, base(x).double()) <= bound(base(x), base(x).double())


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "lora_bias": True, "bias": "all"}], ids=str
)
def test_lora_is_pefts_layer(options):
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lin"], r=4, **options)
    model = nn.Sequential()
    model.add_module("lin", LinearNF4.from_linear(linear()))
    ours = copy.deepcopy(model.lin)
    torch.manual_seed(7)
    theirs = peft.get_peft_model(model, config).base_model.model.lin
    torch.manual_seed(7)
    ours = LoRALinear.from_config(ours, config, "lin")
    assert same_bits(bits(ours), bits(theirs))
    for p, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert p.dtype == expected.dtype and p.requires_grad == expected.requires_grad
    shared = LoRALinear.from_peft(theirs)
    x = torch.randn(3, 64)
    assert shared.base_layer is theirs.base_layer and torch.equal(shared(x), ours(x))


def test_peft_dequantizes_it():
    peft = pytest.importorskip("peft")
    layer = LinearNF4.from_linear(linear())
    weight = peft.utils.integrations.dequantize_module_weight(layer)
    assert torch.equal(weight, layer.dequantize())


SHARDED = """
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from contextlib import nullcontext
import peftops
from peftops.nn import LinearNF4, LoRALinear

def work(rank):
    with peftops.backend(sys.argv[2]) if len(sys.argv) > 2 else nullcontext():
        for double in (True, False):
            base = LinearNF4.from_linear(nn.Linear(64, 96, bias=False), double_quant=double)
            adapted = LoRALinear(base, 4, lora_alpha=6, init_lora_weights=False)
            model = nn.Sequential(adapted, LinearNF4(96, 33))
            x = torch.randn(80, 64)
            model(x).square().sum().backward()
            expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
            model.zero_grad()
            before = base.state_dict()
            for layer in (*model, model):
                fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
            assert base.weight.to_local().numel() < base.weight.numel()
            model(x).square().sum().backward()
            grads = [p.grad.full_tensor() for p in model.parameters() if p.requires_grad]
            assert all(map(torch.equal, grads, expected)), rank
            whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            assert all(torch.equal(whole[f"0.base_layer.{k}"], t) for k, t in before.items())
            after = base.state_dict()
            after["weight"] = after["weight"].full_tensor()
            assert all(torch.equal(after[k], t) for k, t in before.items())
            narrow = LinearNF4.from_linear(nn.Linear(64, 96, bias=False), double_quant=double)
            expected = narrow(x.bfloat16())
            fully_shard(narrow, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
            assert torch.equal(narrow(x), expected)  # a policy of bf16 has cast no scale
"""


def test_fsdp2_shards_codes_and_scales(tmp_path):
    forced = list(peftops.backends.FORCED.values())
    assert ranks.run(SHARDED, tmp_path, *forced) == ""


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_loads_what_torch_distributed_makes_of_a_state_dict(strict, double):
    """torch adds the layer's own parameters to what it loads, also to a dict of adapters alone."""
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(full_state_dict=True, strict=strict)
    source, target = (
        LoRALinear(LinearNF4.from_linear(linear(), 64, double), 4, lora_alpha=6)
        for _ in range(2)
    )
    target.base_layer.quantize(torch.randn(96, 64))
    state = dcp.get_model_state_dict(source, options=options)
    result = dcp.set_model_state_dict(target, dict(state), options=options)
    assert same_bits(bits(source), bits(target))
    assert not result.missing_keys and not result.unexpected_keys
    adapters = {key: tensor + 1 for key, tensor in state.items() if "lora" in key}
    dcp.set_model_state_dict(target, dict(adapters), options=options)
    assert same_bits(bits(source) | adapters, bits(target))
