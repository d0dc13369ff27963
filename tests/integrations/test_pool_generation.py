"""model.generate(…, adapter_names=…) with an AdapterPool: each prompt has its adapter."""

import copy
import threading

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from law import bound, error
from mixed import NAMES, TOKENS, exact_of, several, several_in
from test_peft_generation import (
    GREEDY,
    NEW,
    WITH_LOGITS,
    forcing,
    generated,
    in_a_config,
    in_kwargs,
    in_the_models_config,
    prompt,
)
from test_peft_generation import alone as generated_alone
from test_pool_models import pooled
from transformers.models.t5.modeling_t5 import T5Config, T5ForConditionalGeneration

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Adapter name"),
]


@pytest.mark.parametrize(
    "dora",
    [
        (),
        ("b", "default"),
    ],
    ids=str,
)
def test_generate(dora, tmp_path):
    stock = several(dora)
    pool, base = pooled(stock, tmp_path)
    sequences, logits = generated(base, NAMES)
    exact = generated_alone(exact_of(stock), NAMES)
    assert torch.equal(sequences, exact[0])
    assert error(logits, exact[1]) <= bound(generated_alone(stock, NAMES)[1], exact[1])
    assert pool.stats().used == 0


@pytest.mark.parametrize(
    "told",
    [
        in_kwargs,
        in_a_config,
        in_the_models_config,
    ],
)
@pytest.mark.parametrize(
    "outside",
    [False, True],
    ids=[
        "argument",
        "use",
    ],
)
def test_beams_have_the_adapter_of_their_sample(
    told,
    outside,
    tmp_path,
):
    stock = several()
    pool, base = pooled(stock, tmp_path)
    options = {"num_beams": 3, "num_return_sequences": 2}
    expected = []
    for row, name in enumerate(NAMES):
        one = copy.deepcopy(stock).eval()
        more = prompt(TOKENS[row : row + 1]) | GREEDY | told(one, options)
        if name == "__base__":
            with one.disable_adapter():
                expected.append(one.generate(**more))
        else:
            one.set_adapter(name)
            expected.append(one.generate(**more))
    more = prompt() | GREEDY | told(base, options)
    if outside:
        with pool.use(NAMES):
            tokens = base.generate(**more)
    else:
        tokens = base.generate(adapter_names=NAMES, **more)
    assert torch.equal(tokens, torch.cat(expected))


def test_an_encoder_sees_each_sample_once(tmp_path):
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2
    )
    torch.manual_seed(0)
    config.decoder_start_token_id = 0
    stock = peft.get_peft_model(
        T5ForConditionalGeneration(config),
        peft.LoraConfig(target_modules="all-linear", init_lora_weights=False),
    )
    _, base = pooled(stock, tmp_path)
    names = ["default", "__base__", "default", "default", "__base__", "default"]
    options = prompt() | {"max_new_tokens": NEW, "num_beams": 2, "do_sample": False}
    tokens = base.generate(adapter_names=names, **options)
    stock.eval()
    with_adapter = stock.generate(**options)
    with stock.disable_adapter():
        without = stock.generate(**options)
    for row, name in enumerate(names):
        expected = without if name == "__base__" else with_adapter
        length = min(tokens.shape[1], expected.shape[1])
        assert torch.equal(tokens[row, :length], expected[row, :length])


def test_threads_generate_with_their_own_names(tmp_path):
    stock = several()
    _, base = pooled(stock, tmp_path)
    expected = {}
    for name in ("default", "b", "c", "__base__"):
        expected[name] = generated_alone(exact_of(stock), [name] * 6)[0]
    wrong = []

    def generate(name):
        for _ in range(4):
            tokens = base.generate(adapter_names=[name] * 6, **prompt(), **GREEDY)
            if not torch.equal(tokens, expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=generate, args=[name]) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    "options",
    [{}, WITH_LOGITS],
    ids=[
        "plain",
        "logits",
    ],
)
def test_generate_without_names_is_the_bases(options, tmp_path):
    pool, base = pooled(several(), tmp_path)
    options = prompt() | GREEDY | options
    expected = base.generate(**options)
    with pool.use(["__base__"] * 6):
        tokens = base.generate(**options)
    if options.get("return_dict_in_generate"):
        expected, tokens = expected.sequences, tokens.sequences
    assert torch.equal(tokens, expected)


def test_16_bits_generate(tmp_path):
    stock = several_in(torch.bfloat16)
    _, base = pooled(stock, tmp_path)
    sequences, logits = generated(base, NAMES)
    forced = sequences[:, TOKENS.shape[1] :]
    stock.eval()
    exact = generated(exact_of(stock), NAMES, **forcing(forced))[1]
    same = generated(stock, NAMES, **forcing(forced))[1]
    assert error(logits.float(), exact) <= bound(same.float(), exact)
