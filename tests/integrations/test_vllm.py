"""vLLM with the plugin: what its users see is what vLLM gives without it.

It needs vLLM, which has a virtual environment of its own; docs/serving.md says how to make one.
Each engine has a process of its own.
"""

import asyncio
import os
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from law import chain_bound, error, orders
from tree import ROOT
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from peftops.integrations.vllm import load_lora, load_lora_async
from peftops.integrations.vllm.plugin import chosen

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for functions that look into workers
}
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {  # what makes each one unlike the others
    "plain": {"r": 8, "target_modules": ALL},
    "small": {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "uneven": {
        "r": 4,
        "target_modules": ALL,
        "rank_pattern": {"k_proj": 12, "up_proj": 1},
        "alpha_pattern": {"o_proj": 3},
        "use_rslora": True,
    },
    "head": {"r": 5, "target_modules": ["q_proj", "lm_head", "embed_tokens"]},
}
LORA = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 16, "max_cpu_loras": 3}
PLUGIN = {"additional_config": {"peftops": True}}
BATCH = ["plain", None, "uneven", "small", None, "plain"]
HEADS = ["head", "small", None, "head"]
NEW = 6


def lora(name, model):
    """The model with an adapter of numbers that are far from 0."""
    torch.manual_seed(sum(map(ord, name)))
    config = peft.LoraConfig(lora_alpha=16, **ADAPTERS[name])
    made = peft.get_peft_model(model, config).requires_grad_(False)
    for key, t in made.named_parameters():
        if "lora_" in key:
            t.normal_(std=0.2)
    return made


@pytest.fixture(scope="module")
def folder():
    """A model, and each of ADAPTERS, as files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(tie_word_embeddings=False, **SHAPE)
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
        for adapter in ADAPTERS:
            lora(adapter, stock(folder)).save_pretrained(
                folder / adapter, save_embedding_layers=False
            )
        yield folder


def stock(folder):
    return transformers.LlamaForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32
    )


@contextmanager
def environment():
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def arguments(folder, **more):
    return {
        "model": str(folder / "model"),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 64,
        "max_num_seqs": 8,
        **LORA,
        **more,
    }


@pytest.fixture(scope="module")
def engine(folder):
    """A function that returns the engine with such arguments. It is made once."""
    made = {}

    def get(**more):
        key = str(more)
        if key not in made:
            made[key] = vllm.LLM(**arguments(folder, **more))
        return made[key]

    with environment():
        yield get
        for llm in made.values():
            llm.llm_engine.engine_core.shutdown()


def prompts(count):
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(3, 320, (4 + 3 * i,), generator=generator).tolist()
        for i in range(count)
    ]


def asked_for(folder, names):
    """The requests for adapters from files; None for the base alone."""
    numbers = {name: number for number, name in enumerate(ADAPTERS, 1)}
    return [
        name and LoRARequest(name, numbers[name], str(folder / name)) for name in names
    ]


def generate(llm, requests):
    """The tokens of each prompt, and the log probabilities of the first ones."""
    asked = SamplingParams(
        max_tokens=NEW, temperature=0, ignore_eos=True, logprobs=8, detokenize=False
    )
    texts = [{"prompt_token_ids": ids} for ids in prompts(len(requests))]
    outputs = llm.generate(texts, asked, lora_request=requests, use_tqdm=False)
    tokens = [list(out.outputs[0].token_ids) for out in outputs]
    first = [
        torch.tensor(
            [out.outputs[0].logprobs[at][token].logprob for at, token in enumerate(ids)]
        )
        for out, ids in zip(outputs, tokens, strict=True)
    ]
    return tokens, torch.stack(first)


def expected(
    folder,
    name,
    ids,
    tokens,
    dtype=torch.float64,
):
    """The log probabilities that transformers and PEFT give to these tokens."""
    model = stock(folder).to(dtype)
    if name:
        model = peft.PeftModel.from_pretrained(model, folder / name).to(dtype)
    with torch.no_grad():
        logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    assert logits.argmax(-1).tolist() == tokens, name
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def served_layers(worker):
    """How many layers of a worker the plugin serves, by class."""
    layers = worker.model_runner.lora_manager._adapter_manager.modules.values()
    names = [type(layer.punica_wrapper).__name__ for layer in layers]
    return {name: names.count(name) for name in names}


def judge(
    folder,
    names,
    out,
):
    """Each prompt has what PEFT gives with its adapter alone."""
    for name, ids, tokens, first in zip(names, prompts(len(names)), *out, strict=True):
        exact = expected(folder, name, ids, tokens)

        def single(
            name=name,
            ids=ids,
            tokens=tokens,
        ):
            return expected(folder, name, ids, tokens, torch.float32)

        assert error(first, exact) <= chain_bound(orders(single), exact), name


@pytest.mark.parametrize(
    "names", [BATCH, HEADS, [None] * 4], ids=["mixed", "heads", "base"]
)
def test_each_prompt_has_its_adapter(
    engine,
    folder,
    names,
):
    judge(folder, names, generate(engine(**PLUGIN), asked_for(folder, names)))


@pytest.mark.parametrize("name", ADAPTERS)
def test_tokens_are_those_of_vllm_without_the_plugin(
    engine,
    folder,
    name,
):
    """For batches that it gets right: on a CPU, rows without an adapter have the last slot's."""
    requests = asked_for(folder, [name, "small", name])
    theirs, ours = (generate(engine(**more), requests) for more in ({}, PLUGIN))
    assert ours[0] == theirs[0]


def test_only_an_engine_that_asks_for_it_has_it(engine):
    served = {"Linear": 8, "Embedding": 1, "Head": 1}
    assert engine(**PLUGIN).collective_rpc(served_layers) == [served]
    assert engine().collective_rpc(served_layers) == [{"PunicaWrapperCPU": 10}]


def test_slots_change_hands(engine, folder):
    """More adapters than slots: ranks and pages are those of who is there."""
    for name in [*ADAPTERS, *reversed(ADAPTERS), "plain", "small"]:
        names = [name, None]
        judge(folder, names, generate(engine(**PLUGIN), asked_for(folder, names)))


def tensors_of(folder, name):
    model = lora(name, stock(folder))
    return peft.get_peft_model_state_dict(model), model.peft_config["default"]


def test_an_adapter_from_memory(engine, folder):
    llm = engine(**PLUGIN)
    names = ["uneven", None, "plain"]
    before = generate(llm, asked_for(folder, names))
    requests = [
        name and load_lora(llm, name, *tensors_of(folder, name)) for name in names
    ]
    assert generate(llm, requests)[0] == before[0]
    for used in filter(None, requests):
        assert llm.llm_engine.remove_lora(used.lora_int_id)


def test_versions_live_side_by_side(engine, folder):
    """Also after vLLM has dropped its copies, and never changed by how vLLM scales them."""
    llm = engine(**PLUGIN)
    tensors, config = tensors_of(folder, "plain")
    kept = {key: t.clone() for key, t in tensors.items()}
    old = load_lora(llm, "policy", tensors, config)
    first = generate(llm, [old])
    new = load_lora(llm, "policy", {key: 2 * t for key, t in tensors.items()}, config)
    assert (old.lora_name, new.lora_name) != (new.lora_name, old.lora_name)
    changed = generate(llm, [new])
    assert changed[0] != first[0]
    for name in ADAPTERS:
        generate(llm, asked_for(folder, [name]))
    assert generate(llm, [old, new, old])[0][0] == first[0][0]
    assert generate(llm, [new])[0] == changed[0]
    assert all(map(torch.equal, kept.values(), tensors.values()))
    for used in (old, new):
        llm.llm_engine.remove_lora(used.lora_int_id)


def test_an_adapter_that_is_refused_changes_nothing(engine, folder):
    llm = engine(**PLUGIN)
    tensors, config = tensors_of(folder, "plain")
    good = generate(llm, asked_for(folder, ["plain", None]))
    ids = llm.llm_engine.list_loras()
    with pytest.raises(Exception, match="DoRA"):
        load_lora(llm, "dora", tensors, {**config.to_dict(), "use_dora": True})
    key = next(iter(tensors))
    with pytest.raises(
        Exception, match=r"odd@.*q_proj.lora_A must be \(8, 96\), got \(8, 50\)"
    ):
        load_lora(llm, "odd", {**tensors, key: torch.ones(8, 50)}, config)
    assert llm.llm_engine.list_loras() == ids
    assert generate(llm, asked_for(folder, ["plain", None]))[0] == good[0]


def test_bad_arguments(engine, folder):
    config = SimpleNamespace(additional_config={"peftops": "yes"})
    with pytest.raises(ValueError, match="peftops must be true or false, got 'yes'"):
        chosen(config)
    tensors, config = tensors_of(folder, "small")
    with pytest.raises(
        ValueError, match=r'made with additional_config=\{"peftops": True\}'
    ):
        load_lora(engine(), "a", tensors, config)
    llm = engine(**PLUGIN)
    with pytest.raises(
        TypeError, match="load_lora: config must be a LoraConfig or a dict, got str"
    ):
        load_lora(llm, "a", tensors, "small")
    with pytest.raises(
        TypeError, match="load_lora: tensors must be a dict of tensors, got list"
    ):
        load_lora(llm, "a", [1], config)


def test_the_documented_example(engine, folder):
    page = (ROOT / "docs" / "serving.md").read_text()
    (block,) = re.findall(r"^```py\n(.*?)^```$", page, re.M | re.S)
    names = {
        "llm": engine(**PLUGIN),
        "policy": lora("plain", stock(folder)),
        "prompts": [{"prompt_token_ids": ids} for ids in prompts(2)],
    }
    exec(block, names)
    assert len(names["outputs"]) == 2


def test_bf16(engine, folder):
    out = generate(engine(dtype="bfloat16", **PLUGIN), asked_for(folder, BATCH))
    for name, ids, tokens, first in zip(BATCH, prompts(len(BATCH)), *out, strict=True):
        exact = expected(folder, name, ids, tokens[:1])
        assert error(first[:1], exact) <= 0.02, name


def test_an_async_engine(folder):
    async def run():
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**arguments(folder, **PLUGIN))
        )
        try:
            used = await load_lora_async(engine, "plain", *tensors_of(folder, "plain"))
            asked = SamplingParams(
                max_tokens=NEW, temperature=0, ignore_eos=True, detokenize=False
            )
            ids = prompts(1)[0]
            prompt = {"prompt_token_ids": ids}
            async for out in engine.generate(prompt, asked, "1", lora_request=used):
                last = out
            return ids, list(last.outputs[0].token_ids)
        finally:
            engine.shutdown()

    with environment():
        ids, tokens = asyncio.run(run())
    expected(folder, "plain", ids, tokens)
