"""README's Python, run as it stands, on small things of the names that it takes for granted."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import peftops

datasets, peft, transformers, trl = map(
    pytest.importorskip, ("datasets", "peft", "transformers", "trl")
)

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S)
WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture
def names(tmp_path, monkeypatch, tokenizer):
    """What blocks take for granted: imports, a model and its folder, data, a layer, tensors."""
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
    for part in (model, tokenizer):
        part.save_pretrained("model")
    text = " ".join(WORDS[:12])
    data = {
        "rows": [{"input_ids": list(range(12)), "labels": list(range(12))}],
        "texts": [{"text": text}],
        "pairs": [{"prompt": text, "chosen": WORDS[0], "rejected": WORDS[1]}],
    }
    tensors = {
        "x": torch.randn(5, 32, requires_grad=True), "weight": torch.randn(48, 32), "bias": torch.randn(48),
        "lora_A": torch.randn(4, 32, requires_grad=True), "lora_B": torch.randn(48, 4, requires_grad=True),
        "magnitude": torch.rand(48), "linear": nn.Linear(32, 48),
    }  # fmt: skip
    of_transformers = (
        transformers.Trainer,
        transformers.AutoModelForCausalLM,
        transformers.BitsAndBytesConfig,
    )
    of_peft = peft.LoraConfig, peft.get_peft_model, peft.prepare_model_for_kbit_training
    configs = {
        kind.__name__: partial(kind, use_cpu=True)
        for kind in (transformers.TrainingArguments, trl.SFTConfig, trl.DPOConfig)
    }
    classes = {
        kind.__name__: kind
        for kind in (*of_transformers, *of_peft, trl.SFTTrainer, trl.DPOTrainer)
    }
    sets = {name: datasets.Dataset.from_list(lines * 8) for name, lines in data.items()}
    return (
        {"peftops": peftops, "F": peftops.functional, "name": "model"}
        | classes
        | configs
        | sets
        | tensors
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_block(block, names, ops):
    model = transformers.AutoModelForCausalLM.from_pretrained("model")
    if re.search(r"\bTrainer\(model", block):  # which adapts none itself
        model = names["get_peft_model"](model, names["LoraConfig"](target_modules="all-linear"))
    exec(block, names | {"model": model})
    assert "lora_bwd" in ops if ".train()" in block else ops


def test_there_are_blocks_of_everything():
    whole = "\n".join(BLOCKS)
    for word in (
        "peftops.patch(",
        "Trainer(",
        "SFTTrainer(",
        "DPOTrainer(",
        "F.lora_linear(",
        "use_dora=True",
        "transformers.enable()",
    ):
        assert word in whole
