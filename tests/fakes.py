"""What tests put in the place of the demo's model and of the kernels of this CPU."""

import sys
import types

import pytest
import torch


@pytest.fixture
def kernels(monkeypatch):
    """Returns choose(isa): pretends that these kernels run on this CPU.

    `isa` is a name of csrc/bindings.cpp, or None where no kernels run.
    """

    def choose(isa):
        module = None
        if isa:
            cpu = types.SimpleNamespace(__name__=f"peftops._C.{isa}")
            module = types.SimpleNamespace(cpu=cpu)
        monkeypatch.setitem(sys.modules, "peftops._C", module)

    return choose


@pytest.fixture
def tiny(monkeypatch, one_thread):
    """The module of the demo's contenders, with a tiny model in the place of SmolLM2.

    The model has two layers of random weights, and its tokenizer reads bytes.
    """
    contenders = pytest.importorskip("peftops.cli.demo_contenders")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,  # blocks of bitsandbytes' kernels for a CPU end with rows
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).requires_grad_(False)

    def tokenizer(text, **_):
        return {"input_ids": torch.tensor([list(text.encode())])}

    def load_model(name, dtype, device):
        return model.to(dtype), tokenizer

    monkeypatch.setattr(contenders, "load_model", load_model)
    # so that the demo takes the CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(contenders, "SHAPE", (2, 32))
    monkeypatch.setattr(contenders, "peak_memory", lambda *args: 1_000_000)
    return contenders
