"""DoRA in a plain training loop, then generation and merging."""

import torch
from peft import LoraConfig, get_peft_model
from tiny import model, rows, tokenizer

import peftops

config = LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules="all-linear")
adapted = peftops.patch(get_peft_model(model(), config))
trained = [p for p in adapted.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2)

for step in range(20):
    losses = [
        adapted(**{key: torch.tensor([ids]) for key, ids in row.items()}).loss
        for row in rows()
    ]
    loss = torch.stack(losses).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

encode = tokenizer()
prompt = encode("the adapter", return_tensors="pt")["input_ids"]
tokens = adapted.eval().generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
print(encode.decode(tokens[0]))
print(peftops.report(adapted))
merged = adapted.merge_and_unload()  # a plain transformers model
