"""What peftops does not run, PEFT runs: to the bit, errors included, and counted by reason."""

import copy
import inspect
import re

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from law import bound, error
from peft.helpers import disable_input_dtype_casting
from tiny import adapted, single

import peftops
from peftops.integrations.peft import mixed as mixed_batch
from peftops.integrations.peft import plan as planning

pytestmark = pytest.mark.usefixtures("one_thread")


class Sub(nn.Linear):
    """Not exactly nn.Linear."""

    def forward(self, x):
        return 2 * super().forward(x)


class SubParameter(nn.Parameter):
    pass


def lin(model):
    return model.base_model.model.lin


def adapter_module(model, name):
    """lora_A, lora_B, lora_dropout or lora_magnitude_vector."""
    return getattr(lin(model), name)["default"]


def several(model):
    torch.manual_seed(0)
    model.add_adapter(
        "other", peft.LoraConfig(r=3, init_lora_weights=False, target_modules=["lin"])
    )
    model.base_model.set_adapter(["default", "other"])


def turn_into(module, cls):
    module.__class__ = cls


def shadow_forward(module):
    forward = module.forward
    module.forward = lambda x: 3 * forward(x)


def double_output(module, args, y):
    return 2 * y


def plain(model, x):
    return model(x)


def with_extra(model, x):
    return lin(model)(x, alora_offsets=[None] * 7)


def mixed(count):
    names = ["default"] * 3 + ["other", "__base__"] * 2

    def call(model, x):
        return model.eval()(x, adapter_names=names[:count])

    return call


def disabled(model, x):
    with model.disable_adapter():
        return model(x)


def uncast(model, x):
    with disable_input_dtype_casting(model):
        return model(x)


def half_autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def with_global_hook(model, x):
    handle = nn.modules.module.register_module_forward_hook(double_output)
    try:
        return model(x)
    finally:
        handle.remove()


def mapped(model, x):
    return torch.func.vmap(lin(model))(x)


CASES = {  # reason -> what is done to the model, how it is called, options of the model
    "extra arguments": (None, with_extra),
    "adapter_names are not as many as samples": (several, mixed(6)),
    "an adapter has a bias, in a mixed batch": (
        several,
        mixed(7),
        {"lora_bias": True},
    ),
    "adapters disabled": (None, disabled),
    "merged": (lambda model: lin(model).merged_adapters.append("default"), plain),
    "dropout of several active adapters": (several, plain, {"lora_dropout": 0.3}),
    "DoRA among several active adapters": (several, plain, {"use_dora": True}),
    "no active adapter": (lambda model: lin(model).set_adapter([]), plain),
    "DoRA with a bias or hooks of its own": (
        lambda model: adapter_module(
            model, "lora_magnitude_vector"
        ).register_forward_hook(lambda *args: None),
        plain,
        {"use_dora": True},
    ),
    "variant MiCALinearVariant": (None, plain, {"init_lora_weights": "mica"}),
    "DoRA over a base that only its layer computes": (
        lambda model: turn_into(lin(model).base_layer, Sub),
        plain,
        {"use_dora": True},
    ),
    "adapter layer is not nn.Linear": (
        lambda model: turn_into(adapter_module(model, "lora_B"), Sub),
        plain,
    ),
    "dropout is AlphaDropout(p=0.3, inplace=False)": (
        lambda model: turn_into(adapter_module(model, "lora_dropout"), nn.AlphaDropout),
        plain,
        {"lora_dropout": 0.3},
    ),
    "dropout is Dropout(p=0.3, inplace=True)": (
        lambda model: setattr(adapter_module(model, "lora_dropout"), "inplace", True),
        plain,
        {"lora_dropout": 0.3},
    ),
    "torch.func, forward-mode AD, tracing or export": (None, mapped),
    "base weight is trained": (
        lambda model: lin(model).base_layer.requires_grad_(),
        plain,
    ),
    "dtype of x or of the base weight": (
        lambda model: model.double(),
        lambda model, x: model(x.double()),
    ),
    "x is not of the base weight's dtype": (None, lambda model, x: model(x.bfloat16())),
    "dtype of the adapter": (
        lambda model: lin(model).lora_A.bfloat16() and lin(model).lora_B.bfloat16(),
        plain,
    ),
    planning.FP16: (
        lambda model: lin(model).base_layer.half(),
        lambda model, x: model(x.half()),
    ),
    "dtype of a bias": (
        lambda model: setattr(
            lin(model).base_layer, "bias", nn.Parameter(torch.ones(24).half(), False)
        ),
        half_autocast,
    ),
    "input casting disabled": (
        lambda model: lin(model).base_layer.bfloat16(),
        lambda m, x: uncast(m, x.bfloat16()),
    ),
    "scaling is not a number": (
        lambda model: lin(model).scaling.update(default=torch.tensor(0.5)),
        plain,
    ),
    "ZeRO-3": (
        lambda model: setattr(adapter_module(model, "lora_A").weight, "ds_id", 0),
        plain,
    ),
    "no kernels for meta": (
        lambda model: model.to("meta"),
        lambda model, x: model(x.to("meta")),
    ),
    "tensors on different devices": (
        lambda model: lin(model).base_layer.to("meta"),
        plain,
    ),
}
RAISES = {
    "adapter_names are not as many as samples",
    "x is not of the base weight's dtype",
    "input casting disabled",
    "tensors on different devices",
    "dropout is Dropout(p=0.3, inplace=True)",
}
ADAPTER_MODULES = {
    "lora_A": lambda model: adapter_module(model, "lora_A"),
    "lora_B": lambda model: adapter_module(model, "lora_B"),
    "lora_dropout": lambda model: adapter_module(model, "lora_dropout"),
}
HOOKS = {
    "forward hook": lambda module: module.register_forward_hook(double_output),
    "forward pre-hook": lambda module: module.register_forward_pre_hook(
        lambda module, args: (2 * args[0],)
    ),
    "backward hook": lambda module: module.register_full_backward_hook(
        lambda m, gi, go: tuple(2 * g for g in gi)
    ),
    "backward pre-hook": lambda module: module.register_full_backward_pre_hook(
        lambda m, go: (2 * go[0],)
    ),
    "own forward": shadow_forward,
}


def outcome(model, call):
    """Output and gradients, or the error."""
    torch.manual_seed(3)
    x = torch.randn(7, 16, requires_grad=True)
    try:
        y = call(model, x)
        if y.device.type != "meta" and y.requires_grad:
            y.float().square().sum().backward()
    except Exception as exception:
        return type(exception), str(exception)
    return [y.detach(), x.grad] + [p.grad for p in model.parameters()]


def same(a, b):
    if a is None or b is None or a.device.type == "meta":
        return a is b or (a is not None and b is not None and a.shape == b.shape)
    return torch.equal(a, b)


def assert_falls_back(model, change, call, reason):
    stock = copy.deepcopy(model)
    patched = peftops.patch(copy.deepcopy(model))
    if change:
        change(stock)
        change(patched)
    expected = outcome(stock, call)
    out = outcome(patched, call)
    assert type(out) is type(expected) and len(out) == len(expected)
    if isinstance(expected, tuple):
        assert out == expected
    else:
        assert all(map(same, out, expected))
    report = peftops.report(patched)
    merged = reason == "merged"  # which counts as nobody's
    assert (report.fused, report.merged) == (0, int(merged))
    assert report.reasons == ({} if merged else {reason: 1})
    assert set(report.calls) == {reason}
    return expected


@pytest.mark.parametrize("reason", CASES)
def test_reason(reason):
    change, call, *more = CASES[reason]
    config = more[0] if more else {}
    expected = assert_falls_back(single(**config), change, call, reason)
    assert isinstance(expected, tuple) == (reason in RAISES)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ADAPTER_MODULES)
def test_hooks_on_a_part(name, hook):
    model = single(lora_dropout=0.3)
    without_hook = outcome(copy.deepcopy(model), plain)
    expected = assert_falls_back(
        model,
        lambda model: HOOKS[hook](ADAPTER_MODULES[name](model)),
        plain,
        "hooks on a part",
    )
    assert not all(
        map(same, without_hook, expected)
    )  # a hook that nobody calls would prove nothing


def test_global_hooks():
    assert_falls_back(single(), None, with_global_hook, "hooks on a part")


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_parameters_of_another_class(name):
    def change(model):
        module = ADAPTER_MODULES[name](model)
        module.weight = SubParameter(module.weight.detach())

    assert_falls_back(single(), change, plain, "a tensor is not plain")


def test_traced_calls_are_stock(recwarn):
    stock = single()
    patched = peftops.patch(copy.deepcopy(stock))
    x = torch.randn(7, 16)
    program = torch.jit.trace(lin(patched), x)
    assert torch.equal(program(2 * x), stock(2 * x))
    assert (
        "torch.func, forward-mode AD, tracing or export"
        in peftops.report(patched).calls
    )


def test_forward_mode_ad_is_stock():
    stock = single()
    patched = peftops.patch(copy.deepcopy(stock))
    x, v = torch.randn(2, 7, 16)
    duals = []
    for model in (stock, patched):
        with forward_ad.dual_level():
            duals.append(forward_ad.unpack_dual(model(forward_ad.make_dual(x, v))))
    assert torch.equal(duals[0].primal, duals[1].primal)
    assert torch.equal(duals[0].tangent, duals[1].tangent)
    reason = "torch.func, forward-mode AD, tracing or export"
    assert set(peftops.report(patched).calls) == {reason}


def test_what_is_too_large_for_fp16_between_the_adapters():
    stock = single()
    lin(stock).base_layer.half()
    with torch.no_grad():
        adapter_module(stock, "lora_A").weight.fill_(300)
        adapter_module(stock, "lora_B").weight.fill_(1e-4)
    x = torch.full((3, 16), 100.0).half()
    y = peftops.patch(copy.deepcopy(stock))(x)
    assert y.isfinite().all()
    assert torch.equal(y, stock(x))


def test_a_bias_that_is_a_buffer():
    stock = single()
    base = lin(stock).base_layer
    bias = base.bias.detach() + 3
    del base.bias
    base.register_buffer("bias", bias)
    patched = peftops.patch(copy.deepcopy(stock))
    x = torch.randn(7, 16)
    exact = copy.deepcopy(stock).double()(x.double())
    assert error(patched(x), exact) <= bound(stock(x), exact)
    assert peftops.report(patched).calls == {"fused": 1}


def test_every_reason_has_a_case():
    deciders = inspect.getsource(planning), inspect.getsource(mixed_batch.plan_mixed)
    source = "".join(deciders)
    constants = set(re.findall(r'(?:return |Fallback\()"([^"]+)"', source))
    constants |= {"extra arguments", planning.FP16}
    assert constants - set(CASES) == {
        "hooks on a part",
        "a tensor is not plain",
        "compute_dtype or x is not of autocast's dtype",
        "DoRA with dropout, in a mixed batch",  # see test_peft_mixed.py
    }
    starts = re.findall(r'return (?:Fallback\()?f"(\w[\w ]+) \{', source)
    assert starts
    assert all(start in " ".join(CASES) for start in starts)


def test_dropout_that_is_not_active_is_fused():
    model = peftops.patch(single(lora_dropout=0.3)).eval()
    assert model(torch.randn(3, 16)).isfinite().all()
    assert peftops.report(model).calls == {"fused": 1}


def test_warns_and_names_what_is_not_fused(caplog):
    model = adapted(
        nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))),
        target_modules=["0", "1", "2"],
    )
    model.base_model.model[1].base_layer.weight.requires_grad_()
    peftops.patch(model)
    (record,) = (record for record in caplog.records if record.name == "peftops")
    assert record.levelname == "WARNING"
    assert (
        record.getMessage()
        == "2/3 LoRA layers fused; PEFT's own: 1 base weight is trained"
    )
