"""multi_lora_linear: each row has its adapter's result, each adapter its own rows' gradients.

test_ops.py tests the ops.
"""

import pytest
import torch
from law import bound, error

import peftops.functional as F
from peftops import backends
from peftops.testing.law import double

K, N = 40, 24
RANKS = 3, 8, 0, 17
SCALING = 0.5, 1.0, 2.0, -1.5
DROPOUT = 0.0, 0.3, 0.5, 0.9
SEED = torch.tensor([1234567])
ROUTES = {
    "runs": [0, 0, 0, 3, 3, 3, -1, -1, 1, 1, 2, 2],
    "mixed": [3, 0, -1, 1, 3, 2, 0, 0, -1, 1, 1, 3],
    "one": [1] * 12,
    "base": [-1] * 12,
}
FORMS = "dense", "transposed", "given", "nf4"


def tensors(dtype=torch.float32, adapter=None, m=12):
    """x, W, lora_A, lora_B, bias, gain and dy."""
    generator = torch.Generator().manual_seed(m)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    adapter = adapter or dtype
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "x": normal(m, K),
        "w": normal(N, K),
        "a": [normal(r, K, dtype=adapter) for r in RANKS],
        "b": [normal(N, r, dtype=adapter) for r in RANKS],
        "bias": normal(N),
        "gain": [normal(N, dtype=wide).abs(), None, None, normal(N, dtype=wide)],
        "dy": normal(m, N),
    }


def base_of(form, w, x):
    if form == "transposed":
        return w.T.contiguous().T
    if form == "nf4":
        return F.quantize_nf4(w)
    return F.Base("given", [x @ w.T]) if form == "given" else w


def each_alone(t, slots, base, dropout=None):
    """y of every row by lora_linear with its adapter alone."""
    out = [None] * len(slots)
    for slot in set(slots):
        own = [row for row, other in enumerate(slots) if other == slot]
        x = t["x"][own]
        weight = base
        if isinstance(base, F.Base) and base.form == "given":
            weight = F.Base("given", [base.tensors[0][own]])
        if slot < 0:
            a, b = t["a"][0][:0], t["b"][0][:, :0]
            y = F.lora_linear(x, weight, a, b, t["bias"])
        else:
            y = F.lora_linear(
                x,
                weight,
                t["a"][slot],
                t["b"][slot],
                t["bias"],
                scaling=SCALING[slot],
                gain=t["gain"][slot],
            )
        for row, result in zip(own, y, strict=True):
            out[row] = result
    return torch.stack(out)


def mixed(t, slots, base, **more):
    return F.multi_lora_linear(
        t["x"],
        base,
        t["a"],
        t["b"],
        torch.tensor(slots),
        t["bias"],
        scaling=list(SCALING),
        gain=t["gain"],
        **more,
    )


def leaves_of(t):
    every = [t["x"], t["bias"], *t["a"], *t["b"], *t["gain"]]
    return [leaf for leaf in every if leaf is not None]


def trained(t, run):
    """y and the gradient of every leaf, None where none comes."""
    leaves = [leaf.requires_grad_() for leaf in leaves_of(t)]
    y = run(t)
    return y.detach(), torch.autograd.grad(y, leaves, t["dy"], allow_unused=True)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "dtype, adapter",
    [(torch.float32, None), (torch.bfloat16, torch.float32), (torch.float16, None)],
    ids=str,
)
def test_each_row_is_that_of_its_adapter_alone(dtype, adapter, form, route):
    slots = ROUTES[route]
    t = tensors(dtype, adapter)
    wide = {name: double(value) for name, value in t.items()}
    base = base_of(form, t["w"], t["x"])
    if form == "nf4":
        exact_base = base.dequantize().to(dtype).double()
    else:
        exact_base = base_of(form, wide["w"], wide["x"])
    with backends.backend("reference"):
        exact = trained(wide, lambda t: each_alone(t, slots, exact_base))
    same = trained(t, lambda t: each_alone(t, slots, base))
    out = trained(t, lambda t: mixed(t, slots, base))
    assert error(out[0], exact[0]) <= bound(same[0], exact[0])
    for grad, other, truth in zip(out[1], same[1], exact[1], strict=True):
        if truth is None:
            assert grad is None or not grad.any()
        else:
            assert error(grad, truth) <= bound(other, truth)


@pytest.mark.parametrize("form", ["dense", "given"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(form, p, monkeypatch):
    monkeypatch.setattr(torch, "randint", lambda *args, **named: SEED)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).double().requires_grad_()

    x = normal(5, 6)
    w = normal(4, 6).detach()
    y0 = normal(5, 4)
    adapters = [normal(2, 6), normal(1, 6), normal(4, 2), normal(4, 1)]
    gain = normal(2, 4)

    def f(x, gain, y0, *adapters):
        return F.multi_lora_linear(
            x,
            F.Base("given", [y0]) if form == "given" else w,
            adapters[:2],
            adapters[2:],
            torch.tensor([1, 0, -1, 1, 0]),
            scaling=[2.0, 0.5],
            dropout_p=[p, 0.0],
            gain=gain,
        )

    if form == "dense":
        y0 = y0.detach()
    leaves = x, gain, y0, *adapters
    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("m", [12, 700])
def test_dropout_keeps_what_lora_linear_keeps(m, monkeypatch):
    monkeypatch.setattr(torch, "randint", lambda *args, **named: SEED)
    t = tensors(m=m) | {"gain": [None] * 4}
    slots = [ROUTES["mixed"][row % 12] for row in range(m)]

    def reference(t):
        z = t["x"] @ t["w"].T
        rows = []
        for row, slot in enumerate(slots):
            if slot < 0:
                rows.append(z[row])
                continue
            p = DROPOUT[slot]
            keep = F.dropout_mask(SEED, m, K, p)[row]
            h = t["a"][slot] @ (t["x"][row] * keep / (1 - p))
            rows.append(z[row] + SCALING[slot] * (t["b"][slot] @ h))
        return torch.stack(rows) + t["bias"]

    exact = trained({name: double(value) for name, value in t.items()}, reference)
    out = trained(t, lambda t: mixed(t, slots, t["w"], dropout_p=list(DROPOUT)))
    for value, truth in zip((out[0], *out[1]), (exact[0], *exact[1]), strict=True):
        assert error(value, truth) <= 1e-5
    evaluated = mixed(t, slots, t["w"], dropout_p=list(DROPOUT), training=False)
    assert torch.equal(evaluated, mixed(t, slots, t["w"]))


def test_an_adapter_of_nan_stays_with_its_rows():
    t = tensors()
    t["a"][3].fill_(float("nan"))
    t["b"][3].fill_(float("inf"))
    slots = ROUTES["mixed"]
    y, grads = trained(t, lambda t: mixed(t, slots, t["w"]))
    bad = torch.tensor(slots) == 3
    assert y[~bad].isfinite().all() and y[bad].isnan().all()
    assert grads[0][~bad].isfinite().all()
    own = zip(leaves_of(t)[2:], grads[2:], strict=True)
    kept = [
        grad for leaf, grad in own if leaf is not t["a"][3] and leaf is not t["b"][3]
    ]
    assert all(grad.isfinite().all() for grad in kept[:-1])  # the last is the gain of 3


def test_threads_do_not_change_a_bit():
    m = 700
    t = tensors(m=m)
    slots = [ROUTES["mixed"][row % 12] for row in range(m)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(trained(t, lambda t: mixed(t, slots, t["w"])))
    finally:
        torch.set_num_threads(before)
    (y, grads), (y_again, again) = results
    assert torch.equal(y, y_again) and all(map(torch.equal, grads, again))


def test_layouts_and_dtypes_of_arguments():
    t = tensors()
    slots = ROUTES["mixed"]
    expected = mixed(t, slots, t["w"])
    t["b"] = [b.T.contiguous().T for b in t["b"]]
    x = t["x"].view(3, 4, K)
    for dtype in (torch.int64, torch.int32, torch.int8):
        y = F.multi_lora_linear(
            x,
            t["w"],
            tuple(t["a"]),
            tuple(t["b"]),
            torch.tensor(slots, dtype=dtype).view(3, 4),
            t["bias"],
            scaling=SCALING,
            gain=t["gain"],
        )
        assert torch.equal(y.view(12, N), expected)


def test_one_number_serves_all_adapters():
    t = tensors()
    slots = torch.tensor(ROUTES["mixed"])
    each = {"scaling": [0.7] * 4, "dropout_p": [0.0] * 4}
    args = t["x"], t["w"], t["a"], t["b"], slots
    one = F.multi_lora_linear(*args, scaling=0.7, dropout_p=0.0)
    assert torch.equal(one, F.multi_lora_linear(*args, **each))


def test_nothing_along_a_side():
    t = tensors()
    leaves = [leaf.requires_grad_() for leaf in (*t["a"], *t["b"])]
    y = F.multi_lora_linear(t["x"][:0], t["w"], t["a"], t["b"], torch.empty(0).int())
    y.sum().backward()
    assert y.shape == (0, N)
    assert not any(leaf.grad.any() for leaf in leaves)
    for k, n in ((0, 3), (3, 0)):
        y = F.multi_lora_linear(
            torch.ones(2, k),
            torch.ones(n, k),
            [torch.ones(2, k)],
            [torch.ones(n, 2)],
            torch.tensor([0, -1]),
        )
        assert y.shape == (2, n) and not y.any()


def test_after_inference_mode_it_trains():
    ranks = [torch.randn(5, K), torch.randn(11, K)]
    others = [torch.randn(N, 5), torch.randn(N, 11)]
    x = torch.randn(3, K)
    w = torch.randn(N, K)
    slots = torch.tensor([0, 1, 1])
    with torch.inference_mode():
        expected = F.multi_lora_linear(x, w, ranks, others, slots, scaling=0.123)
    for t in (*ranks, *others):
        t.requires_grad_()
    y = F.multi_lora_linear(x, w, ranks, others, slots, scaling=0.123)
    y.sum().backward()
    assert torch.equal(y, expected)


def test_a_step_between_forward_and_backward_raises():
    t = tensors()
    t["a"][1].requires_grad_()
    y = mixed(t, ROUTES["mixed"], t["w"])
    with torch.no_grad():
        t["a"][1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_under_autocast():
    t = tensors(torch.bfloat16, torch.float32)
    slots = ROUTES["runs"]
    expected = mixed(t, slots, t["w"])
    wide = t | {"x": t["x"].float(), "w": t["w"].float()}
    with torch.autocast("cpu", torch.bfloat16):
        y = mixed(wide, slots, wide["w"])
    assert torch.equal(y, expected)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiled(p):
    torch._dynamo.reset()
    t = tensors()
    slots = ROUTES["mixed"]

    def run(t):
        torch.manual_seed(3)
        return trained(t, lambda t: mixed(t, slots, t["w"], dropout_p=p))

    def function(x, bias, a, b, gain, slots):
        return F.multi_lora_linear(
            x,
            t["w"],
            a,
            b,
            slots,
            bias,
            scaling=list(SCALING),
            dropout_p=p,
            gain=gain,
        )

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)

    def run_compiled(t):
        return compiled(
            t["x"], t["bias"], t["a"], t["b"], t["gain"], torch.tensor(slots)
        )

    out = trained(t, run_compiled)
    if not p:  # compiled code draws other random numbers
        expected = run(t)
        assert torch.equal(out[0], expected[0])
        pairs = zip(out[1], expected[1], strict=True)
        assert all(error(a, b.double()) <= 1e-6 for a, b in pairs)
