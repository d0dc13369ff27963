"""Bases whose product only they can compute: PEFT's call of the base, and our delta on top."""

import copy
import importlib.util
import inspect
import io
import re
import sys
from importlib import import_module
from types import ModuleType

import pytest
import torch
from law import bound, error
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from test_peft_fallbacks import HOOKS, Sub, SubParameter
from tiny import Net, adapted, install_our_mask, pass_of, single

import peftops
from peftops.integrations.peft import OWN, Fused, foundation
from peftops.integrations.peft.layer import HOMES, WIDENING

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
K, N = 16, 24
FP32 = torch.float32
BF16 = torch.bfloat16
FP16 = torch.float16
QUANTIZERS = {
    "eetq": "eetq.EetqLinear",
    "hqq": "hqq.core.quantize.HQQLinear",
    "torchao": "torchao.quantization.Int4Tensor",
}


class Quantized(nn.Module):
    """A linear layer like those of quantizers. It computes in one dtype, or in x's."""

    infeatures, outfeatures = K, N

    def __init__(self, computes=None):
        super().__init__()
        self.register_buffer(
            "qweight", torch.randint(-127, 128, (N, K), dtype=torch.int8)
        )
        self.computes = computes

    def forward(self, x):
        autocast = torch.is_autocast_enabled("cpu") and self.computes is None
        with torch.autocast("cpu", BF16, enabled=autocast):
            x = x.to(self.computes or x.dtype)
            return nn.functional.linear(x, self.qweight.to(x.dtype) / 512)


class Wide(nn.Module):
    """Computes what a base layer does in its own dtype, in a model of float64."""

    def __init__(self, base, dtype):
        super().__init__()
        self.base, self.dtype = base, dtype

    def forward(self, x):
        return self.base(x.to(self.dtype)).double()


def stock_class(name, monkeypatch):
    """PEFT's class of that name. If its quantizer is not installed, PEFT is told that it is."""
    if name == "Linear":
        return peft.tuners.lora.Linear
    home = HOMES[name]
    if home == "bnb":
        pytest.importorskip("bitsandbytes")
    if home in QUANTIZERS and not importlib.util.find_spec(home):
        module_name, _, class_name = QUANTIZERS[home].rpartition(".")
        words = module_name.split(".")
        for i, word in enumerate(words):
            monkeypatch.setitem(sys.modules, ".".join(words[: i + 1]), ModuleType(word))
        setattr(sys.modules[module_name], class_name, type(class_name, (), {}))
    module = import_module(f"peft.tuners.lora.{home}")
    if not hasattr(module, name):
        monkeypatch.setattr(f"peft.import_utils.is_{home}_available", lambda: True)
        spec = importlib.util.spec_from_file_location(module.__name__, module.__file__)
        again = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(again)
        monkeypatch.setattr(module, name, getattr(again, name), raising=False)
    return getattr(module, name)


def lora(layer_class, base, dtype=FP32, **config):
    """A model of one layer of this class of PEFT."""
    config = peft.LoraConfig(init_lora_weights=False, **config)
    base = base.requires_grad_(False)
    layer = layer_class(
        base,
        "default",
        config=config,
        r=4,
        lora_alpha=6,
    )
    return Net(layer.to(dtype))


def base_of(name, computes=None):
    if name != "TorchaoLoraLinear":
        return Quantized(computes)
    base = nn.Linear(K, N)
    base.weight = SubParameter(base.weight.detach(), False)
    return base


def exactly(model, x, autocast=None):
    """Stock PEFT with an adapter of float64, over the same product of the base."""
    model = copy.deepcopy(model)
    layer = model.get_submodule(
        "lin" if hasattr(model, "lin") else "base_model.model.lin"
    )
    base = Wide(layer.base_layer, x.dtype)
    for name in {"base_layer", "quant_linear_module"} & set(layer._modules):
        setattr(layer, name, base)
    layer.lora_A.double()
    layer.lora_B.double()
    return pass_of(model, x.double(), autocast)


def assert_law(model, x, autocast=None):
    exact = exactly(model, x, autocast)
    same = pass_of(model, x, autocast)
    patched = peftops.patch(copy.deepcopy(model), strict=True)
    out = pass_of(patched, x, autocast)
    assert [t.dtype for t in out] == [t.dtype for t in same]
    assert error(out, exact) <= bound(same, exact)
    report = peftops.report(patched)
    assert report.calls == {OWN: 1}
    assert (report.fused, report.fallback) == (1, 0)
    return report


CASES = {  # dtype of x, of the adapter, of what the base computes in, autocast
    "fp32": (FP32, FP32, None, None),
    "bf16": (BF16, BF16, None, None),
    "fp16": (FP16, FP16, None, None),
    "autocast": (FP32, FP32, None, BF16),
    "base-in-fp32": (BF16, FP32, FP32, None),
    "base-in-fp16": (FP32, FP32, FP16, None),
    "all-but-the-base-in-bf16": (BF16, BF16, FP32, None),
    "base-in-fp32-under-autocast": (FP32, FP32, FP32, BF16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", ["Linear", *HOMES])
def test_is_stock_peft(name, case, monkeypatch):
    install_our_mask(monkeypatch)
    dtype, adapter, computes, autocast = case
    if name == "TorchaoLoraLinear" and computes:
        pytest.skip("its base is an nn.Linear, which computes in x's dtype")
    layer_class = stock_class(name, monkeypatch)
    for p, rows in ((0.3, 70), (0.0, 5)):
        base = base_of(name, computes)
        model = lora(
            layer_class, base if autocast else base.to(dtype), adapter, lora_dropout=p
        )
        assert_law(model, torch.randn(2, rows, K, dtype=dtype), autocast)


@pytest.mark.parametrize(
    "name", ["Linear", "AqlmLoraLinear", "AwqLoraLinear", "Linear8bitLt"]
)
def test_a_bias_of_the_adapter(name, monkeypatch):
    assert_law(
        lora(stock_class(name, monkeypatch), Quantized(), lora_bias=True),
        torch.randn(70, K),
    )


@pytest.mark.parametrize("name", ["Linear", *HOMES])
def test_dtype_where_a_gpu_runs_autocast(name, monkeypatch):
    """Some of PEFT's layers ask for autocast without a device, and get CUDA's."""
    asks = torch.is_autocast_enabled
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda *device: asks(*(device or ["cpu"]))
    )
    model = lora(stock_class(name, monkeypatch), base_of(name, FP16))
    x = torch.randn(70, K)
    if name == "TorchaoLoraLinear":
        model.lin.base_layer = Quantized(FP16)
    assert_law(model, x, BF16)
    expected = FP32 if name in WIDENING else FP16
    assert pass_of(peftops.patch(model), x, BF16)[0].dtype is expected


def int8(dtype):
    bnb = pytest.importorskip("bitsandbytes")
    linear = nn.Linear(K, N, dtype=dtype)
    layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(
        linear.weight.data, requires_grad=False, has_fp16_weights=False
    ).to("cpu")
    layer.bias = linear.bias
    return layer


def torchao_int8(dtype):
    torchao = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(K, N, dtype=dtype)
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    return layer


def hqq(dtype):
    core = pytest.importorskip("hqq.core.quantize")
    config = core.BaseQuantizeConfig(nbits=4, group_size=8)
    return core.HQQLinear(
        nn.Linear(K, N).requires_grad_(False),
        config,
        compute_dtype=dtype,
        device="cpu",
    )


INSTALLED = {
    "Linear8bitLt": int8,
    "TorchaoLoraLinear": torchao_int8,
    "HqqLoraLinear": hqq,
}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("name", INSTALLED)
def test_of_the_quantizers_that_are_installed(name, dtype, p, monkeypatch):
    install_our_mask(monkeypatch)
    net = Net(INSTALLED[name](dtype))
    net.is_loaded_in_8bit = name == "Linear8bitLt"
    model = adapted(
        net,
        False,
        target_modules=["lin"],
        lora_dropout=p,
    )
    layer = model.base_model.model.lin
    assert type(layer).__name__ == name
    layer.lora_A.to(dtype)
    layer.lora_B.to(dtype)
    report = assert_law(model, torch.randn(70, K, dtype=dtype))
    assert "base's own product: base " in str(report)


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_the_base_layer_run(hook):
    model, x = single(), torch.randn(7, 16)
    HOOKS[hook](model.base_model.model.lin.base_layer)
    without_hook = pass_of(single(), x)
    with_hook = pass_of(model, x)
    assert not all(map(torch.equal, without_hook, with_hook))
    assert "hooks on the base layer" in str(assert_law(model, x))


def subclass(layer):
    layer.__class__ = Sub


def tensor_subclass(layer):
    layer.weight = SubParameter(layer.weight.detach(), False)


class Fp8(nn.Linear):
    """A layer whose weight is of float8."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def fp8(layer):
    layer.__class__ = Fp8
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), False)


def trained_subclass(layer):
    layer.__class__ = Sub
    layer.requires_grad_()


@pytest.mark.parametrize("change", [subclass, tensor_subclass, fp8, trained_subclass])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_linear_layers_that_are_not_nn_linear(change, p, monkeypatch):
    install_our_mask(monkeypatch)
    model, x = single(lora_dropout=p), torch.randn(70, K)
    change(model.base_model.model.lin.base_layer)
    assert_law(model, x)
    patched = peftops.patch(copy.deepcopy(model))
    pass_of(model, x)
    pass_of(patched, x)
    grads = [m.base_model.model.lin.base_layer.weight.grad for m in (patched, model)]
    if change is trained_subclass:
        exact = exactly_trained(model, x)
        assert error(grads[0], exact) <= bound(grads[1], exact)
    else:
        assert grads == [None, None]


def exactly_trained(model, x):
    model = copy.deepcopy(model).double()
    pass_of(model, x.double())
    return model.base_model.model.lin.base_layer.weight.grad


def test_every_reason_has_a_case():
    source = inspect.getsource(foundation)
    tested = "hooks on the base layer", "base layer is ", "base weight is "
    assert sorted(re.findall(r'own=f?"([^"{]+)', source)) == sorted(tested)


@pytest.mark.parametrize("name", HOMES)
def test_copies_pickles_and_undoes(name, monkeypatch):
    layer_class = stock_class(name, monkeypatch)
    model = peftops.patch(lora(layer_class, base_of(name)))
    x = torch.randn(5, K)
    expected = model(x)
    file = io.BytesIO()
    exact = peftops.unpatch(copy.deepcopy(model)).double()(x.double())
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other.lin) is type(model.lin)
        assert error(other(x), exact) <= bound(expected, exact)
    assert isinstance(model.lin, Fused)
    assert type(peftops.unpatch(model).lin) is layer_class


@pytest.mark.parametrize(
    "name", ["EetqLoraLinear", "GPTQLoraLinear", "IncLoraLinear", "TeLinear"]
)
def test_merging_is_pefts_own(name, monkeypatch):
    model = lora(stock_class(name, monkeypatch), Quantized())
    refusals = []
    for each in (model, peftops.patch(copy.deepcopy(model))):
        with pytest.raises((AttributeError, NotImplementedError)) as refusal:
            each.lin.merge()
        refusals.append((refusal.type, str(refusal.value).replace("Fused", "")))
    assert refusals[0] == refusals[1]


def test_a_compiled_model_is_one_graph():
    model = lora(peft.tuners.lora.Linear, Quantized())
    x = torch.randn(70, K)
    exact = exactly(model, x)
    same = pass_of(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(peftops.patch(model), fullgraph=True, backend="aot_eager")
    assert error(pass_of(compiled, x), exact) <= bound(same, exact)


def test_rows_of_a_report_are_of_a_dtype_that_layers_compute_in():
    """Codes of 8 bits have no such dtype, so the adapter's is taken."""
    for dtype in (torch.int8, torch.float8_e4m3fn):
        model = lora(peft.tuners.lora.Linear, Quantized(), BF16)
        model.lin.base_layer.weight = nn.Parameter(torch.empty(N, K).to(dtype), False)
        assert foundation.rows_like(model.lin).dtype is BF16
