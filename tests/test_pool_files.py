"""AdapterPool with files and tensors of strangers: served by the formula, or refused unchanged."""

import json
import math
import os
import random
import re
import shutil

import numpy as np
import pytest
import torch
from adapters import BIASED, DORA, HEAD, LAYER, PLAIN, Q, V, ones, pair, save
from broken_adapters import MUTATIONS, make_special, sparse_tensor, write
from law import bound, error
from torch import nn

import peftops
from peftops.adapter_file import CONFIG, PREFIX, WEIGHTS, names
from peftops.nn.pool_files import Folders

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.usefixtures("one_thread")
CASES = 1000
ENTRANCES = ["load", "replace", "use"]
SOURCE = {key: torch.from_numpy(t).cumsum(1).sin() for key, t in PLAIN.items()}
FIELDS = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
FIELDS["target_modules"] = ["q_proj", "v_proj"]
AQ = f"{Q}.lora_A.weight"
BV = f"{V}.lora_B.weight"


class Tiny(nn.Module):
    """All its layers get the same x, so that each output shows one product."""

    def __init__(self, k=8, n=6):
        super().__init__()
        linears = [{"q_proj": nn.Linear(k, n), "v_proj": nn.Linear(k, n)} for _ in "01"]
        blocks = [nn.ModuleDict({"self_attn": nn.ModuleDict(pair)}) for pair in linears]
        self.model = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.embed_tokens = nn.Embedding(9, k)
        self.lm_head = nn.Linear(k, n)

    def forward(self, x):
        return torch.stack([linear(x) for linear in projections(self).values()])


def projections(model):
    """{name: layer} of those that may have adapters."""
    return {name: m for name, m in model.named_modules() if name.endswith("_proj")}


def pool_of(model):
    """A pool of 4 pages and ranks up to 16."""
    targets = FIELDS["target_modules"]
    return peftops.AdapterPool(model, memory=8400, max_rank=16, target_modules=targets)


@pytest.fixture
def pool(tmp_path):
    """A pool that serves "anna", who has LoRA, and "bert", who has DoRA."""
    pool = pool_of(Tiny())
    pool.load("anna", save(tmp_path / "anna", PLAIN))
    pool.load("bert", save(tmp_path / "bert", DORA, use_dora=True))
    return pool


def served(pool, adapters, k=8):
    """(x, y) of a batch that is always the same."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(len(adapters), 32, k, generator=draw)
    with pool.use(adapters), torch.no_grad():
        return x, pool.model(x)


def formula(model, tensors, config, x):
    """What PEFT's layers compute, one output for each layer, in the dtype of x."""
    held = {key.removeprefix(PREFIX): t.to(x.dtype) for key, t in tensors.items()}
    for module, linear in projections(model).items():
        w = linear.weight.detach().to(x.dtype)
        y = x @ w.T
        if f"{module}.lora_A.weight" in held:
            a = held[f"{module}.lora_A.weight"]
            b = held[f"{module}.lora_B.weight"]
            scaling = scaling_of(config, module, len(a))
            y = y + scaling * (x @ a.T @ b.T)
            magnitude = held.get(f"{module}.lora_magnitude_vector")
            if magnitude is not None:
                y = y * (magnitude / (w + scaling * (b @ a)).norm(dim=1))
        yield y + linear.bias.detach().to(x.dtype)


def scaling_of(config, module, rank):
    patterns = config.get("alpha_pattern") or {}
    hits = [key for key in patterns if re.match(rf"(.*\.)?({key})$", module)]
    values = [patterns[key] for key in hits] + [config.get("lora_alpha"), 8]
    alpha = next(value for value in values if value is not None)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def check_served(pool, name, tensors, config, k=8):
    """Asserts that all rows get what the formula gives them. Whether no number overflows."""
    x, y = served(pool, [name, "__base__"], k)
    triples = []
    for sample, held in enumerate([tensors, {}]):
        exact = formula(pool.model, held, config, x[sample].double())
        same = formula(pool.model, held, config, x[sample])
        triples += zip(y[:, sample], exact, same, strict=True)
    kept = [triple for triple in triples if triple[2].isfinite().all()]
    out, right, rounded = zip(*kept, strict=True)
    assert error(out, right) <= bound(rounded, right)
    return len(kept) == len(triples)


def state_of(pool):
    """What must be as it was after an error. The mounts of a success are not counted."""
    _, y = served(pool, ["anna", "bert", "__base__"])
    return pool.names(), pool.stats()._replace(mounts=0), y.numpy().tobytes()


def offer(pool, entrance, *source):
    """The name under which the pool has taken an adapter."""
    if entrance == "replace":
        pool.replace("bert", *source)
        return "bert"
    if entrance == "load":
        pool.load("new", *source)
        return "new"
    pool.register("new", *source)
    try:
        with pool.use(["new"]):
            return "new"
    except BaseException:
        pool.unload("new")
        raise


def refusal(pool, entrance, *source, raises=ValueError):
    """What the pool says of an adapter that it does not take. It is unchanged."""
    before = state_of(pool), pool.stats()
    with pytest.raises(raises) as caught:
        offer(pool, entrance, *source)
    assert (state_of(pool), pool.stats()) == before
    return str(caught.value)


def sound_adapter(draw):
    """(tensors, config) of an adapter as PEFT could have saved it."""
    ranks = {"q_proj": 4, "v_proj": draw.choice([1, 3, 8, 9, 16])}
    config = FIELDS | {"rank_pattern": ranks, "use_rslora": draw.random() < 0.3}
    config["use_dora"] = draw.random() < 0.3
    config["alpha_pattern"] = {"1.self_attn.q_proj": draw.choice([0, -3, 2.5, 1e3])}
    modules = [module.replace("s.0", f"s.{i}") for module in (Q, V) for i in range(2)]
    tensors = {}
    for module in draw.sample(modules, draw.randint(1, 4)):
        dtype = draw.choice([torch.float32, torch.float64, torch.half, torch.bfloat16])
        rank = ranks[module.rpartition(".")[2]]
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, 8, dtype=dtype)
        tensors[f"{module}.lora_B.weight"] = torch.randn(6, rank, dtype=dtype)
        if config["use_dora"]:
            tensors[f"{module}.lora_magnitude_vector"] = torch.rand(6)
    return tensors, config


RENAMED = {  # what stands in a key -> what another library or model would have there
    PREFIX: ["", "module.", f"{PREFIX}module."],
    "self_attn": ["self_attn._orig_mod", "_fsdp_wrapped_module", "mlp"],
    "q_proj": ["v_proj", "k_proj", "q_proj.base_layer"],
    "lora_A": ["lora_B", "lora_C", "lora_A.default", "lora_embedding_A"],
}


def change_tensor(draw, tensors):
    """Changes, drops, renames or copies one tensor."""
    key = draw.choice(list(tensors))
    change = draw.choice(["change", "change", "drop", "rename", "copy"])
    t = tensors.pop(key)
    if change == "copy":
        tensors[key] = t
    if change == "change":
        planted = t.clone()
        place = draw.randrange(t.numel())
        planted.view(-1)[place] = draw.choice([math.nan, math.inf, -math.inf, 6e4, 0])
        shaped = [t.t(), t[:-1], t[..., :-1], t[None], t.flatten()]
        typed = [t.double(), t.half(), t.to(torch.int8), t > 0, t.to(torch.float8_e5m2)]
        tensors[key] = draw.choice([*[planted] * 9, *shaped, *typed]).contiguous()
    elif change != "drop":
        old = draw.choice(list(RENAMED))
        tensors[key.replace(old, draw.choice(RENAMED[old]))] = t.clone()


def write_strange(draw, folder):
    """Writes a sound adapter with a few changes, or with none."""
    tensors, config = sound_adapter(draw)
    if draw.random() < 0.4:
        change_tensor(draw, tensors)
    data = safetensors.save(tensors)
    start = 8 + int.from_bytes(data[:8], "little")
    case = {"config": config, "header": json.loads(data[8:start]), "length": None}
    case["numbers"] = data[start:]
    weights = MUTATIONS | {sparse_tensor: 0, "bits": 6, "": 12}
    [mutate] = draw.choices(list(weights), weights.values())
    if mutate in MUTATIONS:
        mutate(draw, case)
    write(folder, case["config"], case["header"], case["numbers"], case["length"])
    if "special" in case:
        make_special(folder, *case["special"])
    if mutate == "bits":
        file = folder / draw.choice([CONFIG, WEIGHTS])
        data = bytearray(file.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)


def test_strange_adapters_are_served_right_or_refused(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(names, "SECONDS", 0.2)
    draw = random.Random(0)
    before = state_of(pool)
    taken = 0
    overflows = 0
    for i in range(CASES):
        folder = tmp_path / str(i)
        folder.mkdir()
        write_strange(draw, folder)
        try:
            name = offer(pool, draw.choice(ENTRANCES), folder)
        except ValueError as refused:
            assert str(folder) in str(refused), i
        else:
            taken += 1
            config = json.loads((folder / CONFIG).read_text())
            tensors = safetensors.load_file(folder / WEIGHTS)
            overflows += not check_served(pool, name, tensors, config)
            if name == "new":
                pool.unload("new")
            pool.replace("bert", tmp_path / "bert")
        assert state_of(pool) == before, i
    assert 200 < taken < 400 and overflows < 20


E = f"{PREFIX}embed_tokens.lora_embedding_"
OF_EMBEDDING = {f"{E}A": ones(4, 8), f"{E}B": ones(6, 4)}
NAN = {BV: np.array([[1, 2, 3, np.nan]] * 6, np.float32)}
LOW = pair(Q) | pair(V, r=2)
PATTERNS = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"0.self_attn.q_proj": 3}}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize(
    "tensors, config, says",
    [
        (PLAIN | pair(f"{LAYER}.fc"), {}, "fc.lora_A.weight is of no layer of the"),
        (pair(f"{PREFIX}lm_head"), {}, "lm_head.lora_A.weight is of no layer"),
        (PLAIN | HEAD, {"modules_to_save": ["lm_head"]}, "lm_head.weight is no LoRA"),
        (PLAIN | OF_EMBEDDING, {}, "embed_tokens.lora_embedding_A is of no layer"),
        (PLAIN | {f"{Q}.bias": ones(6)}, {"bias": "all"}, "q_proj.bias is no LoRA"),
        (BIASED, {"lora_bias": True}, "lora_bias: a pool has no biases of lora_B"),
        (pair(Q, k=9), {}, r"q_proj.lora_A.weight must be (4, 8), got (4, 9)"),
        (pair(V, n=7), {}, r"v_proj.lora_B.weight must be (6, 4), got (7, 4)"),
        (pair(Q, r=17), {"r": 17}, "has rank 17, and max_rank of the pool is 16"),
        (LOW, {}, "v_proj: the rank is 2, and 4 in adapter_config.json"),
        (PLAIN, {"rank_pattern": {"q_proj": 2}}, "q_proj: the rank is 4, and 2 in"),
        (PLAIN, {"use_dora": True}, "has no lora_magnitude_vector, unlike use_dora"),
        (DORA, {}, "q_proj has a lora_magnitude_vector, unlike use_dora"),
        *(
            (PLAIN, {"init_lora_weights": init}, f"{init!r} changes the base's weights")
            for init in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq")
        ),
        (PLAIN, {"alora_invocation_tokens": [1, 2]}, "a pool has no aLoRA"),
        (PLAIN, {"peft_type": "LOHA"}, "peft_type must be LORA, got LOHA"),
        (PLAIN, {"target_modules": ["q_proj"]}, "target_modules leaves model.layers.0"),
        (PLAIN | NAN, {}, "v_proj.lora_B.weight holds NaN or infinity"),
        ({}, {}, "no tensors are there"),
    ],
)
def test_adapters_that_the_pool_cannot_serve_are_refused_by_name(
    pool, tmp_path, entrance, tensors, config, says
):
    folder = save(tmp_path / "new", tensors, **config)
    text = refusal(pool, entrance, folder)
    assert says in text and text.startswith(str(folder)) and text.isprintable()


def sparse(folder):
    (folder / WEIGHTS).write_bytes((9 << 40).to_bytes(8, "little"))
    os.truncate(folder / WEIGHTS, 10 << 40)


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize(
    "spoil, says",
    [
        (
            lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
            "_model.bin: save it",
        ),
        (lambda f: (f / CONFIG).unlink(), "No such file"),
        (lambda f: (f / CONFIG).write_text("[]"), "must hold a JSON object, got list"),
        (shutil.rmtree, "there is no folder"),
        (lambda f: make_special(f, "fifo", CONFIG), "is not a reg"),
        (lambda f: make_special(f, "fifo", WEIGHTS), "is not a reg"),
        (sparse, "has a header of more than 48 MiB"),
    ],
)
def test_files_that_are_none_are_refused(pool, tmp_path, entrance, spoil, says):
    folder = save(tmp_path / "new", PLAIN)
    spoil(folder)
    assert says in refusal(pool, entrance, folder)


@pytest.mark.parametrize("name", ["", "a/b", "a\\b", "..", "__base__", 7, None, "a\nb"])
def test_names_are_texts_without_slashes(pool, tmp_path, name):
    before = state_of(pool)
    for add in (pool.load, pool.register):
        with pytest.raises(ValueError, match=r"name must be a text without slashes"):
            add(name, tmp_path / "anna")
    assert state_of(pool) == before


@pytest.mark.parametrize("entrance", ["load", "replace"])
def test_tensors_and_configs_must_be_some(pool, entrance):
    text = refusal(pool, entrance, SOURCE | {AQ: [1.0]}, FIELDS, raises=TypeError)
    assert f"{AQ} must be a tensor, got list" in text
    text = refusal(pool, entrance, SOURCE, ["r"], raises=TypeError)
    assert "config must be a LoraConfig or a dict, got list" in text
    text = refusal(pool, entrance, 7, raises=TypeError)
    assert "source must be a folder or a dict of tensors, got int" in text


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize(
    "change",
    [
        lambda file, other: os.truncate(file, 99),
        lambda file, other: os.replace(other, file),
        lambda file, other: file.write_bytes(other.read_bytes()),
    ],
)
def test_a_file_that_changes_while_it_is_read_is_refused(
    pool, tmp_path, monkeypatch, entrance, change
):
    folder = save(tmp_path / "new", PLAIN)
    other = save(tmp_path / "other", {key: 2 * PLAIN[key] for key in PLAIN}) / WEIGHTS
    os.utime(folder / WEIGHTS, (1, 1))
    read = Folders.read

    def read_changed(self, file, size):
        change(file, other)
        return read(self, file, size)

    monkeypatch.setattr(Folders, "read", read_changed)
    assert "changed while it was read" in refusal(pool, entrance, folder)


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize(
    "tensors, config",
    [
        (LOW, PATTERNS | {"use_rslora": True, "lora_alpha": -1.5}),
        (DORA, {"use_dora": True, "use_rslora": True}),
        (pair(V, r=16), {"r": 16, "target_modules": ".*_proj"}),
        (pair(Q, dtype=np.float64) | pair(V, dtype=np.float16), {"bias": "all"}),
    ],
)
def test_what_must_load_is_served(pool, tmp_path, entrance, tensors, config):
    real = {key: torch.randn(t.shape).numpy() for key, t in tensors.items()}
    real = {key: array.astype(tensors[key].dtype) for key, array in real.items()}
    folder = save(tmp_path / "new", real, **config)
    (folder / WEIGHTS).rename(folder / "blob")
    (folder / WEIGHTS).symlink_to("blob")
    name = offer(pool, entrance, folder)
    tensors = safetensors.load_file(folder / WEIGHTS)
    assert check_served(pool, name, tensors, FIELDS | config)


def test_numbers_at_odd_places_are_read(tmp_path):
    pool = pool_of(Tiny(7, 5))
    tensors = pair(Q, 3, 7, 5, np.uint16) | pair(V, 3, 7, 5, np.float64)
    bits = torch.randn(3, 7).bfloat16().view(torch.uint16).numpy()
    pool.load("new", save(tmp_path, tensors | {AQ: bits}, r=3))
    tensors = safetensors.load_file(tmp_path / WEIGHTS)
    assert check_served(pool, "new", tensors, FIELDS | {"r": 3}, k=7)


def test_tensors_are_copied_whatever_their_strides(pool):
    turned = torch.randn(8, 4, requires_grad=True)
    tensors = SOURCE | {AQ: turned.T, BV: torch.randn(6, 1).expand(6, 4)}
    before = {key: t.detach().clone() for key, t in tensors.items()}
    pool.load("new", tensors, FIELDS)
    turned.data.zero_()
    assert check_served(pool, "new", before, FIELDS)


def test_a_model_of_peft_gives_its_tensors_and_its_config(pool):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules={"q_proj"}, r=3, init_lora_weights=False)
    tensors = peft.get_peft_model_state_dict(peft.get_peft_model(Tiny(), config))
    pool.load("new", tensors, config)
    assert check_served(pool, "new", tensors, config.to_dict())
