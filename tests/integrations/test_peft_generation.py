"""generate(…, adapter_names=…): each sample is continued as its adapter alone would do it."""

import copy
from contextlib import suppress

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from law import bound, error
from mixed import NAMES, TOKENS, exact_of, several, several_in
from tiny import in_4_bits, lora_layers
from transformers import GenerationConfig, LogitsProcessorList
from transformers.models.t5.modeling_t5 import T5Config, T5ForConditionalGeneration

import peftops
from peftops.integrations.peft import mixed as mixed_batch
from peftops.nn import checked_norms

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Adapter name"),
]

NEW = 6  # tokens
GREEDY = {
    "max_new_tokens": NEW,
    "min_new_tokens": NEW,
    "do_sample": False,
    "pad_token_id": 0,
}
WITH_LOGITS = GREEDY | {"output_logits": True, "return_dict_in_generate": True}


def prompt(tokens=TOKENS):
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def generated(model, names, tokens=TOKENS, **more):
    """The sequences, and the logits of every new token (samples, NEW, vocabulary)."""
    options = prompt(tokens) | WITH_LOGITS | more
    out = model.eval().generate(adapter_names=names, **options)
    return out.sequences, torch.stack(out.logits, 1)


def alone(model, names=NAMES, change=None):
    """The same, each sample in a call of its own. change: see `changing`."""
    sequences = []
    logits = []
    for row, name in enumerate(names):
        one = model if change is None else copy.deepcopy(model)
        options = prompt(TOKENS[row : row + 1]) | WITH_LOGITS | changing(one, change)
        if name == "__base__":
            with one.eval().disable_adapter():
                out = one.generate(**options)
        else:
            one.eval().set_adapter(name)
            out = one.generate(**options)
        sequences.append(out.sequences)
        logits.append(torch.stack(out.logits, 1))
    model.set_adapter("default")
    return torch.cat(sequences), torch.cat(logits)


def changing(model, change):
    """Arguments of generate that change each layer of the model after the third new token."""
    seen = []

    @torch.no_grad()
    def processor(input_ids, scores):
        seen.append(0)
        if len(seen) == 3 and change is not None:
            for layer in lora_layers(model):
                change(layer)
        return scores

    return {"logits_processor": LogitsProcessorList([processor])}


@pytest.fixture
def looks(monkeypatch):
    """A list with an entry for each call of a layer that looks at everything."""
    calls = []
    ground_of = mixed_batch.ground_of

    def looked(*args):
        calls.append(args)
        return ground_of(*args)

    monkeypatch.setattr(mixed_batch, "ground_of", looked)
    return calls


@pytest.mark.parametrize("dora", [(), ("default",), ("default", "b", "c")], ids=str)
def test_each_sample_is_continued_by_its_adapter(dora, looks):
    """Only the prompt and the first token look at everything."""
    stock = several(dora)
    ours = peftops.patch(copy.deepcopy(stock))
    exact = alone(exact_of(stock))
    expected = alone(stock)
    assert torch.equal(expected[0], exact[0])
    sequences, logits = generated(ours, NAMES)
    assert torch.equal(sequences, exact[0])
    assert error(logits, exact[1]) <= bound(expected[1], exact[1])
    assert set(peftops.report(ours).calls) == {"fused"}
    assert len(looks) == 2 * len(lora_layers(ours))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits(dtype):
    stock = several_in(dtype)
    ours = peftops.patch(copy.deepcopy(stock))
    sequences, logits = generated(ours, NAMES)
    forced = sequences[:, TOKENS.shape[1] :]
    exact = generated(exact_of(stock), NAMES, **forcing(forced))[1]
    same = generated(stock, NAMES, **forcing(forced))[1]
    assert error(logits.float(), exact) <= bound(same.float(), exact)
    assert set(peftops.report(ours).calls) == {"fused"}


def forcing(tokens):
    """Arguments of generate that let it choose these tokens (samples, NEW)."""
    left = iter(tokens.T)

    def processor(input_ids, scores):
        scores = torch.full_like(scores, float("-inf"))
        return scores.scatter(1, next(left)[:, None], 0)

    return {"logits_processor": LogitsProcessorList([processor])}


def test_over_4_bits():
    stock = several(("c",))
    ours = in_4_bits(stock)
    sequences, logits = generated(peftops.patch(ours), NAMES)
    exact = alone(exact_of(stock))
    assert torch.equal(sequences, exact[0])
    assert error(logits, exact[1]) <= bound(alone(stock)[1], exact[1])


@pytest.mark.parametrize("names", [["c"] * 6, ["__base__"] * 6], ids=str)
def test_one_name(names):
    stock = several()
    ours = peftops.patch(copy.deepcopy(stock))
    sequences, logits = generated(ours, names)
    exact = alone(exact_of(stock), names)
    assert torch.equal(sequences, exact[0])
    if "__base__" in names:
        with stock.eval().disable_adapter():
            expected = generated(stock, None)
        assert torch.equal(logits, expected[1])


def in_kwargs(model, options):
    return options


def in_a_config(model, options):
    return {"generation_config": GenerationConfig(**options)}


def in_the_models_config(model, options):
    for key, value in options.items():
        setattr(model.generation_config, key, value)
    return {}


@pytest.mark.parametrize("told", [in_kwargs, in_a_config, in_the_models_config])
@pytest.mark.parametrize(
    "options, copies",
    [
        ({"num_beams": 3}, 3),
        ({"num_beams": 3, "num_return_sequences": 2}, 3),
        ({"do_sample": True, "num_return_sequences": 2}, 2),
    ],
)
def test_beams_and_returned_sequences(options, copies, told):
    """As PEFT, whose caller repeats the names where it does not."""
    stock = several()
    ours = peftops.patch(copy.deepcopy(stock))
    options = GREEDY | options
    torch.manual_seed(3)
    with_copies = [name for name in NAMES for _ in range(copies)]
    with stock.eval().base_model._enable_peft_forward_hooks(adapter_names=with_copies):
        expected = stock.base_model.model.generate(**prompt(), **options)
    torch.manual_seed(3)
    more = told(ours, options)
    assert torch.equal(
        ours.eval().generate(adapter_names=NAMES, **prompt(), **more), expected
    )
    # a call of the model itself has no copies, whatever its configuration says
    assert ours(input_ids=TOKENS, adapter_names=NAMES).logits.isfinite().all()


def test_an_encoder_sees_each_sample_once():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)
    base = T5ForConditionalGeneration(config)
    lora = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM",
        r=4,
        init_lora_weights=False,
        target_modules=["q", "v", "wi"],
    )
    stock = peft.get_peft_model(base, lora)
    stock.add_adapter("b", lora)
    ours = peftops.patch(copy.deepcopy(stock))
    names = ["b", "default", "__base__", "b", "b", "default"]
    for options in ({}, {"num_beams": 3}):
        expected = stock.eval().generate(
            adapter_names=names, **prompt(), **GREEDY | options
        )
        out = ours.eval().generate(adapter_names=names, **prompt(), **GREEDY | options)
        assert torch.equal(out, expected)


def added(layer):
    if "b" in layer.lora_A:
        layer.lora_A["b"].weight.add_(0.3)


def swapped(layer):
    layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data + 0.3


def replaced(layer):
    weight = layer.lora_A["default"].weight
    layer.lora_A["default"].weight = nn.Parameter(weight.detach() * 1.5)


def aliased(layer):
    """Another parameter, in the same memory and of the same version."""
    weight = layer.lora_A["default"].weight
    weight.data.mul_(1.5)
    other = nn.Parameter(weight.data)
    while other._version < weight._version:
        other.mul_(1)
    assert other._version == weight._version
    layer.lora_A["default"].weight = other


def lengthened(layer):
    for magnitude in layer.lora_magnitude_vector.values():
        magnitude.weight.mul_(1.2)


def rebased(layer):
    layer.base_layer.weight.mul_(1.1)


def on_another_base(layer):
    weight = layer.base_layer.weight.detach() * 1.1
    layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)


CHANGES = added, swapped, replaced, aliased, lengthened, rebased, on_another_base


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dora", [(), ("default", "b")], ids=str)
def test_weights_that_change_between_two_tokens(change, dora):
    if change is lengthened and not dora:
        pytest.skip("LoRA has no magnitudes")
    if change is aliased and dora:
        pytest.skip("gains are kept by addresses and versions alone, see nn/dora.py")
    stock = several(dora)
    exact = alone(exact_of(stock), change=change)[1]
    same = alone(stock, change=change)[1]
    unchanged = alone(exact_of(stock))[1]
    ours = peftops.patch(stock)
    out = generated(ours, NAMES, **changing(ours, change))[1]
    assert error(out, exact) <= bound(same, exact)
    assert error(unchanged, exact) > 1e-3


def doubled(layer):
    if "b" in layer.lora_A:
        layer.lora_A["b"].weight.data.mul_(2)  # no version shows it


def test_checked_norms_look_at_every_token():
    ours = peftops.patch(several(("default", "b")))
    with checked_norms(), pytest.raises(RuntimeError, match="other weights"):
        generated(ours, NAMES, **changing(ours, doubled))


def test_nothing_is_left():
    ours = peftops.patch(several()).eval()
    before = {
        module: (len(module._forward_pre_hooks), set(vars(module)))
        for module in ours.modules()
    }

    class Stop(Exception):
        pass

    def stop(input_ids, scores):
        raise Stop

    for names, processors in ((NAMES, []), (NAMES, [stop]), (NAMES[:5], [])):
        more = {"logits_processor": LogitsProcessorList(processors)}
        with suppress(Stop, ValueError):
            ours.generate(adapter_names=names, num_beams=2, **prompt(), **GREEDY | more)
        assert mixed_batch.TOLD == {}
        for module, (hooks, state) in before.items():
            assert len(module._forward_pre_hooks) == hooks
            assert set(vars(module)) <= state | {"_peftops_calls"}
    with pytest.raises(
        ValueError, match="Length of `adapter_names` should be the same"
    ):
        generated(ours, NAMES[:5])
    with pytest.raises(TypeError, match="Got adapter names of type <class 'str'>"):
        generated(ours, "default")
