"""patch and unpatch while another thread is in the middle of a forward."""

import copy
import sys
import threading

import pytest
import torch
from law import bound, error
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft.tuners.lora.layer import Linear
from tiny import adapted, exactly, pass_of, single

import peftops
import peftops.integrations.peft.call as call_module
import peftops.nn.dora
from peftops.integrations.peft import OWN, FusedLinear, mlp

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Stop:
    """A place where one thread waits: before a call of `function`, or after it.

    thread: the thread that waits; others pass.
    """

    def __init__(self, function=None, after=False):
        self.function = function
        self.after = after
        self.thread = None
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, *args, **kwargs):
        if not self.after:
            self.wait()
        result = self.function(*args, **kwargs)
        if self.after:
            self.wait()
        return result

    def wait(self):
        if threading.get_ident() == self.thread:
            self.reached.set()
            assert self.go_on.wait(60)

    def __deepcopy__(self, memo):
        return self


class Waiting(nn.Linear):
    """A base layer that stops in its forward, and whose product only it computes."""

    def forward(self, x):
        self.stop.wait()
        return super().forward(x)


def beside(stop, call, change):
    """What call() returns in another thread, if change() happens while it waits at the stop."""
    outcomes = []

    def run():
        stop.thread = threading.get_ident()
        torch.set_num_threads(1)  # each thread has a number of its own
        try:
            outcomes.append(call())
        except Exception as error:
            outcomes.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert stop.reached.wait(60)
        change()
    finally:
        stop.go_on.set()
        thread.join()
    (outcome,) = outcomes
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def several(model):
    model.add_adapter(
        "other",
        peft.LoraConfig(
            r=2,
            target_modules=["lin"],
            init_lora_weights=False,
        ),
    )
    model.base_model.set_adapter(["default", "other"])


def waiting(model):
    """Makes the base layer a Waiting one. Returns its stop."""
    base = model.base_model.model.lin.base_layer
    base.__class__ = Waiting
    base.stop = Stop()
    return base.stop


# Module, name of a function in it, and whether to stop after its call.
PLAN = (
    call_module,
    "plan",
    True,
)  # the layer has been read, and nothing is computed yet
NORM = peftops.nn.dora, "dora_weight_norm", False
CASES = {  # options of the model, what is done to it, where a call is stopped, and the shape of x
    "fused": ({"lora_dropout": 0.3}, None, PLAN, (7, 16)),
    "on top": ({}, waiting, None, (7, 16)),
    "on top, before the base": ({}, waiting, PLAN, (7, 16)),
    "fallback": ({"lora_dropout": 0.3}, several, PLAN, (7, 16)),
    "fallback, in PEFT's forward": (
        {"lora_dropout": 0.3},
        lambda model: several(model) or waiting(model),
        None,
        (7, 16),
    ),
    "DoRA": ({"use_dora": True, "lora_dropout": 0.3}, None, PLAN, (7, 16)),
    "DoRA, in its norm": ({"use_dora": True}, None, NORM, (7, 16)),
    "DoRA of one position": ({"use_dora": True}, None, PLAN, (2, 1, 16)),
    "DoRA's fallback": ({"use_dora": True}, waiting, None, (7, 16)),
}


def state(model):
    """Classes, names of attributes, and names of buffers."""
    return {
        name: (type(m), set(vars(m)), set(vars(m)["_buffers"]))
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_unpatch_beside_a_forward(case, training, monkeypatch):
    """The call returns the same bits as before, and leaves nothing on a layer that is restored."""
    config, change, function, shape = CASES[case]
    model = single(**config)
    stop = change(model) if change else None
    if function:
        home, name, after = function
        stop = Stop(getattr(home, name), after)
        monkeypatch.setattr(home, name, stop)
    before = state(model)
    x = torch.randn(shape)
    layer = peftops.patch(model).base_model.model.lin

    def call():
        if training:
            return pass_of(model, x)
        torch.manual_seed(1)
        with torch.no_grad():
            return [model(x)]

    expected = call()
    out = beside(stop, call, lambda: peftops.unpatch(model))
    assert len(out) == len(expected)
    assert all(map(torch.equal, out, expected))
    assert type(layer) is Linear
    assert state(model) == before


@pytest.mark.parametrize("use_dora", [False, True])
def test_patch_beside_a_forward(use_dora):
    """The call ends as PEFT's own, and the next one is ours."""
    model = single(use_dora=use_dora)
    x = torch.randn(7, 16)
    stop = waiting(model)
    expected = pass_of(model, x)
    out = beside(stop, lambda: pass_of(model, x), lambda: peftops.patch(model))
    assert all(map(torch.equal, out, expected))
    assert peftops.report(model).calls == {}
    model(x)
    reason = "DoRA over a base that only its layer computes"
    assert peftops.report(model).calls == {reason if use_dora else OWN: 1}


def test_patch_and_unpatch_again_and_again():
    """While calls run that the interpreter may interrupt anywhere."""
    models = [single(), single(use_dora=True)]
    failures = []
    over = threading.Event()
    x = torch.randn(5, 16)

    def serve(model, stock, exact):
        while not over.is_set():
            try:
                with torch.no_grad():
                    y = model(x)
                if not error(y, exact) <= bound(stock, exact):
                    failures.append("y is off")
            except Exception as refusal:
                failures.append(refusal)

    threads = []
    for model in models:
        truth = model(x).detach(), exactly(model)(x.double()).detach()
        threads += [
            threading.Thread(target=serve, args=(model, *truth)) for _ in range(2)
        ]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for model in models * 500:
            peftops.unpatch(peftops.patch(model))
    finally:
        over.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(before)
    assert failures == []
    for model in models:
        for module in model.modules():
            assert not any("_peftops" in key for key in vars(module))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 24)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("by_layers", [False, True])
def test_unpatch_beside_a_fused_mlp(by_layers, monkeypatch):
    torch.manual_seed(0)
    model = adapted(nn.Sequential(MLP()), target_modules=["gate", "up", "down"])
    before = state(model)
    x = torch.randn(7, 16)
    stop = Stop(mlp.operands, after=True)
    monkeypatch.setattr(mlp, "operands", stop)
    mlp.fuse(peftops.patch(model), strict=True)
    if by_layers:
        model.base_model.model[0].up.register_forward_hook(lambda *args: None)
        before = state(peftops.unpatch(copy.deepcopy(model)))
    expected = pass_of(model, x)
    out = beside(stop, lambda: pass_of(model, x), lambda: peftops.unpatch(model))
    if by_layers:
        expected = pass_of(peftops.unpatch(copy.deepcopy(model)), x)
    assert all(map(torch.equal, out, expected))
    assert state(model) == before
    assert FusedLinear not in {type(module) for module in model.modules()}
