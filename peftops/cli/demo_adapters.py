"""The adapters of `peftops demo --adapters N`, and the requests for them.

A few are trained, all of them in each batch. The others are copies of these whose matrices are
made stronger, weaker or negative at random.
"""

import copy
import shutil
import warnings
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import peftops

from ..nn.pool_store import BASE
from . import BadInput

RATE = 5e-4
SPREAD = 1.3  # so that copies of one adapter differ by more than what bf16 rounds
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ALONE = 16  # one request in so many is for the model without an adapter


def ranks(rank: int, count: int) -> dict[str, int]:
    """{name: rank} of the adapters that are trained: three at most, of unequal ranks."""
    chosen = rank, max(1, rank // 2), 2 * rank
    return {called(i): r for i, r in enumerate(chosen[:count])}


def called(number: int) -> str:
    return f"{number:04}"


def sharing(model: nn.Module) -> nn.Module:
    """A copy of the model that shares its weights' memory."""
    weights = {id(p): p for p in model.parameters()}
    return copy.deepcopy(model, weights)


def with_adapters(model, chosen, dora):
    """PEFT's model with a fresh adapter of each rank on all linear layers, patched."""
    import peft

    adapted = None
    for name, rank in chosen.items():
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            use_dora=dora,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if adapted is None:
                adapted = peft.get_peft_model(model, config, name)
            else:
                adapted.add_adapter(name, config)
    adapted.set_requires_grad([*chosen])
    return peftops.patch(adapted).train()


def train(model, chosen, ids, steps, dtype, dora, tick):
    """Trains adapters on different parts of a text, a row of each in every batch.

    Args:
        chosen: {name: rank}.
        ids: the text's chunks, (chunks, tokens).
        tick: takes the mean loss after each step.

    Returns:
        (PEFT's model, the mean losses of the steps).
    """
    adapted = with_adapters(sharing(model), chosen, dora)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    part = len(ids) // len(chosen)
    firsts = torch.arange(len(chosen), device=ids.device) * part
    losses = []
    for step in range(steps):
        batch = ids[firsts + step % part]
        with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
            logits = adapted(input_ids=batch, adapter_names=[*chosen]).logits
        of_tokens = cross_entropy(
            logits[:, :-1].mT.float(),
            batch[:, 1:],
            reduction="none",
        )
        # A sum over adapters: each has the gradient that it would have alone.
        of_tokens.mean(1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(of_tokens.mean().item())
        tick(losses[-1])
    return adapted, losses


def write(adapted, out: Path, copies: Path, count: int, seed: int, stage):
    """Saves the trained adapters to `out`, and perturbed copies in bf16 beside them to `copies`.

    Returns:
        {name: folder} of `count` adapters.

    Raises:
        BadInput: there is not so much room.
    """
    adapted.save_pretrained(out, save_embedding_layers=False)
    trained = [*adapted.peft_config]
    folders = {name: out / name for name in trained}
    originals = [read(folder) for folder in folders.values()]
    expect_room(copies, originals, count)
    generator = torch.Generator().manual_seed(seed)
    for number in range(len(trained), count):
        parent = number % len(trained)
        folder = copies / called(number)
        save(folder, perturbed(originals[parent], generator), out / trained[parent])
        folders[folder.name] = folder
        stage.advance()
    return folders


def read(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / WEIGHTS)


def save(folder: Path, tensors, parent: Path) -> None:
    """An adapter in PEFT's format, with the config of its parent."""
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    shutil.copyfile(parent / CONFIG, folder / CONFIG)


def perturbed(tensors, generator):
    """The tensors in bf16, the matrices among them times 1 + SPREAD · N(0, 1).

    DoRA's magnitudes, which are vectors, stay.
    """
    result = {}
    for key, tensor in tensors.items():
        factor = 1.0
        if tensor.dim() == 2:
            factor += SPREAD * torch.randn((), generator=generator).item()
        result[key] = (factor * tensor).bfloat16()
    return result


def expect_room(folder, originals, count):
    sizes = [sum(2 * t.numel() for t in tensors.values()) for tensors in originals]
    needed = count * sum(sizes) / len(sizes)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BadInput(
            f"{count} adapters take {needed / 1e9:.1f} GB of disk,"
            f" and {free / 1e9:.1f} GB are free in {folder.parent}"
        )


def requests(names, ids, count, tokens, seed):
    """(names of adapters, prompts (count, tokens)): the i-th name is asked for 1/i as often.

    One in sixteen is for the model without an adapter.
    """
    generator = torch.Generator().manual_seed(seed)
    often = 1 / torch.arange(1, len(names) + 1, dtype=torch.float64)
    numbers = often.multinomial(count, replacement=True, generator=generator)
    alone = torch.randint(ALONE, (count,), generator=generator) == 0
    chosen = [
        BASE if without else names[number]
        for number, without in zip(numbers.tolist(), alone.tolist(), strict=True)
    ]
    pieces = ids.flatten()[: ids.numel() // tokens * tokens].view(-1, tokens)
    rows = torch.randint(len(pieces), (count,), generator=generator)
    return chosen, pieces[rows.to(ids.device)]


def in_batches(chosen, prompts, size):
    """(names, prompts) of each batch."""
    rest = iter(chosen)
    return [([*islice(rest, len(rows))], rows) for rows in prompts.split(size)]
