"""A server's day in small: adapters come, are replaced, and leave while the model answers.

Two threads serve requests, each a batch that mixes adapters, while a third one brings new versions
of one of them. Nobody waits, and every batch is answered by the versions that it began with.
"""

import sys
import threading
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from tiny import model, rows

import peftops

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "adapters")
RANKS = {"anna": 4, "ben": 8, "cleo": 16}


def train():
    """Saves three adapters as PEFT does; here they are random."""
    adapters = None
    for name, rank in RANKS.items():
        config = LoraConfig(
            r=rank, target_modules="all-linear", init_lora_weights=False
        )
        if adapters is None:
            adapters = get_peft_model(model(), config, name)
        else:
            adapters.add_adapter(name, config)
    adapters.save_pretrained(folder)
    return get_peft_model_state_dict(adapters, adapter_name="ben")


def serve(base, names, answers):
    prompt = torch.tensor([rows()[0]["input_ids"][:4]] * len(names))
    for _ in range(5):
        tokens = base.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            adapter_names=names,
            max_new_tokens=6,
            do_sample=False,
        )
        answers.append(tokens.shape[0])


tensors = train()
base = model().eval()
pool = peftops.AdapterPool(base, memory="16MiB", max_rank=16)
for name in RANKS:
    pool.register(name, folder / name)
answers = []
servers = [
    threading.Thread(target=serve, args=(base, names, answers))
    for names in (["anna", "__base__", "ben"], ["cleo", "ben", "ben", "anna"])
]
for thread in servers:
    thread.start()
pool.pin("ben")
for _ in range(5):
    pool.replace("ben", {key: 0.9 * t for key, t in tensors.items()})
for thread in servers:
    thread.join()
print(f"{sum(answers)} requests answered")
print(pool.stats())
