"""peftops check beside PEFT: what PEFT saves passes, and what PEFT does not load whole is bad."""

import json
import random

import pytest

from peftops import adapter_file
from peftops.adapter_file import names
from peftops.cli import check

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 8, 16))
        self.down_proj = torch.nn.Parameter(torch.randn(3, 16, 8))


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(8, 8)
        self.v_proj = torch.nn.Linear(8, 6)
        self.conv = torch.nn.Conv1d(4, 6, 3)
        self.mixer = torch.nn.MultiheadAttention(8, 2)
        self.experts = Experts()


class Body(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(9, 8)
        self.layers = torch.nn.ModuleList([Block(), Block(), Block()])


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Body()
        self.lm_head = torch.nn.Linear(8, 9, bias=False)
        self.score = torch.nn.Linear(8, 2)

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head


def save(folder, config):
    """Saves an adapter of Model by PEFT, with random numbers that are not zero."""
    model = peft.get_peft_model(Model(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.uniform_(1, 2)
    model.save_pretrained(folder)


def verdicts(folder, capsys):
    """(exit code, rows of the table) of `peftops check --for peft`."""
    code = check.main([str(folder), "--for", "peft"])
    rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()[1:]]
    assert code == any(verdict in check.BAD for _, verdict, *_ in rows)
    return code, rows


QV = ["q_proj", "v_proj"]
CONFIGS = {
    "a list": {"target_modules": QV},
    "a full name": {"target_modules": ["model.layers.1.q_proj"]},
    "a regex": {"target_modules": r".*layers\.[02]\.(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "excluded": {
        "target_modules": QV,
        "exclude_modules": ["model.layers.1.v_proj", "0.q_proj"],
    },
    "excluded by a regex": {"target_modules": QV, "exclude_modules": r".*\.1\..*"},
    "some layers": {
        "target_modules": QV,
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
    },
    "one layer": {"target_modules": QV, "layers_to_transform": 1},
    "ranks": {
        "target_modules": QV,
        "rank_pattern": {
            "v_proj": 2,
            r"layers\.[01]\.q_proj": 3,
            "^model.layers.2.q_proj": 5,
        },
    },
    "alphas": {"target_modules": QV, "alpha_pattern": {"v_proj": 2.5}},
    "DoRA": {"target_modules": [*QV, "conv", "embed_tokens"], "use_dora": True},
    "biases of B": {"target_modules": [*QV, "conv"], "lora_bias": True},
    "biases of the adapted": {"target_modules": QV, "bias": "lora_only"},
    "all biases": {"target_modules": QV, "bias": "all"},
    "an embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "a head": {"target_modules": ["lm_head", "q_proj"]},
    "a convolution": {"target_modules": ["conv"]},
    "attention": {"target_modules": ["mixer"]},
    "a whole module": {"target_modules": QV, "modules_to_save": ["lm_head"]},
    "a whole module by the end of its name": {
        "target_modules": QV,
        "modules_to_save": ["head"],
    },
    "whole blocks": {"target_modules": QV, "modules_to_save": ["layers.1"]},
    "tokens": {"target_modules": QV, "trainable_token_indices": [1, 2]},
    "tokens of two": {
        "target_modules": QV,
        "trainable_token_indices": {"embed_tokens": [1, 2], "score": [0]},
    },
    "experts": {
        "target_modules": [],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
    "experts by short names": {
        "target_modules": ["q_proj"],
        "target_parameters": ["down_proj"],
    },
    "a weight as a parameter": {
        "target_modules": [],
        "target_parameters": ["q_proj.weight"],
    },
    "rsLoRA": {"target_modules": QV, "use_rslora": True},
    "gaussian": {"target_modules": QV, "init_lora_weights": "gaussian"},
    "KaSA": {"target_modules": QV, "kasa_config": {}},
    "MonteCLoRA": {"target_modules": QV, "monteclora_config": {}},
    "VeLoRA": {"target_modules": QV, "velora_config": {}},
    "a classifier": {
        "target_modules": QV,
        "modules_to_save": ["classifier", "score"],
        "task_type": "SEQ_CLS",
    },
    "BD-LoRA": {
        "target_modules": QV,
        "use_bdlora": {"target_modules_bd_a": QV, "nblocks": 2},
    },
}


def rewrite(
    folder,
    config=None,
    key=lambda key: key,
    drop=lambda key: False,
    value=lambda key, tensor: tensor,
):
    """Changes a saved adapter.

    Args:
        config: fields of adapter_config.json to set.
        key: gives the new key of a tensor.
        drop: says by the old key whether a tensor is left out.
        value: gives the new tensor by the old key and the old tensor.
    """
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    path = folder / "adapter_model.safetensors"
    tensors = {}
    for name, tensor in safetensors.load_file(path).items():
        if not drop(name):
            tensors[key(name)] = value(name, tensor)
    safetensors.save_file(tensors, path)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_saves_passes(tmp_path, capsys, name):
    config = dict(CONFIGS[name])
    task = config.pop("task_type", None)
    save(tmp_path, peft.LoraConfig(r=4, **config))
    if task:
        rewrite(tmp_path, config={"task_type": task})
    assert verdicts(tmp_path, capsys) == (0, [["peft", "ok"]])


METHODS = {
    "LoHa": {},
    "LoKr": {},
    "IA3": {"feedforward_modules": []},
    "AdaLora": {"total_step": 10},
    "OFT": {"oft_block_size": 4, "r": 0},
    "Vera": {},
    "LNTuning": {},
    "FourierFT": {"n_frequency": 8},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_what_peft_saves_by_other_methods_passes(tmp_path, capsys, method):
    config_class = getattr(peft, f"{method}Config")
    config = config_class(
        target_modules=["q_proj"], modules_to_save=["lm_head"], **METHODS[method]
    )
    save(tmp_path, config)
    assert verdicts(tmp_path, capsys) == (0, [["peft", "ok"]])


def renamed(old, new):
    return {"key": lambda key: key.replace(old, new)}


def front(name):
    return {"key": lambda key: name + key}


FRONT = "base_model.model."
SPOILED = {
    "nothing": {},
    "torch.compile": front("_orig_mod."),
    "torch.compile inside": renamed(FRONT, FRONT + "_orig_mod."),
    "torch.compile of blocks": renamed(".q_proj", "._orig_mod.q_proj"),
    "DDP": front("module."),
    "DDP inside": renamed(FRONT, FRONT + "module."),
    "DDP of a compiled": front("module._orig_mod."),
    "checkpoint_wrapper": renamed("layers.1.", "layers.1._checkpoint_wrapped_module."),
    "FSDP": renamed(FRONT, FRONT + "_fsdp_wrapped_module."),
    "no front": renamed(FRONT, ""),
    "half a front": renamed(FRONT + "model.", "base_model."),
    "another front": renamed(FRONT, "model."),
    "two fronts": front(FRONT),
    "the name default": renamed(".weight", ".default.weight"),
    "another name": renamed(".weight", ".mine.weight"),
    "no .weight": renamed(".weight", ""),
    "an embedding's A": renamed("lora_A.weight", "lora_embedding_A"),
    "another part": renamed("lora_B", "lora_C"),
    "another layer": renamed("v_proj", "u_proj"),
    "A alone": {"drop": lambda key: "1.v_proj.lora_B" in key},
    "B alone": {"drop": lambda key: "lora_A" in key},
    "other targets": {"config": {"target_modules": ["q_proj"]}},
    "a regex that matches": {"config": {"target_modules": r".*\.(q|v)_proj"}},
    "a regex that does not": {"config": {"target_modules": r"layers.*\.(q|v)_proj"}},
    "a regex of the end": {"config": {"target_modules": "v_proj"}},
    "all-linear": {"config": {"target_modules": "all-linear"}},
    "fewer layers": {"config": {"layers_to_transform": [0, 1]}},
    "all layers": {
        "config": {"layers_to_transform": [0, 1, 2], "layers_pattern": ["layers"]}
    },
    "no such pattern": {
        "config": {"layers_to_transform": [0, 1, 2], "layers_pattern": ["blocks"]}
    },
    "excluded": {"config": {"exclude_modules": ["q_proj"]}},
    "excludes nothing": {"config": {"exclude_modules": "q_proj"}},
    "saved": {"config": {"modules_to_save": ["layers"]}},
    "a pattern too many": {"config": {"rank_pattern": {"1.v_proj": 2}}},
    "a pattern of nothing": {"config": {"rank_pattern": {"u_proj": 2}}},
    "rank": {"config": {"r": 8}},
    "use_dora": {"config": {"use_dora": True}},
    "lora_bias": {"config": {"lora_bias": True}},
    "tokens": {"config": {"trainable_token_indices": [1]}},
    "head": {"config": {"modules_to_save": ["lm_head"]}},
    "another method": {"config": {"peft_type": "LOHA"}},
    "no method": {"config": {"peft_type": "NEW"}},
}


def loads(folder, wanted):
    """Whether PEFT loads exactly the numbers that are wanted in the modules of the adapter."""
    try:
        loaded = peft.PeftModel.from_pretrained(Model(), folder)
    except (ValueError, TypeError, KeyError, RuntimeError):
        return False
    held = peft.get_peft_model_state_dict(loaded)
    modules = tuple(key.partition("lora_")[0] for key in wanted)
    if any(key.startswith(modules) for key in held.keys() - wanted.keys()):
        return False
    if wanted.keys() - held.keys():
        return False
    return all(torch.equal(held[key], wanted[key]) for key in wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spoiled", SPOILED)
def test_what_peft_does_not_load_whole_is_bad(tmp_path, capsys, spoiled):
    save(tmp_path, peft.LoraConfig(r=4, target_modules=QV))
    wanted = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    rewrite(tmp_path, **SPOILED[spoiled])
    code, rows = verdicts(tmp_path, capsys)
    assert loads(tmp_path, wanted) == (code == 0), rows


PIECES = ["model", "layers", "0", "1", "12", "q_proj", "proj", "attn", "head", "h"]
PATTERNS = [
    *PIECES,
    "layers.1",
    "attn.q_proj",
    r".*\.q_proj",
    r"(q|h)_?(proj)?",
    "h.*",
    r"^model\.layers",
    "a|h",
    ".",
    "",
]


def some_name(random):
    return ".".join(random.choices(PIECES, k=random.randint(1, 6)))


def some_config(random):
    """The fields that say which modules are adapted, as PEFT's class takes them."""
    names = random.choices(PATTERNS, k=random.randint(0, 3))
    targets = [names, random.choice(PATTERNS), [some_name(random), *names]]
    config = {"target_modules": random.choice(targets)}
    config["exclude_modules"] = random.choice(
        [None, None, [random.choice(PATTERNS)], random.choice(PATTERNS)]
    )
    config["modules_to_save"] = random.choice([[], [], [random.choice(PATTERNS[:-1])]])
    config["layers_to_transform"] = None
    config["layers_pattern"] = None
    if isinstance(config["target_modules"], list):
        config["layers_to_transform"] = random.choice([None, 1, [0, 12], []])
    if config["layers_to_transform"] is not None:
        config["layers_pattern"] = random.choice(
            [None, [], "layers", ["h", "layers"], ["layers|h", ".*"]]
        )
    config["rank_pattern"] = {
        pattern: 2 for pattern in random.sample(PATTERNS, random.randint(0, 4))
    }
    return config


def test_names_match_as_in_peft():
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    draw = random.Random(0)
    seen = set()
    for _ in range(2000):
        config = some_config(draw)
        modules = [some_name(draw) for _ in range(4)]
        question = config | {
            "alpha_pattern": [],
            "target_parameters": [],
            "keys": [],
            "modules": modules,
        }
        patterns = list(config["rank_pattern"])
        answer = names.answer(question | {"rank_pattern": patterns})
        lora_config = peft.LoraConfig(**config)
        answers = zip(modules, answer["targets"], answer["ranks"], strict=True)
        for module, target, rank in answers:
            match = check_target_module_exists(lora_config, module)
            excluded = type(match).__name__ == "_ExcludedModule"
            case = config, module
            assert (bool(match) and not excluded) == (target == "module"), case
            assert excluded == (target in ("exclude_modules", "modules_to_save")), case
            pattern = module if rank is None else patterns[rank]
            assert get_pattern_key(config["rank_pattern"], module) == pattern
            seen.add(target)
    assert seen == {
        "module",
        "target_modules",
        "layers_to_transform",
        "exclude_modules",
        "modules_to_save",
    }


def test_many_names_are_matched_by_the_script_with_the_same_result():
    question = dict.fromkeys(adapter_file.FIELDS) | {
        "modules_to_save": ["head"],
        "target_parameters": [],
        "keys": ["head.w"],
        "target_modules": ["b"],
        "rank_pattern": ["c"],
        "alpha_pattern": [],
        "modules": ["a.b", "a.c", "b.d"],
    }
    here = names.match(question)
    assert here == names.match(question | {"rank_pattern": ["[c]"]})
    assert here["targets"] == ["module", "target_modules", "target_modules"]
    assert here["ranks"] == [None, 0, None]
