"""axolotl's plugin, in its YAML:  plugins: [peftops.integrations.axolotl.PeftopsPlugin]"""

from axolotl.integrations.base import BasePlugin
from torch import nn
from transformers import TrainerCallback

from .transformers import PeftopsCallback

KERNELS = "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"


class PeftopsPlugin(BasePlugin):
    """Adds PeftopsCallback to axolotl's trainers.

    It switches axolotl's own LoRA kernels off: they read the adapters and call no layer.
    """

    def register(self, cfg: dict) -> None:
        for name in KERNELS:
            cfg[name] = False

    def add_callbacks_pre_trainer(
        self, cfg: dict, model: nn.Module
    ) -> list[TrainerCallback]:
        # Not patch(model): for DPO and its like the trainer makes the adapters later.
        return [PeftopsCallback()]
