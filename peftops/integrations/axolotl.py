"""axolotl's plugin, in its YAML:  plugins: [peftops.integrations.axolotl.PeftopsPlugin]"""

from axolotl.integrations.base import BasePlugin

from .peft import patch

KERNELS = "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"


class PeftopsPlugin(BasePlugin):
    """Patches the model that axolotl trains. axolotl's own LoRA kernels, which call no layer, are switched off."""

    def register(self, cfg):
        for name in KERNELS:
            cfg[name] = False

    def post_model_load(self, cfg, model):
        patch(model)
