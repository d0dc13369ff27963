"""Patched models on two ranks: the loss and the gradients of one process, for every launcher's way to share work."""

import copy
from types import SimpleNamespace

import pytest
import ranks
import torch
import torch.distributed as dist
from law import bound, error

pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from tiny import TOKENS, exactly, install_our_mask, tiny

import peftops
from peftops.integrations.peft import FUSED, lora_layers
from peftops.nn import LinearNF4

KINDS = "lora", "qlora", "dora", "qdora"


def made(kind, checkpointing=False, **config):
    model = tiny(use_dora="dora" in kind, **{"lora_dropout": 0.3} | config)
    for layer in lora_layers(model).values():
        if kind[0] == "q":
            layer.base_layer = LinearNF4.from_linear(layer.base_layer)
        if "dora" in kind:
            layer.lora_magnitude_vector["default"].weight.data.abs_().add_(0.5)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def trained(model, rank, backward=torch.Tensor.backward):
    """The loss of this rank's half of the batch, after backward."""
    torch.manual_seed(1 + rank)
    half = TOKENS[rank : rank + 1]
    loss = model(input_ids=half, labels=half).loss
    backward(loss)
    return loss.detach()


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def grads(model):
    return [whole(p.grad).clone() for p in model.parameters() if p.requires_grad]


def alone(model):
    """What one process makes of both halves: the losses, and the mean of the gradients."""
    model.zero_grad()
    losses = [trained(model, rank) for rank in (0, 1)]
    return losses, [g / 2 for g in grads(model)]


def assert_law(stock, model, rank, **options):
    """The model, on two ranks, is as close to the truth as stock PEFT on one."""
    (losses, truth), (same_losses, same) = alone(exactly(stock)), alone(stock)
    loss = trained(model, rank, **options)
    assert error(loss, losses[rank]) <= bound(same_losses[rank], losses[rank])
    assert error(grads(model), truth) <= bound(same, truth)


def assert_fused(model, checkpointing):
    count = len(lora_layers(model))
    found = peftops.report(model)
    assert (found.fused, found.calls) == (count, {FUSED: count * (1 + checkpointing)}), found


def ddp(rank):
    install_our_mask(pytest.MonkeyPatch())
    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.distributed_type == "MULTI_CPU" and accelerator.num_processes == 2
    for kind in KINDS:
        for checkpointing in (False, True):
            stock = made(kind, checkpointing)
            for before in (True, False):
                model = copy.deepcopy(stock)
                if before:
                    peftops.patch(model, strict=True)
                wrapped = accelerator.prepare_model(model)
                assert type(wrapped) is torch.nn.parallel.DistributedDataParallel
                if not before:
                    peftops.patch(wrapped, strict=True)
                assert_law(stock, wrapped, rank, backward=accelerator.backward)
                assert_fused(model, checkpointing)


def sharded(model, **options):
    """As accelerate does it under FSDP2, whose own state on a CPU knows no FSDP."""
    options = {"auto_wrap_policy": "transformer_based_wrap", "cpu_ram_efficient_loading": False} | options
    plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, **options)
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(
        state=state, mixed_precision="no", device=torch.device("cpu"), is_main_process=dist.get_rank() == 0
    )
    return fsdp2_prepare_model(accelerator, model)


def fsdp2(rank):
    install_our_mask(pytest.MonkeyPatch())
    for kind in KINDS:
        for checkpointing in (False, True):
            stock = made(kind, checkpointing)
            for before in (True, False):
                model = copy.deepcopy(stock)
                if before:
                    peftops.patch(model, strict=True)
                model = sharded(model)
                if not before:
                    peftops.patch(model, strict=True)
                assert all(hasattr(p, "to_local") for p in model.parameters())
                assert_law(stock, model, rank)
                assert_fused(model, checkpointing)


def test_fsdp2(tmp_path):
    assert ranks.run("from test_distributed import fsdp2 as work\n", tmp_path) == ""


def test_ddp(tmp_path):
    assert ranks.run("from test_distributed import ddp as work\n", tmp_path) == ""
