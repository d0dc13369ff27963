"""axolotl's plugin, in its YAML:  plugins: [peftops.integrations.axolotl.PeftopsPlugin]"""

from axolotl.integrations.base import BasePlugin

from .transformers import PeftopsCallback

KERNELS = "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"


class PeftopsPlugin(BasePlugin):
    """PeftopsCallback for axolotl's trainers. axolotl's own LoRA kernels, which call no layer, are switched off."""

    def register(self, cfg):
        for name in KERNELS:
            cfg[name] = False

    def add_callbacks_pre_trainer(self, cfg, model):
        return [
            PeftopsCallback()
        ]  # not patch(model): for DPO and its like the trainer makes the adapters
