"""Adapters in pages: how they get there, and layers that read them, compiled too."""

import itertools

import isa
import pytest
import torch
from law import bound, error
from torch import nn

import peftops
from peftops.ops import multi_pages
from peftops.ops.multi import multi_fwd
from peftops.ops.multi_contract import PAGE
from peftops.ops.multi_pages import Put, not_finite, put, put_by_torch

HALF = torch.bfloat16, torch.float16
DTYPES = torch.float32, *HALF
SIZES = [(16, 24, 8), (33, 7, 3), (5, 40, 17), (64, 19, 32), (1, 1, 1)]  # k, n, r
PAGES = [[0, 1, 2, 3], [5, 2, 7, 0]]


def puts(
    to,
    source,
    sizes,
):
    """Adapters and pools full of NaN for them."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for k, n, r in sizes:
        a = torch.full((8 * PAGE, k), torch.nan, dtype=to)
        b = torch.full((8 * PAGE, n), torch.nan, dtype=to)
        lora_A = torch.randn(r, k, generator=generator).to(source)
        lora_B = torch.randn(n, r, generator=generator).to(source)
        made.append(Put(a, b, lora_A, lora_B))
    return made


def expected(each, pages):
    """Pools that hold an adapter in these pages, and NaN elsewhere."""
    r = each.lora_A.shape[0]
    lines = [PAGE * pages[j // PAGE] + j % PAGE for j in range(r)]
    a = torch.full_like(each.a, torch.nan)
    b = torch.full_like(each.b, torch.nan)
    a[lines] = each.lora_A.to(a.dtype)
    b[lines] = each.lora_B.T.to(b.dtype)
    return a, b


def bits(t):
    return t.view(torch.int32 if t.dtype is torch.float32 else torch.int16)


@pytest.mark.parametrize("pages", PAGES, ids=["together", "apart"])
@pytest.mark.parametrize(
    "name",
    [
        *isa.NAMES,
        "torch",
    ],
)
def test_adapters_lie_in_their_pages(
    name,
    pages,
    on_isa,
):
    """One by one and all at once, whatever the dtypes. No other row is written."""
    if name != "torch":
        on_isa(name)
    fill = put_by_torch if name == "torch" else put
    for to, source in itertools.product(DTYPES, DTYPES):
        for sizes in (*[[size] for size in SIZES], SIZES):
            made = puts(to, source, sizes)
            fill(made, pages)
            for each in made:
                for pool, wanted in zip(each[:2], expected(each, pages), strict=True):
                    assert torch.equal(bits(pool), bits(wanted))


@pytest.mark.parametrize(
    "spoil",
    [
        "fp64",
        "a view",
        "two dtypes",
    ],
)
def test_what_compiled_code_cannot_read_is_copied_by_torch(spoil, monkeypatch):
    made = puts(torch.float32, torch.float32, SIZES)
    if spoil == "fp64":
        made = [each._replace(lora_A=each.lora_A.double()) for each in made]
        made = [each._replace(lora_B=each.lora_B.double()) for each in made]
    elif spoil == "a view":
        made[1] = made[1]._replace(lora_A=made[1].lora_A.T.contiguous().T)
    else:
        made[1] = made[1]._replace(lora_A=made[1].lora_A.half())
    called = []
    monkeypatch.setattr(
        multi_pages, "put_by_torch", lambda *args: called.append(put_by_torch(*args))
    )
    put(made, PAGES[1])
    assert len(called) == 1
    for each in made:
        for pool, wanted in zip(each[:2], expected(each, PAGES[1]), strict=True):
            assert torch.equal(bits(pool), bits(wanted))


@pytest.mark.parametrize("name", isa.NAMES)
@pytest.mark.parametrize(
    "dtype",
    [
        *DTYPES,
        torch.float64,
    ],
    ids=str,
)
def test_every_place_is_looked_at(
    name,
    dtype,
    on_isa,
):
    on_isa(name)
    tensors = [torch.full((3, n), torch.finfo(dtype).max, dtype=dtype) for n in (1, 37)]
    tensors.append(-tensors[1])
    assert not_finite(tensors) is None
    for place, t in enumerate(tensors):
        flat = t.view(-1)
        for at in range(flat.numel()):
            for value in (torch.nan, torch.inf, -torch.inf):
                before = flat[at].item()
                flat[at] = value
                assert not_finite(tensors) == place
                flat[at] = before
    assert not_finite(tensors) is None


@pytest.mark.parametrize(
    "slots",
    [
        4,
        300,
        70000,
    ],
)
def test_slots_that_no_row_has_are_not_looked_at(slots):
    """Rows in any order, with slots of one, two and three bytes; the others hold what is wrong."""
    torch.manual_seed(0)
    m, k, n = 33, 12, 20
    used = torch.tensor([0, 1, slots // 2, slots - 1])
    rows = used[torch.randint(0, 4, (m,))].int()
    rows[::5] = -1
    table = torch.full((slots, 1), 10**6, dtype=torch.int32)
    rank = torch.full((slots,), -7, dtype=torch.int32)
    table[used, 0] = torch.arange(4, dtype=torch.int32)
    rank[used] = torch.tensor([8, 3, 0, 5], dtype=torch.int32)
    scale = torch.full((slots,), torch.nan)
    scale[used] = torch.tensor([1.0, 0.5, 2.0, -1.0])
    x = torch.randn(m, k)
    w = torch.randn(n, k)
    a = torch.randn(4 * PAGE, k)
    b = torch.randn(4 * PAGE, n)
    y, *_ = multi_fwd(x, [w], a, b, rows, table, rank, scale)
    same, exact = (
        rows_alone(rows, table, rank, *[t.to(dtype) for t in (x, w, a, b, scale)])
        for dtype in (torch.float32, torch.float64)
    )
    assert error(y, exact) <= bound(same, exact)


def rows_alone(
    rows,
    table,
    rank,
    x,
    w,
    a,
    b,
    scale,
):
    """y by the formula, row by row."""
    y = x @ w.T
    for row, slot in enumerate(rows.tolist()):
        if slot >= 0:
            first = PAGE * int(table[slot])
            own = slice(first, first + int(rank[slot]))
            y[row] += scale[slot] * (x[row] @ a[own].T) @ b[own]
    return y


class Net(nn.Module):
    """Three layers of 16 features."""

    def __init__(self):
        super().__init__()
        self.lins = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, x):
        for layer in self.lins:
            x = torch.relu(layer(x)) + x
        return x


def pool_of(model):
    """A pool with four adapters of the model; the last one misses a layer."""
    pool = peftops.AdapterPool(model, memory="1MiB", max_rank=16)
    for name, r in {"a": 8, "b": 3, "c": 16, "d": 2}.items():
        tensors = {}
        for index in range(2 if name == "d" else 3):
            prefix = f"base_model.model.lins.{index}.lora_"
            tensors[f"{prefix}A.weight"] = 0.2 * torch.randn(r, 16)
            tensors[f"{prefix}B.weight"] = 0.2 * torch.randn(16, r)
        config = {"peft_type": "LORA", "r": r, "target_modules": "all-linear"}
        pool.load(name, tensors, config)
    return pool


NAMES = [["a", "__base__", "c", "d"], ["__base__"] * 4, ["b"] * 4, ["d", "d", "c", "b"]]


def hooked(model):
    model.lins[1].base_layer.register_forward_hook(lambda module, args, y: 2 * y)


@pytest.mark.parametrize(
    "change",
    [
        None,
        hooked,
    ],
)
def test_one_graph_serves_every_batch(change):
    torch.manual_seed(0)
    model = Net()
    pool = pool_of(model)
    if change:
        change(model)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(4, 2, 16)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
        for names in NAMES:
            with pool.use(names):
                assert torch.equal(compiled(x), model(x))
        pool.replace("b", tensors_of(pool, "c"), {"peft_type": "LORA", "r": 16})
        with pool.use(NAMES[2]):
            assert torch.equal(compiled(x), model(x))
    assert len(graphs) == 1


def test_a_compiled_layer_without_adapters_may_have_another_batch():
    """Adapter d has nothing in the third layer."""
    model = Net()
    pool = pool_of(model)
    torch._dynamo.reset()
    compiled = torch.compile(model.lins[2], fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 16)
    with torch.no_grad(), pool.use(["d", "__base__"]):
        assert torch.equal(compiled(x), model.lins[2].base_layer(x))


def tensors_of(pool, name):
    """The tensors of a mounted adapter that all layers have."""
    tensors = {}
    slot = pool.store.known(name).version.slot
    for index, layer in enumerate(pool.store.layers.each):
        a, b = layer.adapter_in(slot)
        prefix = f"base_model.model.lins.{index}.lora_"
        tensors |= {f"{prefix}A.weight": a, f"{prefix}B.weight": b.T}
    return tensors


def test_gradients_of_compiled_calls():
    torch.manual_seed(0)
    model = Net()
    pool = pool_of(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for names in NAMES:
        grads = []
        for call in (model, compiled):
            x = torch.linspace(-1, 1, 4 * 2 * 16).view(4, 2, 16).requires_grad_()
            with pool.use(names):
                call(x).square().sum().backward()
            grads.append(x.grad)
        assert torch.equal(*grads)
