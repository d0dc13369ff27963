"""axolotl's plugin, in its YAML:  plugins: [peftops.integrations.axolotl.PeftopsPlugin]"""

from axolotl.integrations.base import BasePlugin

from .transformers import PeftopsCallback

KERNELS = "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"


class PeftopsPlugin(BasePlugin):
    """Adds PeftopsCallback to axolotl's trainers.

    It switches axolotl's own LoRA kernels off: they read the adapters and call no layer.
    """

    def register(self, cfg):
        for name in KERNELS:
            cfg[name] = False

    def add_callbacks_pre_trainer(self, cfg, model):
        # Not patch(model): for DPO and its like the trainer makes the adapters later.
        return [PeftopsCallback()]
