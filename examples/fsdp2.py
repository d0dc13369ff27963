"""LoRA under FSDP2 on two CPU ranks: torchrun --nproc-per-node 2 examples/fsdp2.py

On GPUs, use the backend nccl, one device a rank, and leave the rest as it is.
"""

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny import model, rows
from torch.distributed.fsdp import fully_shard

import peftops

dist.init_process_group("gloo")
config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
adapted = peftops.patch(get_peft_model(model(), config))
for block in adapted.base_model.model.model.layers:
    fully_shard(block)  # one group per block: a layer's forward sees whole tensors
fully_shard(adapted)

optimizer = torch.optim.AdamW(
    [p for p in adapted.parameters() if p.requires_grad], lr=1e-2
)
mine = rows()[dist.get_rank() :: dist.get_world_size()]
for step in range(10):
    row = mine[step % len(mine)]
    loss = adapted(**{key: torch.tensor([ids]) for key, ids in row.items()}).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
if dist.get_rank() == 0:
    print(f"loss {loss.item():.3f}")
    print(peftops.report(adapted))
dist.destroy_process_group()
