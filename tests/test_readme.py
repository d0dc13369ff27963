"""Runs the Python blocks of README and docs, with small objects for the names that they use."""

import re
from functools import partial

import pytest
import torch
from torch import nn
from tree import ROOT

import peftops

datasets, peft, transformers, trl = map(
    pytest.importorskip, ("datasets", "peft", "transformers", "trl")
)

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (page.name, block)
    for page in PAGES
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)
]
WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture
def names(tmp_path, monkeypatch, tokenizer):
    """The names that blocks use: imports, a model and its folder, data, a layer, tensors."""
    monkeypatch.chdir(tmp_path)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, vocab_size=64, pad_token_id=0)
    )
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    config = peft.LoraConfig(target_modules="all-linear")
    adapters = peft.get_peft_model(model, config, "anna")
    adapters.add_adapter("ben", config)
    adapters.save_pretrained("adapters")
    text = " ".join(WORDS[:12])
    data = {
        "rows": [{"input_ids": list(range(12)), "labels": list(range(12))}],
        "texts": [{"text": text}],
        "pairs": [{"prompt": text, "chosen": WORDS[0], "rejected": WORDS[1]}],
    }
    tensors = {
        "x": torch.randn(5, 32, requires_grad=True),
        "weight": torch.randn(48, 32),
        "bias": torch.randn(48),
        "lora_A": torch.randn(4, 32, requires_grad=True),
        "lora_B": torch.randn(48, 4, requires_grad=True),
        "magnitude": torch.rand(48),
        "linear": nn.Linear(32, 48),
    }
    imports = [
        transformers.Trainer,
        transformers.AutoModelForCausalLM,
        transformers.BitsAndBytesConfig,
        peft.LoraConfig,
        peft.get_peft_model,
        peft.prepare_model_for_kbit_training,
        trl.SFTTrainer,
        trl.DPOTrainer,
    ]
    names = {"peftops": peftops, "F": peftops.functional, "name": "model"} | tensors
    names |= {imported.__name__: imported for imported in imports}
    for config in (transformers.TrainingArguments, trl.SFTConfig, trl.DPOConfig):
        names[config.__name__] = partial(config, use_cpu=True)
    for name, lines in data.items():
        names[name] = datasets.Dataset.from_list(lines * 8)
    return names


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "page, block", BLOCKS, ids=lambda text: text.strip().splitlines()[-1][:40]
)
def test_block(page, block, names, ops):
    model = transformers.AutoModelForCausalLM.from_pretrained("model")
    if re.search(
        r"\bTrainer\(\s*model", block
    ):  # unlike TRL's, it adapts no model itself
        model = names["get_peft_model"](
            model, names["LoraConfig"](target_modules="all-linear")
        )
    exec(block, names | {"model": model})
    assert ops, page
    assert {"lora_bwd", "multi_bwd"} & set(ops) or ".train()" not in block


def test_there_are_blocks_of_everything():
    readme = "\n".join(block for _, block in BLOCKS)
    for code in (
        "peftops.patch(",
        "Trainer(",
        "SFTTrainer(",
        "DPOTrainer(",
        "F.lora_linear(",
        "use_dora=True",
        "transformers.enable()",
        "peftops.AdapterPool(",
    ):
        assert code in readme
