"""QLoRA with TRL's SFTTrainer: the base is quantized as it loads, without bitsandbytes."""

import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import TEXT, model, tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import peftops
from peftops.integrations.transformers import PeftopsCallback, enable

out = sys.argv[1] if len(sys.argv) > 1 else "out"
# In real life, a checkpoint is there already.
model().to(torch.bfloat16).save_pretrained(f"{out}/base")
settings = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
)
with enable():
    base = AutoModelForCausalLM.from_pretrained(
        f"{out}/base", quantization_config=settings
    )
args = SFTConfig(
    out,
    max_steps=20,
    learning_rate=1e-2,
    report_to="none",
    save_strategy="no",
    use_cpu=not torch.cuda.is_available(),
)
trainer = SFTTrainer(
    base,
    args,
    train_dataset=Dataset.from_list([{"text": line} for line in TEXT.splitlines()]),
    processing_class=tokenizer(),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    callbacks=[PeftopsCallback()],
)
trainer.train()
print(peftops.report(trainer.model))
