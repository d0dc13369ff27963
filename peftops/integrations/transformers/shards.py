"""Makes a new checkpoint of another, shard by shard: memory holds little more than a shard.

The caller says what replaces some tensors; all others are copied as loading would take them. A
shard that lies in OUT and is whole is not written again, so that a later run goes on there.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import output
from .checkpoint import Checkpoint
from .folder import CONFIG, INDEX, beside_weights

if TYPE_CHECKING:
    from safetensors import safe_open


@dataclass
class Shard:
    """What a shard of OUT holds.

    Attributes:
        errors: what ShardWriter.measure says of each replaced tensor, by its key there.
        sizes: the bytes of each tensor, by its key in OUT.
    """

    errors: dict[str, float]
    sizes: dict[str, int]


@dataclass
class ShardWriter:
    """Writes the shards of a checkpoint to OUT, one at a time.

    Attributes:
        checkpoint: what is read.
        out: the folder OUT, after output.begin.
        device: where make and measure compute.
        replaced: the keys of the tensors that are not copied.
        make: (key, tensor as it is loaded) -> what takes its place on the CPU, by key.
        measure: (key, tensor as it is loaded, tensors of OUT) -> how far these are from it. It
            raises ValueError where they are not what make would have written.
        endings: what make may append to a key. OUT may hold key and key + ending in its place.
    """

    checkpoint: Checkpoint
    out: Path
    device: torch.device
    replaced: Collection[str]
    make: Callable[[str, Tensor], dict[str, Tensor]]
    measure: Callable[[str, Tensor, dict[str, Tensor]], float]
    endings: Collection[str] = ()

    def ensure(self, name: str, advance: Callable[[int], None]) -> Shard:
        """Writes the shard of that name unless OUT holds it already.

        Args:
            name: one of checkpoint.shards.
            advance: is told how many more tensors have been replaced.

        Raises:
            OSError: it cannot be written, or does not hold afterwards what was written.
        """
        shard = self.read(name)
        if shard is not None:
            advance(len(shard.errors))
            return shard
        self.write(name, advance)
        shard = self.read(name)
        if shard is None:
            raise OSError(f"{self.out / name} does not hold what was written to it")
        return shard

    def write(self, name: str, advance: Callable[[int], None]) -> None:
        """Writes a shard. What make returns is held until then; copies go from file to file."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        with safe_open(self.checkpoint.folder / name, framework="pt") as source:
            tensors: dict[str, Tensor] = {}
            for key in self.checkpoint.shards[name]:
                tensor = self.as_loaded(source, key)
                if key in self.replaced:
                    tensors |= self.make(key, tensor)
                    advance(1)
                else:
                    tensors[key] = tensor

            def save(path):
                with torch.no_grad():
                    save_file(tensors, path, metadata={"format": "pt"})

            output.put(self.out, name, save)

    def as_loaded(self, source: "safe_open", key: str) -> Tensor:
        """The tensor in the dtype in which transformers would load it."""
        tensor = source.get_tensor(key)
        device = self.device if key in self.replaced else tensor.device
        return tensor.to(device, self.checkpoint.dtypes.get(key, tensor.dtype))

    def read(self, name: str) -> Shard | None:
        """What OUT holds of a shard, or None where it is not whole."""
        from safetensors import SafetensorError, safe_open

        if not (self.out / name).is_file():
            return None
        shard = Shard({}, {})
        try:
            with (
                safe_open(self.checkpoint.folder / name, framework="pt") as source,
                safe_open(self.out / name, framework="pt") as written,
            ):
                held = set(written.keys())
                for key in self.checkpoint.shards[name]:
                    if not self.read_key(key, source, written, held, shard):
                        return None
                return shard if held == set(shard.sizes) else None
        except (SafetensorError, ValueError, TypeError):
            return None

    def read_key(
        self,
        key: str,
        source: "safe_open",
        written: "safe_open",
        held: set[str],
        shard: Shard,
    ) -> bool:
        """Adds what replaces a key to the shard. False if a copied tensor is not equal."""
        endings = self.endings if key in self.replaced else ()
        beside = [key + ending for ending in endings if key + ending in held]
        tensors = {name: written.get_tensor(name) for name in [key, *beside]}
        shard.sizes |= {name: tensor.nbytes for name, tensor in tensors.items()}
        tensor = self.as_loaded(source, key)
        if key not in self.replaced:
            return same_bits(tensors[key], tensor)
        shard.errors[key] = self.measure(key, tensor, tensors)
        return True


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit by bit, so that NaN equals itself."""
    if a.dtype != b.dtype:
        return False
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def finish(
    checkpoint: Checkpoint,
    out: Path,
    shards: dict[str, Shard],
    config: dict,
) -> list[Path]:
    """Adds to OUT what lies beside the weights, the index, and config.json.

    config.json comes last: without it nothing loads OUT.

    Args:
        checkpoint: what was read.
        out: the folder OUT, with all shards.
        shards: what ShardWriter.ensure returned, by name.
        config: the content of config.json.

    Returns:
        The links that are not copied.
    """
    files, links = beside_weights(checkpoint.folder)
    for file in files:
        if file.name in (CONFIG, output.UNFINISHED) or file.name.endswith(
            ".index.json"
        ):
            continue
        name = file.relative_to(checkpoint.folder)
        output.put(out, name, partial(copyfile, file))
    if checkpoint.index:
        output.put_json(out, INDEX, make_index(checkpoint, shards))
    output.put_json(out, CONFIG, config)
    output.end(out)
    return links


def make_index(checkpoint: Checkpoint, shards: dict[str, Shard]) -> dict[str, dict]:
    """The content of the index of OUT."""
    weight_map: dict[str, str] = {}
    total = 0
    for name, shard in shards.items():
        weight_map |= dict.fromkeys(shard.sizes, name)
        total += sum(shard.sizes.values())
    metadata = {**((checkpoint.index or {}).get("metadata") or {}), "total_size": total}
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
