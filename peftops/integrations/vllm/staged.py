"""What a worker of vLLM does for adapters: it holds those from memory, and checks all of them."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .layers import Linear


@dataclass
class Staged:
    """An adapter that a worker holds for vLLM to load whenever it has no copy of its own.

    Attributes:
        id: of its request.
        config: adapter_config.json as text.
        tensors: adapter_model.safetensors as bytes.
    """

    id: int
    config: str
    tensors: bytes

    @contextmanager
    def folder(self) -> Iterator[str]:
        """A directory with the adapter's two files, the large one in memory."""
        with tempfile.TemporaryDirectory() as folder:
            memory = os.memfd_create("peftops")
            try:
                with open(memory, "wb", closefd=False) as file:
                    file.write(self.tensors)
                target = os.path.join(folder, "adapter_model.safetensors")
                os.symlink(f"/proc/self/fd/{memory}", target)
                with open(os.path.join(folder, "adapter_config.json"), "w") as file:
                    file.write(self.config)
                yield folder
            finally:
                os.close(memory)


STAGED: dict[str, Staged] = {}  # of this process, by the path in a request


def stage(
    worker: Any,
    path: str,
    adapter_id: int,
    config: str,
    tensors: bytes,
) -> None:
    """A method of workers, which load_lora calls from another process."""
    STAGED[path] = Staged(adapter_id, config, tensors)


def expect_shapes(
    name: str,
    adapter: Any,
    manager: Any,
) -> None:
    """Raises ValueError for a matrix that does not fit its layer. vLLM would use a part of it.

    Layers that are split between devices are not looked at.

    Args:
        name: of the adapter.
        adapter: vLLM's LoRAModel.
        manager: vLLM's LoRAModelManager.
    """
    sizes = sizes_of(manager)
    for module, lora in adapter.loras.items():
        if module not in sizes or lora.lora_a is None or lora.lora_b is None:
            continue
        n, k = sizes[module]
        r = lora.lora_a.shape[0]
        for letter, matrix, shape in (
            ("A", lora.lora_a, (r, k)),
            ("B", lora.lora_b, (n, r)),
        ):
            if tuple(matrix.shape) != shape:
                raise ValueError(
                    f"{name}: {module}.lora_{letter} must be {shape}, got {tuple(matrix.shape)}"
                )


def sizes_of(manager: Any) -> dict[str, tuple[int, int]]:
    """(n, k) of the layers that an adapter can name, by their names in vLLM."""
    sizes = {}
    for path, layer in manager.modules.items():
        served = layer.punica_wrapper
        if not isinstance(served, Linear) or layer.tp_size > 1:
            continue
        k = served.a.shape[2]
        sizes[path] = sum(served.sizes), k
        parent, _, last = path.rpartition(".")
        names = manager.packed_modules_mapping.get(last, [])
        if len(names) == len(served.sizes):
            for part, width in zip(names, served.sizes, strict=True):
                sizes[f"{parent}.{part}"] = width, k
    return sizes
