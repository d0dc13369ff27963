"""Patched LoRA layers over LinearNF4 and bitsandbytes' Linear4bit follow stock PEFT by the law."""

import copy
import inspect
import io
import re

import pytest
import torch
from law import bound, error
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from tiny import Net, adapted, install_our_mask, pass_of

import peftops
from peftops.integrations.peft import FUSED, Fused
from peftops.integrations.peft.foundation import packed
from peftops.nn import LinearNF4

pytestmark = pytest.mark.usefixtures("one_thread")
K, N = 64, 96


def ours(dtype=torch.float32, compute_dtype=None, **options):
    torch.manual_seed(0)
    return LinearNF4.from_linear(
        nn.Linear(K, N, dtype=dtype), compute_dtype=compute_dtype, **options
    )


def theirs(
    dtype=torch.float32,
    compute_dtype=None,
    quant_type="nf4",
    double_quant=True,
    blocksize=64,
):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = nn.Linear(K, N, dtype=dtype)
    layer = bnb.nn.Linear4bit(K, N, compute_dtype=compute_dtype)
    options = {
        "quant_type": quant_type,
        "compress_statistics": double_quant,
        "blocksize": blocksize,
    }
    layer.weight = bnb.nn.Params4bit(linear.weight.data, **options).to("cpu")
    layer.bias = linear.bias
    return layer


def lora(lin, **config):
    net = Net(lin)
    net.is_loaded_in_4bit = True
    model = adapted(net, **{"target_modules": ["lin"]} | config)
    for name, p in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(p, std=0.1)
    return model


def layer_of(model):
    return model.base_model.model.lin


def exactly(model, x, **config):
    """Stock PEFT in float64 over the dequantized weight."""
    base = layer_of(model).base_layer
    q = (
        base.quantized
        if isinstance(base, LinearNF4)
        else LinearNF4.from_bnb(base).quantized
    )
    linear = nn.Linear(K, N, dtype=torch.float64).requires_grad_(False)
    linear.weight.data = q.dequantize(torch.float64)
    linear.bias = copy.deepcopy(base.bias)
    net = lora(nn.Linear(K, N), **config)
    state = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    net.load_state_dict(state, strict=False)
    layer_of(net).base_layer = linear
    return pass_of(net.double(), x.double())


CONFIG = {"lora_dropout": 0.3, "use_rslora": True}
CASES = {  # name -> dtype of the weight, compute_dtype, dtype of x, autocast
    "fp32": (torch.float32, None, torch.float32, None),
    "computes-fp32": (torch.float32, torch.float32, torch.float32, None),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16, None),
    "autocast": (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
    "autocast-of-fp32": (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16),
    "autocast-of-bf16": (torch.bfloat16, None, torch.bfloat16, torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("make", [ours, theirs], ids=["LinearNF4", "Linear4bit"])
def test_is_stock_peft(make, case, monkeypatch):
    install_our_mask(monkeypatch)
    dtype, compute, x_dtype, autocast = case
    model = lora(make(dtype, compute), **CONFIG)
    x = torch.randn(80, K, dtype=x_dtype)
    if x_dtype is torch.bfloat16 and not autocast:  # else stock PEFT multiplies in fp32
        model = model.to(torch.bfloat16)
    exact = exactly(model, x, **CONFIG)
    same = pass_of(model, x, autocast)
    patched = peftops.patch(copy.deepcopy(model), strict=True)
    out = pass_of(patched, x, autocast)
    assert [t.dtype for t in out] == [t.dtype for t in same]
    assert error(out, exact) <= bound(same, exact)
    assert peftops.report(patched).calls == {"fused": 1}
    assert peftops.report(patched).fused == 1
    assert "quant_state" not in repr(peftops.unpatch(patched))
    assert not isinstance(layer_of(patched), Fused)


@pytest.mark.parametrize(
    "options",
    [{"quant_type": "fp4"}, {"double_quant": False}, {"blocksize": 128}],
    ids=str,
)
@pytest.mark.parametrize("make", [ours, theirs], ids=["LinearNF4", "Linear4bit"])
def test_formats(make, options):
    model = lora(make(**options))
    x = torch.randn(5, K)
    exact = exactly(model, x)
    same = pass_of(model, x)
    assert error(pass_of(peftops.patch(model, strict=True), x), exact) <= bound(
        same, exact
    )


@pytest.mark.parametrize("make", [ours, theirs], ids=["LinearNF4", "Linear4bit"])
def test_saves_copies_and_pickles(make):
    model = peftops.patch(lora(make()))
    x = torch.randn(5, K)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected)
        assert isinstance(layer_of(other), Fused)


@pytest.mark.parametrize("make", [ours, theirs], ids=["LinearNF4", "Linear4bit"])
def test_a_compiled_model_is_one_graph(make):
    model = lora(make())
    x = torch.randn(70, K)
    exact = exactly(model, x)
    same = pass_of(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(peftops.patch(model), fullgraph=True, backend="aot_eager")
    assert error(pass_of(compiled, x), exact) <= bound(same, exact)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tensor", ["offset", "scales", "table"])
def test_a_quantization_state_that_was_cast_with_its_model(tensor, cast):
    """An offset in 16 bits is added as it is. Scales and table are read in float32.

    bitsandbytes' GPU kernels do the same.
    """
    model = lora(theirs(double_quant=tensor == "offset"))
    x = torch.randn(70, K)
    state = layer_of(model).base_layer.weight.quant_state
    if tensor == "offset":
        state.offset = state.offset.to(cast)
    elif tensor == "scales":
        state.absmax = state.absmax.to(cast)
    else:
        state.code = state.code.to(cast)
    expected = peft.utils.integrations.dequantize_module_weight(
        layer_of(model).base_layer
    )
    assert torch.equal(
        LinearNF4.from_bnb(layer_of(model).base_layer).dequantize(), expected
    )
    exact = exactly(model, x)
    same = pass_of(model, x)
    assert error(pass_of(peftops.patch(model, strict=True), x), exact) <= bound(
        same, exact
    )
    assert peftops.report(model).calls == {FUSED: 1}


def test_nested_scales_that_were_cast_with_their_model():
    """Compared with the formula: on a CPU, bitsandbytes reads their memory in a wrong dtype."""
    layer = theirs()
    state = layer.weight.quant_state
    nested = state.state2
    nested.absmax = nested.absmax.bfloat16()
    nested.code = nested.code.half()
    values8 = nested.code.float()[state.absmax.long()]
    absmax = values8 * nested.absmax.float() + state.offset
    codes = layer.weight.data.flatten().long()
    values = state.code[torch.stack([codes >> 4, codes & 15], 1).flatten()]
    expected = (values * absmax.repeat_interleave(64)).view(N, K)
    assert torch.equal(LinearNF4.from_bnb(layer).dequantize(), expected)
    assert peftops.report(peftops.patch(lora(layer), strict=True)).fused == 1


def refuse_repacked(layer):
    layer.base_layer.weight.quant_state.packing_format_for_cpu = True


def refuse_dense(layer):
    layer.base_layer.weight.quant_state = None


def refuse_transposed(layer):
    layer.base_layer.weight.quant_state.shape = torch.Size([K, N])


def refuse_scales(layer):
    layer.base_layer.weight.quant_state.state2.blocksize = 128


UNREAD = {
    "scales of the base weight": refuse_scales,
    "base weight is repacked for inference on a CPU": refuse_repacked,
    "base weight is not quantized yet": refuse_dense,
    "base weight is transposed": refuse_transposed,
}
REASONS = {
    "adapters disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merged_adapters.append("default"),
}


def test_every_reason_has_a_case():
    constants = set(
        re.findall(r'return Fallback\("([^"]+)"', inspect.getsource(packed))
    )
    assert constants - set(UNREAD) == {"a tensor is not plain"}


@pytest.mark.parametrize("reason", UNREAD)
def test_what_linear4bit_computes_itself(reason):
    model = lora(theirs())
    UNREAD[reason](layer_of(model))
    (description,) = peftops.report(peftops.patch(model, strict=True)).paths
    assert description.endswith(f"base's own product: {reason}")


@pytest.mark.parametrize("reason", REASONS)
def test_what_linear4bit_keeps_for_peft(reason):
    model = lora(theirs())
    REASONS[reason](layer_of(model))
    with pytest.raises(
        ValueError, match=f"patch: base_model.model.lin cannot be fused: {reason}"
    ):
        peftops.patch(model, strict=True)
    report = peftops.report(peftops.patch(model))
    assert report.reasons == ({} if reason == "merged" else {reason: 1})
    assert report.merged == (reason == "merged")


@pytest.mark.parametrize("make", [ours, theirs], ids=["LinearNF4", "Linear4bit"])
def test_what_would_compute_otherwise_is_pefts_own(make):
    model = peftops.patch(lora(make(compute_dtype=torch.float16)), strict=True)
    pass_of(model, torch.randn(3, K), torch.bfloat16)
    assert peftops.report(model).calls == {
        "compute_dtype or x is not of autocast's dtype": 1
    }
    pass_of(model, torch.randn(3, K, dtype=torch.bfloat16))
    assert peftops.report(model).calls["x is not of the base weight's dtype"] == 1


@pytest.mark.parametrize(
    "config", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str
)
def test_merges_once_rounded_and_unmerges_every_bit(config):
    model = peftops.patch(lora(ours(), **config))
    x = torch.randn(5, K)
    layer = layer_of(model)
    base = layer.base_layer
    before = {k: t.clone() for k, t in base.state_dict().items()}
    expected = model(x)
    weight = base.dequantize() + layer.get_delta_weight("default")
    with pytest.warns(
        UserWarning, match="merge: a merged weight in 4 bits is rounded again"
    ):
        layer.merge(safe_merge=True)
    if not config:
        rounded = LinearNF4.from_linear(linear_of(weight)).dequantize()
        assert torch.equal(base.dequantize(), rounded)
    assert layer.merged
    assert error(model(x), expected.double()) < 0.2
    assert peftops.report(model).merged == 1
    assert peftops.report(model).undo_bytes > base.weight.nbytes
    with pytest.raises(
        ValueError, match=r"unpatch: base_model.model.lin must be unmerged first"
    ):
        peftops.unpatch(model)
    with model.disable_adapter():  # unmerges
        model(x)
    assert not layer.merged
    assert all(torch.equal(t, before[k]) for k, t in base.state_dict().items())
    assert torch.equal(model(x), expected)


def linear_of(weight):
    linear = nn.Linear(K, N)
    linear.weight.data = weight.detach()
    return linear


def test_merges_several_adapters_from_the_first_weight():
    model = lora(ours())
    model.add_adapter(
        "other",
        peft.LoraConfig(
            r=2,
            target_modules=["lin"],
            init_lora_weights=False,
        ),
    )
    layer = layer_of(peftops.patch(model))
    weight = layer.base_layer.dequantize()
    for name in ("default", "other"):
        weight = weight + layer.get_delta_weight(name)
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["other"])
    rounded = LinearNF4.from_linear(linear_of(weight)).dequantize()
    assert torch.equal(layer.base_layer.dequantize(), rounded)
    merged = model.merge_and_unload()
    assert type(merged.lin) is LinearNF4


def test_a_broken_adapter_is_not_merged_safely():
    model = peftops.patch(lora(ours()))
    layer_of(model).lora_A["default"].weight.data[0, 0] = float("nan")
    before = layer_of(model).base_layer.dequantize()
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        layer_of(model).merge(safe_merge=True)
    assert torch.equal(layer_of(model).base_layer.dequantize(), before)
    assert not layer_of(model).merged


def test_merge_over_linear4bit_is_pefts():
    model = peftops.patch(lora(theirs()))
    stock = copy.deepcopy(peftops.unpatch(copy.deepcopy(model)))
    layer_of(model).merge()
    layer_of(stock).merge()
    assert torch.equal(
        layer_of(model).base_layer.weight, layer_of(stock).base_layer.weight
    )
