"""AdapterPool: what it mounts, keeps and lets go.

test_pool_machine.py compares a pool with a dictionary; test_pool_threads.py has threads use one.
Where numbers are whole or halves, float32 rounds nothing, and results are equal to the last bit.
"""

import json
import threading
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import peftops

pytestmark = pytest.mark.usefixtures("one_thread")
BASE = "__base__"
K = 12
SIZES = {"q_proj": 16, "k_proj": 8, "v_proj": 24}


class Layers(nn.Module):
    """Three linear layers of whole numbers, side by side."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, n in SIZES.items():
            layer = nn.Linear(K, n)
            for parameter in layer.parameters():
                parameter.data = whole(generator, *parameter.shape)
            setattr(self, name, layer)

    def forward(self, x):
        return torch.cat([getattr(self, name)(x) for name in SIZES], -1)


class Spec(NamedTuple):
    """An adapter. k_proj has a rank of its own, and with DoRA each gain is 2."""

    seed: int
    rank: int
    other: int
    layers: tuple = tuple(SIZES)
    scale: float = 0.5
    dora: bool = False

    @property
    def ranks(self):
        own = {"k_proj": self.other}
        return {name: own.get(name, self.rank) for name in self.layers}

    @property
    def pages(self):
        return -(-max(self.ranks.values()) // 8)


def whole(generator, *shape):
    return torch.randint(-3, 4, shape, generator=generator).float()


@lru_cache(None)
def matrices(spec):
    """{layer: (lora_A, lora_B)}"""
    generator = torch.Generator().manual_seed(spec.seed)
    return {
        name: (whole(generator, rank, K), whole(generator, SIZES[name], rank))
        for name, rank in spec.ranks.items()
    }


@lru_cache(None)
def saved(spec):
    """The adapter's tensors, as PEFT names them, and its config."""
    tensors = {}
    for name, (a, b) in matrices(spec).items():
        key = f"base_model.model.{name}.lora_"
        tensors |= {f"{key}A.weight": a, f"{key}B.weight": b}
        if spec.dora:
            moved = getattr(PLAIN, name).weight.detach() + spec.scale * b @ a
            tensors[f"{key}magnitude_vector"] = 2 * moved.norm(dim=1)
    config = {
        "peft_type": "LORA",
        "r": spec.rank,
        "lora_alpha": spec.scale * spec.rank,
        "rank_pattern": {"k_proj": spec.other},
        "alpha_pattern": {"k_proj": spec.scale * spec.other},
        "target_modules": [*spec.layers],
        "use_dora": spec.dora,
    }
    return tensors, config


def write(folder, tensors, config):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def formula(spec, x):
    """What Layers returns for x with this adapter, or without one."""
    results = []
    for name in SIZES:
        weight, bias = getattr(PLAIN, name).parameters()
        y = x @ weight.T
        if spec is not None and name in spec.layers:
            a, b = matrices(spec)[name]
            y = (y + spec.scale * (x @ a.T @ b.T)) * (2 if spec.dora else 1)
        results.append(y + bias)
    return torch.cat(results, -1)


def pool_of(pages, model=None, max_rank=24):
    """A pool of so many pages."""
    probe = peftops.AdapterPool(Layers(), memory="1MB")
    memory = pages * probe.stats().page_bytes
    return peftops.AdapterPool(model or Layers(), memory=memory, max_rank=max_rank)


def poison(pool):
    """Fills what is free with NaN."""
    free = pool.store.room.free
    rows = [8 * page + line for page in free for line in range(8)]
    for layer in pool.store.layers.each:
        layer.a[rows] = torch.nan
        layer.b[rows] = torch.nan
        layer.scale[free] = torch.nan
        if layer.gain is not None:
            layer.gain[free] = torch.nan


PLAIN = Layers()
X = whole(torch.Generator().manual_seed(2), 1, 2, K)
ONE = Spec(1, 8, 3)
TWO = Spec(2, 13, 16)
THREE = Spec(3, 24, 5)


def result(pool, name, x=X):
    with pool.use([name]):
        return pool.model(x)


def mounted(pool):
    entries = pool.store.entries.items()
    return {name for name, entry in entries if entry.version is not None}


def normal(seed, rank, dtype=torch.float32, dora=False):
    """An adapter of numbers that are not whole."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    tensors, config = saved(Spec(seed, rank, rank, dora=dora, scale=0.7))
    return {key: draw(*t.shape) for key, t in tensors.items()}, config


def test_a_lease_ends_when_the_body_raises():
    pool = pool_of(4)
    pool.load("a", *saved(TWO))
    for change in (lambda: pool.replace("a", *saved(ONE)), lambda: pool.unload("a")):
        with pytest.raises(KeyError, match="mine"), pool.use(["a", BASE, "a"]):
            change()
            assert pool.stats().old_pages > 0
            raise KeyError("mine")
        stats = pool.stats()
        assert (stats.used, stats.old_pages) == (0, 0)
    assert stats.free_pages == 4
    assert torch.equal(pool.model(X), formula(None, X))


def test_the_inner_use_counts_and_the_outer_one_after_it():
    pool = pool_of(4)
    pool.load("a", *saved(ONE))
    pool.load("b", *saved(TWO))
    with pool.use(["a"]):
        assert torch.equal(result(pool, "b"), formula(TWO, X))
        assert torch.equal(result(pool, BASE), formula(None, X))
        with pytest.raises(ValueError, match=r"adapter\(s\): c$"):
            result(pool, "c")
        assert torch.equal(pool.model(X), formula(ONE, X))
    assert torch.equal(pool.model(X), formula(None, X))


def test_another_thread_has_its_own_use():
    pool = pool_of(4)
    pool.load("a", *saved(ONE))
    pool.load("b", *saved(TWO))
    seen = []

    def other():
        seen.append(pool.model(X))
        seen.append(result(pool, "b"))
        seen.append(pool.model(X))

    with pool.use(["a"]):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(60)
        assert torch.equal(pool.model(X), formula(ONE, X))
    wanted = [formula(spec, X) for spec in (None, TWO, None)]
    assert len(seen) == 3 and all(map(torch.equal, seen, wanted))


def test_close_gives_the_model_back():
    model = Layers()
    model.v_proj.bias.requires_grad_(False)
    modules = dict(model.named_modules())
    trained = [parameter.requires_grad for parameter in model.parameters()]
    pool = pool_of(4, model)
    pool.load("a", *saved(ONE), pin=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pool.use(["a"]):
        with pytest.raises(RuntimeError, match="close"):
            pool.close()
        pool.unload("a")
        with pytest.raises(RuntimeError, match="close"):
            pool.close()
        assert torch.equal(model(X), formula(ONE, X))
    pool.close()
    assert dict(model.named_modules()) == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert torch.equal(model(X), formula(None, X))
    peftops.AdapterPool(model, memory="1MB").close()


def test_close_gives_a_generate_of_the_models_own_back():
    def generate():
        return "mine"

    model = Layers()
    model.generate = generate
    pool = pool_of(4, model)
    assert model.generate() == "mine"
    pool.close()
    assert model.generate is generate


def test_fits_counts_the_adapters_that_find_room():
    pool = pool_of(7)
    for rank, count in ((1, 7), (8, 7), (9, 3), (16, 3), (17, 2), (24, 2), (25, 0)):
        assert pool.fits({"peft_type": "LORA", "r": rank}) == count
        patterns = {"k_proj": rank, "v_proj": 1}
        assert pool.fits({"r": 1, "rank_pattern": patterns}) == count
    assert pool.fits({}) == pool.fits({"r": 8})
    for number in range(3):
        pool.load(f"{number}", *saved(Spec(number, 9, 9)), pin=True)
    with pytest.raises(MemoryError, match="'3' needs 2 pages of 7, and 1 can be free"):
        pool.load("3", *saved(TWO))
    assert pool.names() == ["0", "1", "2"]


@pytest.mark.parametrize(
    "text, size",
    [(1 << 20, 1 << 20), ("1MiB", 1 << 20), ("500kB", 500_000), (" 0.5 m ", 500_000)],
)
def test_memory_is_bytes_or_a_text(text, size):
    pool = peftops.AdapterPool(Layers(), memory=text)
    stats = pool.stats()
    assert stats.pages == stats.free_pages == size // stats.page_bytes
    sizes = [8 * 4 * (K + n) + 4 * n for n in SIZES.values()]
    assert stats.page_bytes == sum(sizes)


@pytest.mark.parametrize(
    "memory",
    [0, -1, True, 1e6, None, "", "4", "GiB", "4XB", "-4GiB", "4GiB 2", "1KiB"],
    ids=repr,
)
def test_wrong_memory_leaves_the_model_as_it_is(memory):
    model = Layers()
    with pytest.raises(ValueError, match="memory must"):
        peftops.AdapterPool(model, memory=memory)
    assert all(type(layer) is nn.Linear for layer in model.children())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dora", [False, True])
def test_an_evicted_adapter_comes_back_with_the_same_bits(dora, dtype):
    pool = pool_of(4)
    tensors, config = normal(1, 21, dtype, dora)
    pool.load("a", tensors, config)
    expected = result(pool, "a")
    for tensor in tensors.values():
        tensor.fill_(torch.nan)
    pool.load("b", *saved(TWO))
    pool.load("c", *saved(TWO))
    assert mounted(pool) == {"b", "c"}
    poison(pool)
    assert torch.equal(result(pool, "a"), expected)
    assert mounted(pool) == {"a"} and pool.stats().evictions == 3
    assert pool.version("a") == 1


def test_an_evicted_adapter_of_a_folder_is_read_again(tmp_path):
    pool = pool_of(4)
    folder = write(tmp_path / "a", *saved(THREE))
    pool.register("a", folder)
    assert pool.stats().mounts == 0
    assert torch.equal(result(pool, "a"), formula(THREE, X))
    write(folder, *saved(TWO))
    assert torch.equal(result(pool, "a"), formula(THREE, X))
    pool.load("b", *saved(THREE))
    assert pool.store.entries["a"].parts is None
    assert torch.equal(result(pool, "a"), formula(TWO, X))
    pool.load("c", *saved(THREE))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        result(pool, "a")
    assert mounted(pool) == {"c"} and pool.stats().used == 0


def test_no_two_versions_share_a_number(tmp_path):
    """Not even of one name that was unloaded in between."""
    pool = pool_of(4)
    pool.load("a", *saved(ONE))
    pool.register("b", write(tmp_path / "b", *saved(ONE)))
    numbers = [pool.version("b"), pool.version("a")]
    pool.replace("a", *saved(TWO))
    numbers.append(pool.version("a"))
    with pytest.raises(ValueError):
        pool.replace("a", *saved(Spec(1, 25, 25)))
    assert pool.version("a") == numbers[-1]
    pool.replace("b", tmp_path / "b")
    numbers.append(pool.version("b"))
    pool.unload("a")
    pool.load("a", *saved(ONE))
    numbers.append(pool.version("a"))
    assert numbers == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="no adapter 'c'"):
        pool.version("c")


def test_pages_that_do_not_lie_together_give_the_same_bits():
    adapter = normal(5, 23, dora=True)
    x = torch.randn(1, 3, K)
    whole_pool = pool_of(3)
    whole_pool.load("a", *adapter)
    pool = pool_of(7)
    for number in range(7):
        pool.load(f"{number}", *saved(ONE), pin=True)
    for number in (1, 3, 6):
        pool.unload(f"{number}")
    poison(pool)
    pool.load("a", *adapter)
    assert pool.store.entries["a"].version.pages == [1, 3, 6]
    assert torch.equal(result(pool, "a", x), result(whole_pool, "a", x))
    assert torch.equal(result(pool, "5"), formula(ONE, X))
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for one, leaf in zip((pool, whole_pool), leaves, strict=True):
        result(one, "a", leaf).square().sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_what_was_mounted_in_inference_mode_is_no_part_of_it():
    pool = pool_of(4)
    with torch.inference_mode():
        pool.load("a", *saved(ONE._replace(dora=True)))
    pool.load("b", *saved(ONE))
    x = X.clone().requires_grad_()
    for name, spec in (("a", ONE._replace(dora=True)), ("b", ONE)):
        y = result(pool, name, x)
        y.sum().backward()
        assert torch.equal(y, formula(spec, X))


class Wrapper(nn.Module):
    """A layer that looks linear, around one that is."""

    def __init__(self, linear):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


Wrapper.__name__ = "WrapperLinear"


def test_an_adapter_inside_of_another_linear_layer_is_not_lost():
    model = Layers()
    model.q_proj = Wrapper(model.q_proj)
    pool = pool_of(8, model)
    tensors, config = saved(Spec(1, 8, 8, ("q_proj",)))
    tensors = {key.replace("q_proj", "q_proj.linear"): t for key, t in tensors.items()}
    pool.load("a", tensors, config | {"target_modules": ["linear"]})
    assert torch.equal(result(pool, "a"), formula(Spec(1, 8, 8, ("q_proj",)), X))
