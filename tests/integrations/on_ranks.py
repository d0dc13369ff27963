"""What each of two ranks does for test_distributed.py.

Patched PEFT models on two devices are compared with stock PEFT on one.
"""

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
    """Loss and gradients. Where each rank has half of the batch, they are those of all of it."""
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
    """Wraps a model for FSDP2 as accelerate does, whose Accelerator refuses to on a CPU."""
    plugin = plugin or FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(
        state=state, mixed_precision="no", is_main_process=True
    )
    return fsdp2_prepare_model(accelerator, model)


def by_blocks(model, **options):
    for block in model.base_model.model.model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def by_trained_modules(model):
    """Wraps each trained module by itself, as some policies do, and then the blocks."""
    for layer in lora_layers(model).values():
        for adapters in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            for module in adapters.values():
                fully_shard(module)
    return by_blocks(model)


def set_variables_of_launcher():
    """Sets the environment variables that a launcher sets for accelerate."""
    os.environ |= {
        "RANK": str(dist.get_rank()),
        "LOCAL_RANK": str(dist.get_rank()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }


def by_ddp(model):
    set_variables_of_launcher()
    wrapped = Accelerator(cpu=True).prepare(model)
    assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
    return wrapped


def assert_law(method, wrap, first, checkpointing, calls=None):
    """One step of a batch that the ranks share follows the law, patched first or wrapped first.

    calls: the reason why all calls are PEFT's own; None: they are fused.
    """
    stock, ours = pair(method)
    if checkpointing:
        for model in (stock, ours):
            model.gradient_checkpointing_enable(CHECKPOINTING)
    exact = step(exactly(stock), TOKENS)
    same = orders(partial(step, stock, TOKENS))
    ours = wrap(peftops.patch(ours)) if first else peftops.patch(wrap(ours))
    before = peftops.report(ours)
    out = step(ours, TOKENS[dist.get_rank() :][:1])
    for piece in (slice(0, 1), slice(1, None)):  # the loss, and the gradients
        limit = chain_bound([draw[piece] for draw in same], exact[piece])
        assert error(out[piece], exact[piece]) <= limit, (
            method,
            wrap,
            first,
            checkpointing,
        )
    report = peftops.report(ours)
    count = len(lora_layers(ours))
    times = 2 if checkpointing else 1
    assert report.calls == {calls or "fused": count * times}, report
    assert (before.fused, report.fused) == ((0, 0) if calls else (count, count)), report


def assert_trains_alike(method, wrap, **config):
    """Three steps of Adam give the same bits as in one process.

    All ranks have the same batch, so that the mean of their gradients is that of one process.
    """
    _, single = pair(method, **config)
    shared = copy.deepcopy(single)
    single = peftops.patch(single)
    shared = wrap(peftops.patch(shared))
    expected = steps(single, adam(single))
    losses = steps(shared, adam(shared))
    assert torch.equal(torch.stack(losses), torch.stack(expected)), (
        method,
        wrap,
        losses,
        expected,
    )
    for p, q in zip(trained(shared), trained(single), strict=True):
        assert torch.equal(whole(p), q), (method, wrap)


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
    exact = step(exactly(stock), TOKENS)
    same = orders(partial(step, stock, TOKENS))

    def fused(model):
        return mlp.fuse(peftops.patch(model, strict=True), strict=True)

    ours = by_blocks(fused(ours)) if first else fused(by_blocks(ours))
    assert error(step(ours, TOKENS), exact) <= chain_bound(same, exact), method
    assert mlp.calls(ours) == {"fused": 2}
    assert not any(
        isinstance(module, FusedMLP) for module in peftops.unpatch(ours).modules()
    )


def assert_law_in_bf16(method):
    """FSDP2 gathers all of a group in bf16, magnitudes included."""
    stock, ours = pair(method)
    exact = step(exactly(stock), TOKENS)
    results = []
    for model in (stock, peftops.patch(ours)):
        by_blocks(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        results.append(step(model, TOKENS))
    same, out = results
    assert error(out, exact) <= bound(same, exact), method


def saved(rank):
    """PEFT saves the same bytes of a sharded model and of a whole one. Sharded training resumes."""
    folder = Path(sys.argv[2])
    for method in METHODS:
        _, single = pair(method)
        sharded = by_accelerate(peftops.patch(copy.deepcopy(single)))
        resumed = by_accelerate(peftops.patch(copy.deepcopy(single)))
        peftops.patch(single)
        optimizer = adam(sharded)
        resumed_optimizer = adam(resumed)
        steps(single, adam(single))
        steps(sharded, optimizer)
        state = get_model_state_dict(
            sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if rank == 0:
            single.save_pretrained(folder / "single")
            sharded.save_pretrained(folder / "sharded", state_dict=state)
            files = [
                (folder / name / "adapter_model.safetensors").read_bytes()
                for name in ("single", "sharded")
            ]
            assert files[0] == files[1], method
        save(sharded, optimizer, folder / method)
        load(resumed, resumed_optimizer, folder / method)
        assert steps(resumed, resumed_optimizer) == steps(sharded, optimizer), method


def save(model, optimizer, folder):
    dcp.save(
        dict(zip("mo", get_state_dict(model, optimizer), strict=True)),
        checkpoint_id=folder,
    )


def load(model, optimizer, folder):
    states = dict(zip("mo", get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=states["m"],
        optim_state_dict=states["o"],
    )


def as_launched(**options):
    """(accelerator, plugin) as under `accelerate launch`.

    On a CPU, an Accelerator's state does not take FSDP, though its code works there.
    """
    set_variables_of_launcher()
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        **options,
    )
    accelerator.state.fsdp_plugin = plugin
    PartialState().distributed_type = accelerator.state.distributed_type = (
        DistributedType.FSDP
    )
    return accelerator, plugin


def checkpoints(rank):
    """What Trainer calls for its checkpoints, which hold only adapters, and to save an adapter."""
    losses = {}
    for form, whole, methods in (
        ("sharded_state_dict", False, METHODS),
        ("full_state_dict", True, ("lora", "dora")),
    ):
        accelerator, plugin = as_launched(
            state_dict_type=form, cpu_ram_efficient_loading=whole
        )
        for method in methods:
            folder = Path(sys.argv[2]) / f"{form} {method}"
            models = [peftops.patch(pair(method)[1]) for _ in range(2)]
            (saved, optimizer), (loaded, loaded_optimizer) = (
                accelerator.prepare(model, adam(model)) for model in models
            )
            first = steps(saved, optimizer)
            assert losses.setdefault(method, first) == first
            save_fsdp_model(plugin, accelerator, saved, folder, adapter_only=True)
            save_fsdp_optimizer(plugin, accelerator, optimizer, saved, folder)
            load_fsdp_model(plugin, accelerator, loaded, folder, adapter_only=True)
            load_fsdp_optimizer(
                plugin, accelerator, loaded_optimizer, loaded, folder, adapter_only=True
            )
            expected = steps(saved, optimizer)
            assert steps(loaded, loaded_optimizer) == expected, (form, method)
            kept = [
                get_peft_model_state_dict(model, accelerator.get_state_dict(model))
                for model in (saved, loaded)
            ]
            assert kept[0].keys() == kept[1].keys()
            assert all(map(torch.equal, *(state.values() for state in kept)))
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
            for layer, adapter, style in (
                ("up_proj", "lora_B.default", ColwiseParallel),
                ("gate_proj", "lora_B.default", ColwiseParallel),
                ("down_proj", "lora_A.default", RowwiseParallel),
            )
            for name in (f"{layer}.base_layer", f"{layer}.{adapter}")
        },
        {"fused": 8, "hooks on a part": 6},
    ),
}


def fallbacks(rank):
    """PEFT runs a layer whose adapter's modules do more than multiply, such as gather or split."""
    for method in METHODS:
        assert_law(
            method,
            by_trained_modules,
            True,
            True,
            calls="adapter layer is not nn.Linear",
        )
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
        ValueError,
        match=r"unpatch: .*1.mlp has been made a FSDPFusedLlamaMLP since patch",
    ):
        peftops.unpatch(model)
    for name, (plan, calls) in PLANS.items():
        for first in (True, False):
            stock, ours = pair("lora")
            mesh = init_device_mesh("cpu", (2,))
            exact = step(exactly(stock), TOKENS)
            same = orders(partial(step, stock, TOKENS))
            if first:
                peftops.patch(ours)
            parallelize_module(ours, mesh, plan)
            out = step(peftops.patch(ours), TOKENS)
            assert error(out, exact) <= chain_bound(same, exact), name
            assert peftops.report(ours).calls == calls, (name, peftops.report(ours))
