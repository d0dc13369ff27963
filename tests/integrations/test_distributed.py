"""Patched models on two ranks: the loss and the gradients of one process, for every launcher's way to share work."""

import copy
import os
import signal
import sys

import pytest
import ranks
import torch
from law import bound, error

pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from peft import get_peft_model_state_dict
from tiny import TOKENS, exactly, install_our_mask, tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import peftops
from peftops.integrations.peft import FUSED, OWN, lora_layers
from peftops.nn import LinearNF4

KINDS = "lora", "qlora", "dora", "qdora"


def on_two_ranks(work, folder, *args):
    name = work.__name__
    return ranks.run(f"def work(rank):\n    import {__name__}\n    {__name__}.{name}(rank)\n", folder, *args)


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


def assert_law(stock, model, rank, alone=alone, **options):
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


def test_ddp(tmp_path):
    assert on_two_ranks(ddp, tmp_path) == ""


def fsdp2_accelerator(**options):
    """As under `accelerate launch`; on a CPU its state would know no FSDP, though its code works there."""
    options = {"auto_wrap_policy": "transformer_based_wrap", "cpu_ram_efficient_loading": False} | options
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, **options)
    for state in (accelerate.PartialState(), accelerator.state):
        state.distributed_type = accelerate.DistributedType.FSDP
    return accelerator


def optimizer_of(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9)


def sharded(model, accelerator):
    """The model and its optimizer, prepared."""
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    assert all(hasattr(p, "to_local") for p in model.parameters())
    return model, optimizer


def fsdp2(rank):
    install_our_mask(pytest.MonkeyPatch())
    accelerator = fsdp2_accelerator()
    for kind in KINDS:
        for checkpointing in (False, True):
            stock = made(kind, checkpointing)
            for before in (True, False):
                model = copy.deepcopy(stock)
                if before:
                    peftops.patch(model, strict=True)
                model, _ = sharded(model, accelerator)
                if not before:
                    peftops.patch(model, strict=True)
                assert_law(stock, model, rank)
                assert_fused(model, checkpointing)


def test_fsdp2(tmp_path):
    assert on_two_ranks(fsdp2, tmp_path) == ""


def mixed(rank):
    """A policy of bf16 casts what it gathers, magnitudes too: as close to the truth as stock PEFT under the same."""
    install_our_mask(pytest.MonkeyPatch())
    accelerator = fsdp2_accelerator(mixed_precision_policy="bf16")
    for kind in KINDS:
        stock = made(kind)
        losses, truth = alone(exactly(stock))
        theirs, _ = sharded(copy.deepcopy(stock), accelerator)
        ours, _ = sharded(peftops.patch(stock, strict=True), accelerator)
        same, loss = trained(theirs, rank), trained(ours, rank)
        assert error(loss, losses[rank]) <= bound(same, losses[rank]), kind
        assert error(grads(ours), truth) <= bound(grads(theirs), truth), kind
        assert_fused(ours, False)


def test_fsdp2_in_bf16(tmp_path):
    assert on_two_ranks(mixed, tmp_path) == ""


def alone_on_both(model):
    for p, g in zip([p for p in model.parameters() if p.requires_grad], alone(model)[1], strict=True):
        p.grad = g


def steps(model, optimizer, train, count=3):
    for _ in range(count):
        train(model)
        optimizer.step()
        optimizer.zero_grad()


def learning(rank):
    """Adapters are saved as stock PEFT saves them, before and after three steps."""
    install_our_mask(pytest.MonkeyPatch())
    accelerator = fsdp2_accelerator()

    def saved(model):
        state = accelerator.get_state_dict(model) if hasattr(model, "unshard") else None
        return get_peft_model_state_dict(model, state)

    for kind in KINDS:
        stock = made(kind)
        model, optimizer = sharded(peftops.patch(copy.deepcopy(stock)), accelerator)
        start, now = saved(stock), saved(model)
        assert rank or (list(now) == list(start) and all(map(torch.equal, now.values(), start.values())))
        steps(model, optimizer, lambda model: trained(model, rank))
        now = saved(model)
        exact = exactly(stock)
        for one in (exact, stock):
            steps(one, optimizer_of(one), alone_on_both)
        truth, same = saved(exact).values(), saved(stock).values()
        assert rank or error(now.values(), truth) <= bound(same, truth), kind


def test_fsdp2_learns_and_saves(tmp_path):
    assert on_two_ranks(learning, tmp_path) == ""


def one_half(model):
    model.zero_grad()
    return [trained(model, 0)], grads(model)


def resumable(kind, accelerator):
    model, optimizer = sharded(peftops.patch(made(kind), strict=True), accelerator)

    def step(rank):
        loss = trained(model, rank)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return model, step


def interrupted(rank):
    accelerator = fsdp2_accelerator()
    for kind in ("lora", "qdora"):
        _, step = resumable(kind, accelerator)
        step(rank)
        step(rank)
        accelerator.save_state(f"{sys.argv[2]}/{kind}")
        accelerator.free_memory()
    _, step = resumable("lora", accelerator)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    step(rank)


def resumed(rank):
    accelerator = fsdp2_accelerator()
    for kind in ("lora", "qdora"):
        _, step = resumable(kind, accelerator)
        losses = [step(rank) for _ in range(4)]
        accelerator.free_memory()
        model, step = resumable(kind, accelerator)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        accelerator.load_state(f"{sys.argv[2]}/{kind}")
        assert [step(rank), step(rank)] == losses[2:], kind
        accelerator.free_memory()


def test_a_killed_rank_ends_the_other_and_training_resumes(tmp_path):
    assert "SIGKILL" in on_two_ranks(interrupted, tmp_path, str(tmp_path))
    assert on_two_ranks(resumed, tmp_path, str(tmp_path)) == ""


def fallbacks(rank):
    """What is sharded inside of a layer is PEFT's own, or at least its own base's."""
    install_our_mask(pytest.MonkeyPatch())
    stock = made("lora")
    model = peftops.patch(copy.deepcopy(stock), strict=True)
    for layer in lora_layers(model).values():
        for part in (layer.lora_A["default"], layer.lora_B["default"]):
            fully_shard(part)
    assert_law(stock, fully_shard(model), rank)
    assert peftops.report(model).calls == {"adapter layer is not nn.Linear": 14}

    mesh = init_device_mesh("cpu", (2,))
    for plan, calls in (
        ({"base_layer": ColwiseParallel(output_layouts=Replicate())}, {OWN: 6, FUSED: 8}),
        ({"lora_B.default": ColwiseParallel(output_layouts=Replicate())}, {"hooks on a part": 6, FUSED: 8}),
    ):
        for before in (True, False):
            model = copy.deepcopy(stock)
            if before:
                peftops.patch(model, strict=True)
            for name, layer in lora_layers(model).items():
                if name[-6:] in ("q_proj", "k_proj", "v_proj"):
                    parallelize_module(layer, mesh, plan)
            if not before:
                peftops.patch(model)
            assert_law(stock, model, 0, one_half)
            assert peftops.report(model).calls == calls


def test_what_is_sharded_inside_of_a_layer(tmp_path):
    assert on_two_ranks(fallbacks, tmp_path) == ""


def release(model):
    """Leaves parameters as ZeRO-3 does outside of a forward; returns what brings them back."""
    whole = {p: p.data for p in model.parameters()}
    for i, p in enumerate(whole):
        p.ds_id, p.data = i, p.data.new_empty(0)

    def gather():
        for p, data in whole.items():
            p.data = data

    return gather


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("before", [True, False], ids=["patched before", "patched after"])
@pytest.mark.parametrize("kind", KINDS)
def test_zero3_is_pefts_own(kind, before, monkeypatch):
    install_our_mask(monkeypatch)
    stock = made(kind)
    model = copy.deepcopy(stock)
    if before:
        peftops.patch(model, strict=True)
    gather = release(model)
    if not before:
        peftops.patch(model)
    assert peftops.report(peftops.refresh(model)).reasons == {"ZeRO-3": 14}
    gather()
    assert_law(stock, model, 0, one_half)
    assert peftops.report(model).calls == {"ZeRO-3": 14}
