"""sac_policy: what selective activation checkpointing should keep of a block of our layers."""

import torch
from torch.utils.checkpoint import CheckpointPolicy


def sac_policy(*more):
    """A policy that keeps what our products and norms return, so that backward runs none of them again.

    All else in the block is made again: activations, attention, dropout's masks. It costs the memory of one output a
    layer, and saves the time of its product. more: other ops to keep, as torch.ops.aten.mm.default.

        context = partial(create_selective_checkpoint_contexts, peftops.sac_policy())
        y = checkpoint(block, x, use_reentrant=False, context_fn=context)

    with both from torch.utils.checkpoint; in transformers, model.gradient_checkpointing_enable(
    {"use_reentrant": False, "context_fn": context}).
    """
    ops = torch.ops.peftops
    kept = {ops.lora_fwd.default, ops.lora_gemv.default, ops.dora_norm.default, *more}

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
