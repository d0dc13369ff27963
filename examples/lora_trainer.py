"""LoRA with transformers' Trainer: one callback, and the log says what ran fused."""

import sys

from peft import LoraConfig, get_peft_model
from tiny import model, rows, tokenizer
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import peftops
from peftops.integrations.transformers import PeftopsCallback

out = sys.argv[1] if len(sys.argv) > 1 else "out"
config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear")
adapted = get_peft_model(model(), config)
args = TrainingArguments(
    out,
    max_steps=20,
    learning_rate=1e-2,
    logging_steps=5,
    report_to="none",
    save_strategy="no",
)
trainer = Trainer(
    adapted,
    args,
    train_dataset=rows(),
    data_collator=DataCollatorForSeq2Seq(tokenizer()),
    callbacks=[PeftopsCallback()],
)
trainer.train()
trainer.save_model(out)  # PEFT's files, as stock PEFT writes them
print(peftops.report(adapted))
