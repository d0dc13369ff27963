"""What each of two ranks does for test_distributed.py: patched PEFT models on two devices against stock PEFT on one."""

import copy
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import (
    Accelerator,
    DistributedType,
    FullyShardedDataParallelPlugin,
    PartialState,
)
from accelerate.utils.fsdp_utils import (
    fsdp2_prepare_model,
    load_fsdp_model,
    load_fsdp_optimizer,
    save_fsdp_model,
    save_fsdp_optimizer,
)
from law import bound, chain_bound, error, orders
from peft import get_peft_model_state_dict
from tiny import METHODS, TOKENS, exactly, pair
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import peftops
from peftops.integrations.peft import lora_layers, mlp
from peftops.integrations.peft.mlp import FusedMLP

CHECKPOINTING = {"use_reentrant": False}


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t.clone()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def step(model, tokens):
    """Loss and gradients, of the whole batch where each rank has a part of it."""
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    loss = loss.detach().clone()
    if len(tokens) < len(TOKENS):
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return [loss, *(whole(p.grad) for p in trained(model))]


def steps(model, optimizer, count=3, first=0):
    """Losses of the same batch on every rank."""
    losses = []
    for i in range(first, first + count):
        optimizer.zero_grad()
        torch.manual_seed(i)
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def adam(model):
    return torch.optim.AdamW(trained(model), 0.01)


def by_accelerate(model, plugin=None):
    """As accelerate wraps for FSDP2, which on a CPU its Accelerator refuses to."""
    plugin = plugin or FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    state = SimpleNamespace(fsdp_plugin=plugin)
    return fsdp2_prepare_model(
        SimpleNamespace(state=state, mixed_precision="no", is_main_process=True), model
    )


def by_blocks(model, **options):
    for block in model.base_model.model.model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def by_parts(model):
    """As a policy that wraps each trained module by itself."""
    for layer in lora_layers(model).values():
        for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            for module in part.values():
                fully_shard(module)
    return by_blocks(model)


def ranked():
    """What a launcher tells accelerate."""
    os.environ |= {
        "RANK": str(dist.get_rank()),
        "LOCAL_RANK": str(dist.get_rank()),
        "WORLD_SIZE": "2",
    }
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}


def by_ddp(model):
    ranked()
    wrapped = Accelerator(cpu=True).prepare(model)
    assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
    return wrapped


def assert_law(method, wrap, first, checkpointing, calls=None):
    """One step of a batch that ranks share, patched first or wrapped first."""
    stock, ours = pair(method)
    if checkpointing:
        for model in (stock, ours):
            model.gradient_checkpointing_enable(CHECKPOINTING)
    exact, same = step(exactly(stock), TOKENS), orders(partial(step, stock, TOKENS))
    ours = wrap(peftops.patch(ours)) if first else peftops.patch(wrap(ours))
    before = peftops.report(ours)
    out, count = step(ours, TOKENS[dist.get_rank() :][:1]), len(lora_layers(ours))
    for part in (slice(0, 1), slice(1, None)):
        limit = chain_bound([draw[part] for draw in same], exact[part])
        assert error(out[part], exact[part]) <= limit, (method, wrap, first, checkpointing)
    report, times = peftops.report(ours), 2 if checkpointing else 1
    assert report.calls == {calls or "fused": count * times}, report
    assert (before.fused, report.fused) == ((0, 0) if calls else (count, count)), report


def assert_trains_alike(method, wrap, **config):
    """Three steps of Adam, of one batch on all ranks, whose mean is the gradient of one process to the bit."""
    _, one = pair(method, **config)
    two = copy.deepcopy(one)
    one = peftops.patch(one)
    two = wrap(peftops.patch(two))
    expected, losses = steps(one, adam(one)), steps(two, adam(two))
    assert torch.equal(torch.stack(losses), torch.stack(expected)), (
        method,
        wrap,
        losses,
        expected,
    )
    assert all(
        torch.equal(whole(p), q) for p, q in zip(trained(two), trained(one), strict=True)
    ), (method, wrap)


def each(wrap, orders=(True, False)):
    for method in METHODS:
        for first in orders:
            for checkpointing in (False, True):
                assert_law(method, wrap, first, checkpointing)
        for p in (0.0, 0.3):
            assert_trains_alike(method, wrap, lora_dropout=p)


def ddp(rank):
    each(by_ddp)


def fsdp2(rank):
    each(by_accelerate)
    for method in METHODS:
        assert_law_in_bf16(method)
    for method in ("lora", "qlora"):
        for first in (True, False):
            assert_law_of_mlps(method, first)


def assert_law_of_mlps(method, first):
    stock, ours = pair(method)
    exact, same = step(exactly(stock), TOKENS), orders(partial(step, stock, TOKENS))

    def fused(model):
        return mlp.fuse(peftops.patch(model, strict=True), strict=True)

    ours = by_blocks(fused(ours)) if first else fused(by_blocks(ours))
    assert error(step(ours, TOKENS), exact) <= chain_bound(same, exact), method
    assert mlp.calls(ours) == {"fused": 2}
    assert not any(isinstance(module, FusedMLP) for module in peftops.unpatch(ours).modules())


def assert_law_in_bf16(method):
    """Nothing of a group that FSDP2 gathers in bf16 is of another dtype, magnitudes included."""
    stock, ours = pair(method)
    exact, found = step(exactly(stock), TOKENS), []
    for model in (stock, peftops.patch(ours)):
        by_blocks(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        found.append(step(model, TOKENS))
    same, out = found
    assert error(out, exact) <= bound(same, exact), method


def saved(rank):
    """PEFT saves of a sharded model what it saves of a whole one, to the byte; a checkpoint of shards goes on."""
    folder = Path(sys.argv[2])
    for method in METHODS:
        _, one = pair(method)
        two, later = copy.deepcopy(one), copy.deepcopy(one)
        one, two, later = (
            peftops.patch(one),
            *(by_accelerate(peftops.patch(model)) for model in (two, later)),
        )
        optimizer, other = adam(two), adam(later)
        steps(one, adam(one)), steps(two, optimizer)
        state = get_model_state_dict(
            two, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if rank == 0:
            one.save_pretrained(folder / "one")
            two.save_pretrained(folder / "two", state_dict=state)
            files = [
                (folder / name / "adapter_model.safetensors").read_bytes()
                for name in ("one", "two")
            ]
            assert files[0] == files[1], method
        save(two, optimizer, folder / method)
        load(later, other, folder / method)
        assert steps(later, other) == steps(two, optimizer), method


def save(model, optimizer, folder):
    dcp.save(
        dict(zip("mo", get_state_dict(model, optimizer), strict=True)), checkpoint_id=folder
    )


def load(model, optimizer, folder):
    states = dict(zip("mo", get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=states["m"], optim_state_dict=states["o"])


def as_launched(**options):
    """As under `accelerate launch`; on a CPU an Accelerator's state knows no FSDP, though its code works there."""
    ranked()
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **options
    )
    accelerator.state.fsdp_plugin = plugin
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator, plugin


def checkpoints(rank):
    """What Trainer calls for its checkpoints, which are of adapters alone, and for an adapter to keep."""
    losses = {}
    for form, whole, methods in (
        ("sharded_state_dict", False, METHODS),
        ("full_state_dict", True, ("lora", "dora")),
    ):
        accelerator, plugin = as_launched(state_dict_type=form, cpu_ram_efficient_loading=whole)
        for method in methods:
            folder = Path(sys.argv[2]) / f"{form} {method}"
            models = [peftops.patch(pair(method)[1]) for _ in range(2)]
            (one, first), (two, second) = (
                accelerator.prepare(model, adam(model)) for model in models
            )
            found = steps(one, first)
            assert losses.setdefault(method, found) == found
            save_fsdp_model(plugin, accelerator, one, folder, adapter_only=True)
            save_fsdp_optimizer(plugin, accelerator, first, one, folder)
            load_fsdp_model(plugin, accelerator, two, folder, adapter_only=True)
            load_fsdp_optimizer(plugin, accelerator, second, two, folder, adapter_only=True)
            assert steps(two, second) == steps(one, first), (form, method)
            kept = [
                get_peft_model_state_dict(model, accelerator.get_state_dict(model))
                for model in (one, two)
            ]
            assert kept[0].keys() == kept[1].keys() and all(
                map(torch.equal, *(state.values() for state in kept))
            )
            accelerator.free_memory()


LAYERS = "base_model.model.model.layers.*.mlp"
GATHERED = ColwiseParallel(output_layouts=Replicate())
PLANS = {  # what is split over ranks, and what calls count as
    "the base": (
        {f"{LAYERS}.up_proj.base_layer": GATHERED},
        {"fused": 12, "fused, base's own product": 2},
    ),
    "an adapter": (
        {f"{LAYERS}.up_proj.lora_B.default": GATHERED},
        {"fused": 12, "hooks on a part": 2},
    ),
    "both": (
        {
            f"{LAYERS}.{name}": style()
            for layer, part, style in (
                ("up_proj", "lora_B.default", ColwiseParallel),
                ("gate_proj", "lora_B.default", ColwiseParallel),
                ("down_proj", "lora_A.default", RowwiseParallel),
            )
            for name in (f"{layer}.base_layer", f"{layer}.{part}")
        },
        {"fused": 8, "hooks on a part": 6},
    ),
}


def fallbacks(rank):
    """A layer whose adapter's modules do more than multiply, gather or split, is PEFT's own."""
    for method in METHODS:
        assert_law(method, by_parts, True, True, calls="adapter layer is not nn.Linear")
    model = peftops.patch(pair("lora")[1])
    fully_shard(model.base_model.model.model.layers[1].mlp.up_proj)
    with pytest.raises(
        ValueError,
        match=r"unpatch: .*1.mlp.up_proj has been made a FSDPFusedLinear since patch",
    ):
        peftops.unpatch(model)
    assert peftops.report(model).fused == 14
    model = mlp.fuse(peftops.patch(pair("lora")[1]))
    fully_shard(model.base_model.model.model.layers[1].mlp)
    with pytest.raises(
        ValueError, match=r"unpatch: .*1.mlp has been made a FSDPFusedLlamaMLP since patch"
    ):
        peftops.unpatch(model)
    for name, (plan, calls) in PLANS.items():
        for first in (True, False):
            stock, ours = pair("lora")
            mesh = init_device_mesh("cpu", (2,))
            exact, same = step(exactly(stock), TOKENS), orders(partial(step, stock, TOKENS))
            if first:
                peftops.patch(ours)
            parallelize_module(ours, mesh, plan)
            out = step(peftops.patch(ours), TOKENS)
            assert error(out, exact) <= chain_bound(same, exact), name
            assert peftops.report(ours).calls == calls, (name, peftops.report(ours))
