"""axolotl's plugin (on a stand-in), Lightning, and Liger-Kernel's fused cross entropy."""

import logging
import sys
import types

import pytest
import torch
from law import error

pytest.importorskip("peft")
pytest.importorskip("transformers")

from tiny import TOKENS, tiny

import peftops
from peftops.integrations import liger
from peftops.integrations.peft import FUSED


def test_axolotl(monkeypatch):
    """axolotl finds it by its name, makes it without arguments, and calls register first."""
    names = ["axolotl", "axolotl.integrations", "axolotl.integrations.base"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].BasePlugin = object
    monkeypatch.delitem(sys.modules, "peftops.integrations.axolotl", raising=False)
    plugin = peftops.integrations.axolotl.PeftopsPlugin()
    cfg = {"lora_r": 8, "lora_qkv_kernel": True}
    model = tiny()
    plugin.register(cfg)
    assert cfg == {"lora_r": 8} | dict.fromkeys(
        peftops.integrations.axolotl.KERNELS, False
    )
    [callback] = plugin.add_callbacks_pre_trainer(cfg, model)
    callback.on_init_end(None, None, None, model=model)
    assert peftops.report(model).fused == 14


@pytest.mark.usefixtures("one_thread")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, change):
            super().__init__()
            self.model = change(tiny())
            self.losses = []

        def training_step(self, batch, index):
            self.losses.append(self.model(input_ids=batch, labels=batch).loss)
            return self.losses[-1]

        def configure_optimizers(self):
            return torch.optim.AdamW(
                [p for p in self.parameters() if p.requires_grad], lr=1e-3
            )

    losses = []
    for change in (lambda model: model, peftops.patch):
        module = Module(change)
        quiet = {
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
        }
        trainer = lightning.Trainer(
            max_steps=20,
            accelerator="cpu",
            enable_checkpointing=False,
            default_root_dir=tmp_path,
            **quiet,
        )
        trainer.fit(
            module, torch.utils.data.DataLoader(TOKENS.repeat(20, 1), batch_size=2)
        )
        losses.append(torch.stack(module.losses))
    assert error(losses[1], losses[0]) <= 1e-5
    assert len(losses[0]) == 20
    assert set(peftops.report(module.model).calls) == {FUSED}


def test_liger_leaves_an_adapter_on_the_head_untrained(caplog):
    monkey_patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    model = tiny(target_modules=["q_proj", "lm_head"])
    with caplog.at_level(logging.WARNING, "peftops"):
        peftops.patch(peftops.unpatch(peftops.patch(model)))
    assert not caplog.records
    assert not liger.untrained(model)
    options = dict.fromkeys(("rope", "rms_norm", "swiglu"), False)
    monkey_patch.apply_liger_kernel_to_llama(**options, model=model.base_model.model)
    with caplog.at_level(logging.WARNING, "peftops"):
        peftops.patch(model)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "base_model.model.lm_head does not train"
    ]
    ours = liger_step(model)
    untrained = {name for name, grad in ours.items() if grad is None}
    assert untrained == {name for name in ours if "lm_head" in name}
    assert peftops.report(model).calls == {FUSED: 2}
    for name, grad in liger_step(peftops.unpatch(model)).items():
        assert grad is None or error(ours[name], grad) <= 1e-5


def liger_step(model):
    """Gradients by name, from Liger-Kernel's cross entropy in Triton's interpreter."""
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
