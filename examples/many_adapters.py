"""Three adapters trained together on one base: each batch mixes their samples.

A batch names the adapter of each sample. Each adapter gets the gradients that it would get alone,
so that its own group of the optimizer steps and decays it. An adapter without a sample in the batch
has no gradient and stays as it is. At the end, each continues the same prompt in one batch.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from tiny import model, rows, tokenizer
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import peftops
from peftops.integrations.transformers import PeftopsCallback

RANKS = {"anna": 4, "ben": 8, "cleo": 16}
pad = DataCollatorForSeq2Seq(tokenizer())


def collate(samples):
    """A padded batch, and the adapter of each sample."""
    names = [sample["adapter"] for sample in samples]
    samples = [{k: v for k, v in s.items() if k != "adapter"} for s in samples]
    return pad(samples) | {"adapter_names": names}


class ManyAdapters(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **others):
        """The sum of each adapter's mean loss.

        One mean over the batch would scale an adapter's gradient by its share of the tokens.
        """
        labels = inputs.pop("labels")
        names = inputs["adapter_names"]
        outputs = model(**inputs)
        loss = 0
        for name in set(names):
            own = torch.tensor([other == name for other in names])
            logits = outputs.logits[own, :-1].flatten(0, 1)
            loss = loss + cross_entropy(logits, labels[own, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


out = sys.argv[1] if len(sys.argv) > 1 else "out"
first, *others = RANKS
adapted = get_peft_model(
    model(), LoraConfig(r=RANKS[first], target_modules="all-linear"), first
)
for name in others:
    adapted.add_adapter(name, LoraConfig(r=RANKS[name], target_modules="all-linear"))
adapted.set_requires_grad([*RANKS])  # all of them train
optimizer = torch.optim.AdamW(
    [
        {"params": [p for n, p in adapted.named_parameters() if f".{name}." in n]}
        for name in RANKS
    ],
    lr=1e-2,
)
args = TrainingArguments(
    out,
    max_steps=20,
    logging_steps=5,
    max_grad_norm=0,  # one norm over all adapters would let one slow down the others
    remove_unused_columns=False,  # adapter_names is no argument of the base model
    report_to="none",
    save_strategy="no",
)
trainer = ManyAdapters(
    adapted,
    args,
    train_dataset=[row | {"adapter": name} for name in RANKS for row in rows()],
    data_collator=collate,
    callbacks=[PeftopsCallback()],
    optimizers=(optimizer, None),
)
trainer.train()
adapted.save_pretrained(out)  # a folder for each adapter
prompts = torch.tensor([rows()[0]["input_ids"][:4]] * 4)
tokens = adapted.eval().generate(
    input_ids=prompts, adapter_names=["__base__", *RANKS], max_new_tokens=6
)
for name, continued in zip(["__base__", *RANKS], tokens, strict=True):
    print(name, tokenizer().decode(continued))
print(peftops.report(adapted))
