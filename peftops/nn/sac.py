"""sac_policy: what selective activation checkpointing should keep of a block of our layers."""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import CheckpointPolicy


def sac_policy(*more: torch._ops.OpOverload) -> Callable[..., CheckpointPolicy]:
    """A policy that keeps what our products and norms return, so that backward does not rerun them.

    Everything else in the block is computed again: activations, attention, dropout's masks. It
    costs the memory of one output a layer, and saves the time of its product.

        context = partial(create_selective_checkpoint_contexts, peftops.sac_policy())
        y = checkpoint(block, x, use_reentrant=False, context_fn=context)

    Both functions come from torch.utils.checkpoint. In transformers, call
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": context}).

    Args:
        more: other ops to keep, such as torch.ops.aten.mm.default.

    Returns:
        A policy_fn for create_selective_checkpoint_contexts.
    """
    ops = torch.ops.peftops
    kept = {
        ops.lora_fwd.default,
        ops.lora_gemv.default,
        ops.multi_fwd.default,
        ops.multi_gemv.default,
        ops.dora_norm.default,
        *more,
    }

    def policy(ctx, op, *args, **kwargs):
        return (
            CheckpointPolicy.MUST_SAVE
            if op in kept
            else CheckpointPolicy.PREFER_RECOMPUTE
        )

    return policy
