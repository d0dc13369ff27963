"""Trainers with PeftopsCallback have the losses of stock PEFT, step by step, on fused layers."""

import pytest
import torch
from law import error
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")

from tiny import adapted

from peftops.integrations.peft import FUSED, mlp, report
from peftops.integrations.transformers import PeftopsCallback
from peftops.nn import LinearNF4

pytestmark = pytest.mark.usefixtures("one_thread")
SAME = 1e-5  # how far the losses of two trainings may be apart, in fp32
ROUNDED = 2**-7  # and in bf16
STEPS = 20
WORDS = [f"w{i}" for i in range(60)]
LORA = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": "all-linear",
    "init_lora_weights": False,
    "task_type": "CAUSAL_LM",
}


def base(packed=False):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **sizes,
            vocab_size=64,
            pad_token_id=0,
        )
    )
    if packed:
        for name, layer in [*model.model.named_modules()]:
            if isinstance(layer, nn.Linear):
                model.model.set_submodule(name, LinearNF4.from_linear(layer))
    return model


def text(seed, count=8):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(60, (count,), generator=generator))


def numbers():
    return datasets.Dataset.from_list(
        [
            {"input_ids": ids, "labels": ids}
            for ids in torch.arange(256).view(16, 16) % 64
        ]
    )


def arguments(folder, arguments_class=transformers.TrainingArguments, **more):
    common = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
    }
    quiet = {
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10,
    }
    return arguments_class(output_dir=str(folder), **common | quiet | more)


def train(make, callbacks):
    """The trainer that `make` made, after training, and the loss of every step."""
    losses = []
    trainer = make(callbacks)
    step = trainer.training_step

    def observed(*args, **kwargs):
        losses.append(step(*args, **kwargs))
        return losses[-1]

    trainer.training_step = observed
    torch.manual_seed(1)
    trainer.train()
    return trainer, torch.stack(losses)


def assert_same(make):
    """Every step's loss is stock's to 1e-5, and every call is fused."""
    _, stock = train(make, [])
    trainer, ours = train(make, [PeftopsCallback(strict=True)])
    assert len(ours) == len(stock) == STEPS
    assert stock.std() > 0
    assert error(ours, stock) <= SAME
    assert set(report(trainer.model).calls) - {"adapters disabled"} == {FUSED}
    return trainer


def test_trainer(tmp_path):
    rows = numbers()

    def make(callbacks):
        args = arguments(tmp_path, include_num_input_tokens_seen="all")
        return transformers.Trainer(
            adapted(base(), **LORA),
            args,
            train_dataset=rows,
            callbacks=callbacks,
        )

    lines = [line for line in assert_same(make).state.log_history if "loss" in line]
    assert [(line["lora_layers"], line["fused_layers"]) for line in lines] == [
        (14, 14)
    ] * 2
    assert all(
        line["tokens_per_second"] > 0 and line["peak_memory_gib"] > 0 for line in lines
    )


class Fusing(transformers.TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        mlp.fuse(model, strict=True)


def test_trainer_under_bf16_and_checkpointing(tmp_path):
    rows = numbers()

    def make(callbacks):
        args = arguments(
            tmp_path,
            bf16=True,
            gradient_checkpointing=True,
            max_steps=5,
        )
        return transformers.Trainer(
            adapted(base(), **LORA),
            args,
            train_dataset=rows,
            callbacks=callbacks,
        )

    _, stock = train(make, [])
    trainer, ours = train(make, [PeftopsCallback(), Fusing()])
    assert error(ours, stock) <= ROUNDED
    assert set(report(trainer.model).calls) == set(mlp.calls(trainer.model)) == {FUSED}


def test_a_model_without_lora_layers_is_refused(tmp_path):
    rows = datasets.Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}])
    trainer = transformers.Trainer(
        base(),
        arguments(tmp_path),
        train_dataset=rows,
        callbacks=[PeftopsCallback()],
    )
    with pytest.raises(ValueError, match="the model has no LoRA layers"):
        trainer.train()


def test_adapters_may_come_late(tmp_path):
    """Layers that exist when the trainer is made are patched then, others when it trains."""
    rows = datasets.Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}])
    early, late = adapted(base(), **LORA), base()
    of_early, of_late = (
        transformers.Trainer(
            model,
            arguments(tmp_path, max_steps=1),
            train_dataset=rows,
            callbacks=[PeftopsCallback()],
        )
        for model in (early, late)
    )
    assert report(early).fused == 14
    peft.inject_adapter_in_model(peft.LoraConfig(**LORA), late)
    for trainer in (of_early, of_late):
        trainer.log({"loss": 1.0})
        trainer.train()
        assert report(trainer.model).calls == {FUSED: 14}


@pytest.mark.parametrize("packed", [False, True], ids=["16 bits", "4 bits"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_sft(tmp_path, tokenizer, dora, packed):
    trl = pytest.importorskip("trl")
    rows = datasets.Dataset.from_list([{"text": text(i)} for i in range(16)])

    def make(callbacks):
        return trl.SFTTrainer(
            base(packed),
            arguments(tmp_path, trl.SFTConfig, bf16=False),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(**LORA, use_dora=dora),
            callbacks=callbacks,
        )

    assert_same(make)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_sft_casts_adapters_over_4_bits(tmp_path, tokenizer, dora):
    """TRL makes adapters over 4 bits bf16, so losses agree only to the rounding of bf16."""
    trl = pytest.importorskip("trl")
    rows = datasets.Dataset.from_list([{"text": text(i)} for i in range(16)])

    def make(callbacks):
        model = base(packed=True)
        model.is_loaded_in_4bit = True
        return trl.SFTTrainer(
            model,
            arguments(
                tmp_path,
                trl.SFTConfig,
                bf16=True,
                max_steps=6,
            ),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(**LORA, use_dora=dora),
            callbacks=callbacks,
        )

    _, stock = train(make, [])
    trainer, ours = train(make, [PeftopsCallback(strict=True)])
    assert error(ours, stock) <= ROUNDED
    adapter = next(
        p for name, p in trainer.model.named_parameters() if "lora_A" in name
    )
    assert adapter.dtype is torch.bfloat16
    assert set(report(trainer.model).calls) == {FUSED}


def test_dpo(tmp_path, tokenizer):
    """The reference is the same model with its adapters disabled."""
    trl = pytest.importorskip("trl")
    rows = [
        {
            "prompt": text(i),
            "chosen": text(i + 99),
            "rejected": text(i + 999),
        }
        for i in range(16)
    ]

    def make(callbacks):
        return trl.DPOTrainer(
            base(),
            args=arguments(tmp_path, trl.DPOConfig, bf16=False),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(**LORA),
            callbacks=callbacks,
        )

    assert report(assert_same(make).model).calls["adapters disabled"] > 0


def test_grpo(tmp_path, tokenizer):
    trl = pytest.importorskip("trl")
    rows = datasets.Dataset.from_list([{"prompt": text(i)} for i in range(16)])
    options = {
        "num_generations": 2,
        "max_completion_length": 4,
        "beta": 0.1,
        "bf16": False,
    }

    def make(callbacks):
        return trl.GRPOTrainer(
            base(),
            args=arguments(tmp_path, trl.GRPOConfig, **options),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(**LORA),
            callbacks=callbacks,
            reward_funcs=lambda completions, **_: [
                float(len(set(c))) for c in completions
            ],
        )

    assert_same(make)
