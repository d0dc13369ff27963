"""PEFT's DoRA, patched: the same model, the same training, the same checkpoints."""

import copy

import pytest
import torch
from law import bound, chain_bound, error, orders
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from tiny import TOKENS, adapted, exactly, install_our_mask, logits, single, step, tiny

import peftops
from peftops.integrations.peft import lora_layers
from peftops.nn import LinearNF4, LoRALinear, checked_norms

pytestmark = pytest.mark.usefixtures("one_thread")


def dora(architecture="llama", dtype=torch.float32, **options):
    """A model whose magnitudes are near the norm, as training leaves them."""
    model = tiny(
        architecture,
        dtype=dtype,
        use_dora=True,
        **options,
    )
    for layer in lora_layers(model).values():
        base = layer.base_layer.weight.float()
        length = (base if architecture == "llama" else base.T).norm(dim=1)
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.data.copy_(length * torch.linspace(0.8, 1.2, len(length)))
    return model


def gains(model):
    """The kept gains, by the name of their module."""
    return {
        name: module.gain
        for name, module in model.named_modules()
        if "gain" in vars(module).get("_buffers", {})
    }


def assert_law(model, **options):
    exact = step(exactly(model))
    same = orders(lambda: step(model, **options))
    patched = peftops.patch(copy.deepcopy(model), strict=True)
    out = step(patched, **options)
    for ours, truth, *draws in zip(out, exact, *same, strict=True):
        assert error(ours, truth) <= chain_bound(draws, truth)
    assert peftops.report(patched).calls == {"fused": len(lora_layers(patched))}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_step(architecture, dtype, p, monkeypatch):
    install_our_mask(monkeypatch)
    assert_law(
        dora(
            architecture,
            dtype,
            lora_dropout=p,
            autocast_adapter_dtype=False,
        )
    )


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_autocast(p, monkeypatch):
    install_our_mask(monkeypatch)
    assert_law(dora(dtype=torch.bfloat16, lora_dropout=p), autocast=torch.bfloat16)


def net(base_class):
    """Two layers under PEFT's DoRA. base_class: "dense", "LinearNF4" or "bitsandbytes"."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))
    if base_class == "bitsandbytes":
        bnb = pytest.importorskip("bitsandbytes")
        for i in (0, 2):
            old = base[i]
            base[i] = bnb.nn.Linear4bit(
                old.in_features,
                old.out_features,
                quant_type="nf4",
                compute_dtype=torch.float32,
            )
            base[i].load_state_dict(old.state_dict())
        base = base.to("cpu")
    model = adapted(base, target_modules=["0", "2"], use_dora=True)
    # Stock PEFT makes no layer over a LinearNF4, but can read its weight.
    if base_class == "LinearNF4":
        for i in ("0", "2"):
            layer = model.base_model.model[int(i)]
            layer.base_layer = LinearNF4.from_linear(layer.base_layer)
            magnitude = layer.lora_magnitude_vector["default"]
            magnitude.weight.data = layer.base_layer.dequantize().norm(dim=1)
    return model


def twenty(model, dtype):
    """Losses, and parameters after twenty steps of SGD."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(70, 64, generator=generator)
    target = torch.randn(70, 32, generator=generator)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.05)
    losses = []
    torch.manual_seed(2)
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x.to(dtype)) - target.to(dtype)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [torch.stack(losses), *(p.detach() for p in parameters)]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("base_class", ["dense", "LinearNF4", "bitsandbytes"])
def test_twenty_steps(base_class, p, monkeypatch):
    install_our_mask(monkeypatch)
    model = net(base_class)
    for layer in lora_layers(model).values():
        layer.lora_dropout["default"] = nn.Dropout(p) if p else nn.Identity()
    exact = twenty(in_double(model), torch.float64)
    patched = peftops.patch(copy.deepcopy(model), strict=True)
    with checked_norms():
        out = twenty(patched, torch.float32)
    same = twenty(model, torch.float32)
    assert error(out, exact) <= bound(same, exact)
    assert out[0][-1] < out[0][0]
    assert set(peftops.report(patched).calls) == {"fused"}
    assert peftops.report(patched).norms == 2 * 21


def in_double(model):
    """Stock PEFT over the dequantized weight."""
    model = copy.deepcopy(model)
    for layer in lora_layers(model).values():
        base = layer.base_layer
        if type(base) is not nn.Linear:
            weight = peft.utils.integrations.dequantize_module_weight(base)
            layer.base_layer = nn.Linear(base.in_features, base.out_features)
            layer.base_layer.weight.data = weight.float()
            layer.base_layer.bias.data = base.bias.data.float()
            layer.base_layer.requires_grad_(False)
    return model.double()


def test_a_checkpoint_is_pefts(tmp_path):
    model = peftops.patch(dora(), strict=True)
    expected = logits(model)
    keys = list(model.state_dict())
    assert keys == list(peftops.unpatch(copy.deepcopy(model)).state_dict())
    model.save_pretrained(tmp_path)
    other = peftops.patch(dora())
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p.mul_(1.5)
    other.load_adapter(tmp_path, "default")
    with checked_norms():
        assert torch.equal(logits(other), expected)


def test_a_trained_base_is_pefts_own():
    """Trained before patch or only since. When it is frozen again, norms are kept again."""
    x = torch.randn(3, 16)
    for late in (False, True):
        model = single(use_dora=True)
        base = model.base_model.model.lin.base_layer
        stock = copy.deepcopy(model)
        model = peftops.patch(model) if late else model
        base.requires_grad_()
        peftops.patch(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        assert torch.equal(model(x), stock(x))
        model(x).sum().backward()
        optimizer.step()
        assert base.weight.grad.any()
        assert set(peftops.report(model).calls) == {"base weight is trained"}
        base.requires_grad_(False)
        peftops.refresh(model)
        with checked_norms():
            assert model(x).isfinite().all()
        assert peftops.report(model).calls["fused"] == 1


def state_of(model):
    """Class and attributes of each module."""
    return {
        name: (type(module), dict(vars(module)))
        for name, module in model.named_modules()
    }


def test_unpatch_leaves_nothing():
    model = dora()
    before = state_of(model)
    buffers = [name for name, _ in model.named_buffers()]
    assert gains(peftops.patch(model, strict=True))
    peftops.unpatch(model)
    assert state_of(model) == before
    assert [name for name, _ in model.named_buffers()] == buffers


def test_another_adapter_after_patch():
    """Each adapter has its own norm."""
    model = peftops.patch(net("dense"))
    x = torch.randn(70, 64)
    results = []
    model.add_adapter(
        "other",
        peft.LoraConfig(
            r=3,
            use_dora=True,
            target_modules=["0", "2"],
            init_lora_weights=False,
        ),
    )
    stock = peftops.unpatch(copy.deepcopy(model))
    for name in ("other", "default", "other"):
        model.set_adapter(name)
        stock.set_adapter(name)
        with checked_norms():
            results.append((model(x), stock(x), exactly(stock)(x.double())))
    out, same, exact = map(list, zip(*results, strict=True))
    assert error(out, exact) <= bound(same, exact)
    assert peftops.report(model).calls == {"fused": 6}


def test_weights_that_are_loaded_from_meta():
    stock = single(use_dora=True)
    x = torch.randn(5, 16)
    patched = peftops.patch(copy.deepcopy(stock).to("meta"))
    patched.load_state_dict(stock.state_dict(), assign=True)
    exact = exactly(stock)(x.double())
    assert error(patched(x), exact) <= bound(stock(x), exact)
    assert peftops.report(patched).calls == {"fused": 1}
    assert len(gains(patched)) == 1


def test_merges():
    model = peftops.patch(dora(), strict=True)
    stock = peftops.unpatch(copy.deepcopy(model))
    truth = logits(exactly(stock))
    before = logits(model)
    merged = copy.deepcopy(model).merge_and_unload()
    expected = stock.merge_and_unload()
    assert error(logits(merged), truth) <= bound(logits(expected), truth)
    model.merge_adapter()
    assert torch.equal(logits(model), logits(merged))
    model.unmerge_adapter()
    with checked_norms():
        assert torch.equal(logits(model), before)
    assert peftops.report(model).calls == {"fused": 28, "merged": 14}


def test_embeddings_and_convolutions_are_pefts_own():
    base = nn.Sequential()
    base.add_module("emb", nn.Embedding(20, 16))
    base.add_module("lin", nn.Linear(16, 24))
    convolution = adapted(
        nn.Sequential(nn.Conv1d(4, 6, 3), nn.Conv2d(1, 2, 1)),
        target_modules=["0"],
        use_dora=True,
    )
    model = adapted(base, target_modules=["emb", "lin"], use_dora=True)
    x = torch.arange(12).view(2, 6)
    expected = model(x)
    image = torch.randn(2, 4, 9)
    got = peftops.patch(model)(x)
    exact = exactly(peftops.unpatch(copy.deepcopy(model)))(x)
    assert error(got, exact) <= bound(expected, exact)
    assert str(peftops.report(model)).startswith("1/2 LoRA layers fused")
    assert peftops.report(model).reasons
    first = convolution.base_model.model[0]
    same = first(image)
    peftops.patch(convolution)
    assert torch.equal(first(image), same)
    assert peftops.report(convolution).fallback == 1


def test_a_magnitude_that_a_trainer_casts():
    """TRL casts adapters over a 4-bit base to bf16. Stock PEFT's magnitude then never moves."""

    def moved(model):
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.to(torch.bfloat16)
        model.to(torch.bfloat16)
        if model is ours:
            peftops.patch(model)
        magnitudes = [p for name, p in model.named_parameters() if "magnitude" in name]
        before = [p.detach().float().clone() for p in magnitudes]
        optimizer = torch.optim.AdamW(magnitudes, 1e-5, weight_decay=0.0)
        for _ in range(5):
            optimizer.zero_grad()
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
        changed = [
            p.detach().float() != b for p, b in zip(magnitudes, before, strict=True)
        ]
        return torch.cat(changed).float().mean()

    stock, ours = dora(), dora()
    assert moved(stock) < 0.05
    assert moved(ours) > 0.95


def test_from_config_and_from_peft():
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_dora=True,
        lora_dropout=0.1,
        init_lora_weights=False,
    )
    torch.manual_seed(5)
    base = nn.Linear(64, 48)
    torch.manual_seed(7)
    theirs = adapted(
        nn.Sequential(copy.deepcopy(base)),
        target_modules=["0"],
        use_dora=True,
        lora_dropout=0.1,
    )
    theirs = theirs.base_model.model[0]
    torch.manual_seed(7)
    ours = LoRALinear.from_config(copy.deepcopy(base), config)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(5, 64)
    shared = LoRALinear.from_peft(theirs.eval())
    exact = copy.deepcopy(theirs).double()(x.double())
    same = theirs(x)
    assert error(shared(x), exact) <= bound(same, exact)
    assert (
        shared.lora_magnitude_vector["default"]
        is theirs.lora_magnitude_vector["default"]
    )
