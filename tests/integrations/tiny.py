"""Small PEFT models, and what one training step of them gives."""

import copy

import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import nn

import peftops.functional as F
from peftops.nn import LinearNF4


class Net(nn.Module):
    """One layer, under the name lin."""

    def __init__(self, lin):
        super().__init__()
        self.lin = lin

    def forward(self, x):
        return self.lin(x)


def tiny(
    architecture="llama", autocast_adapter_dtype=True, dtype=torch.float32, **config
):
    """A language model of two blocks whose adapters are not zero."""
    torch.manual_seed(0)
    if architecture == "gpt2":
        sizes = {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "resid_pdrop": 0,
            "embd_pdrop": 0,
            "attn_pdrop": 0,
        }
        base = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**sizes, vocab_size=64)
        )
        targets = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    else:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        base = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **sizes,
                vocab_size=64,
                attention_bias=True,
            )
        )
        targets = {"target_modules": "all-linear"}
    model = adapted(base.to(dtype), autocast_adapter_dtype, **targets | config)
    # Large enough that no gradient is near zero: there, only noise would be compared.
    for name, parameter in model.named_parameters():
        if "norm" not in name and "ln_" not in name:
            nn.init.normal_(
                parameter, std=1.0 if "embed" in name or "wte" in name else 0.1
            )
    return model


def lora_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


def in_4_bits(stock):
    """A copy whose bases are in 4 bits. Those of stock get the values that they stand for."""
    ours = copy.deepcopy(stock)
    for theirs, mine in zip(lora_layers(stock), lora_layers(ours), strict=True):
        mine.base_layer = LinearNF4.from_linear(mine.base_layer)
        theirs.base_layer.weight.data = mine.base_layer.dequantize()
    return ours


METHODS = "lora", "qlora", "dora", "qdora"


def pair(method, **config):
    """A model of stock PEFT, and one to patch with equal weights, whose base is in 4 bits for q."""
    stock = tiny(use_dora=method.endswith("dora"), **config)
    ours = in_4_bits(stock) if method.startswith("q") else copy.deepcopy(stock)
    for theirs, mine in zip(lora_layers(stock), lora_layers(ours), strict=True):
        if method.endswith("dora"):  # magnitudes near the norm, as training leaves them
            length = theirs.base_layer.weight.norm(dim=1)
            magnitude = length * torch.linspace(0.8, 1.2, len(length))
            for layer in (theirs, mine):
                layer.lora_magnitude_vector["default"].weight.data = magnitude
    return stock, ours


def single(dtype=torch.float32, autocast_adapter_dtype=True, **config):
    """One linear layer, model.base_model.model.lin."""
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("lin", nn.Linear(16, 24, dtype=dtype))
    return adapted(
        base,
        autocast_adapter_dtype,
        target_modules=["lin"],
        **config,
    )


def adapted(base, autocast_adapter_dtype=True, **config):
    """A PEFT model of this base, with a LoRA adapter that is not zero."""
    options = {
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "init_lora_weights": False,
    } | config
    return peft.get_peft_model(
        base, peft.LoraConfig(**options), autocast_adapter_dtype=autocast_adapter_dtype
    )


TOKENS = torch.arange(24).view(2, 12) * 7 % 64


@torch.no_grad()
def logits(model, **options):
    torch.manual_seed(1)
    return model(input_ids=TOKENS, **options).logits


def step(model, autocast=None):
    """Logits and gradients of one training step."""
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        out = model(input_ids=TOKENS, labels=TOKENS)
    out.loss.backward()
    return out.logits.detach(), [
        p.grad.clone() for p in model.parameters() if p.requires_grad
    ]


def pass_of(model, x, autocast=None):
    """y, and the gradients of x and of the parameters, of one forward and backward."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = model(x)
    y.float().square().mean().backward()
    return [
        y.detach(),
        x.grad,
        *(p.grad.clone() for p in model.parameters() if p.grad is not None),
    ]


def exactly(model):
    """The same parameters in float64, where PEFT's own layers are the truth."""
    return copy.deepcopy(model).double()


def install_our_mask(monkeypatch):
    """Makes stock PEFT drop what peftops would drop: both draw one seed a layer."""

    def dropout(x, p=0.5, training=True, inplace=False):
        if not p or not training:
            return x
        seed = torch.randint(2**62, (1,))
        keep = F.dropout_mask(seed, x[..., 0].numel(), x.shape[-1], p).view(x.shape)
        return x * keep / (1 - p)

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
