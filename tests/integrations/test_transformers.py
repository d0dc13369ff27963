"""transformers with enable() reads and writes bitsandbytes' checkpoints, without it too."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import isa
import pytest
import ranks
import torch
from law import bound, error
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import peftops
from peftops.integrations.transformers import disable, enable, enable_nf4
from peftops.integrations.transformers.nf4 import METHOD
from peftops.nn import LinearNF4

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.arange(24).view(2, 12) * 7 % 64


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of dense models: a Llama in bf16, and in fp32 a GPT-2, whose layers are Conv1D."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.LlamaConfig(**sizes, vocab_size=64, attention_bias=True)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "llama")
    still = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    config = transformers.GPT2Config(
        n_embd=64, n_layer=1, n_head=2, vocab_size=64, n_positions=32, **still
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    return folder


def config(double=True, quant_type="nf4", **options):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        **options,
    )


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def files(folder):
    """The bytes of weights and configs, by name."""
    return {
        file.name: file.read_bytes()
        for file in Path(folder).glob("*")
        if file.suffix in (".safetensors", ".json")
    }


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


CONFIGS = [
    {},
    {"double": False},
    {"quant_type": "fp4"},
    {"bnb_4bit_compute_dtype": torch.bfloat16},
    {"bnb_4bit_quant_storage": torch.bfloat16},
    {"llm_int8_skip_modules": ["lm_head", "q_proj"]},
]


@pytest.mark.parametrize("options", CONFIGS, ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_makes_loads_and_saves_what_bitsandbytes_does(
    architecture, options, saved, tmp_path
):
    pytest.importorskip("bitsandbytes")
    source = saved / architecture
    dtype = torch.bfloat16 if architecture == "llama" else torch.float32
    theirs = load(source, quantization_config=config(**options), dtype=dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    with enable():
        ours = load(source, quantization_config=config(**options), dtype=dtype)
        again = load(tmp_path / "theirs")
        for name, model in (("ours", ours), ("again", again)):
            model.save_pretrained(tmp_path / name)
            assert files(tmp_path / name) == files(tmp_path / "theirs")
        assert load(tmp_path / "again").is_loaded_in_4bit
    quantized = {
        name for name, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"
    }
    assert quantized
    for model in (ours, again):
        packed = {name for name, m in model.named_modules() if isinstance(m, LinearNF4)}
        assert packed == quantized
        assert model.is_loaded_in_4bit
        assert model.num_parameters() == theirs.num_parameters()
    # In eval mode, bitsandbytes may repack its weights for the CPU and round their scales.
    theirs.train()
    out = [
        ours.train()(input_ids=TOKENS).logits,
        again.train()(input_ids=TOKENS).logits,
    ]
    same = theirs(input_ids=TOKENS).logits
    exact = copy.deepcopy(ours).dequantize().double()(input_ids=TOKENS).logits
    assert all(error(t, exact) <= bound(same, exact) for t in out)


ALONE = """
import sys
sys.modules["bitsandbytes"] = None  # so that importing it fails
import torch, peft
from contextlib import nullcontext
from pathlib import Path
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.utils import is_bitsandbytes_available
import peftops
from peftops.integrations.transformers import enable
from peftops.nn import LinearNF4

assert not is_bitsandbytes_available()
source, stored, out = map(Path, sys.argv[1:4])
tokens = torch.arange(24).view(2, 12) * 7 % 64
with peftops.backend(sys.argv[4]) if len(sys.argv) > 4 else nullcontext():
    enable()
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    load = AutoModelForCausalLM.from_pretrained
    made = load(source, quantization_config=config, dtype=torch.bfloat16)
    made.save_pretrained(out / "made")
    model = load(stored if stored.exists() else out / "made")
    model.save_pretrained(out / "saved")
    torch.save(model(input_ids=tokens).logits, out / "logits.pt")
    model = peft.prepare_model_for_kbit_training(model)
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    adapted = [m for m in model.modules() if isinstance(m, peft.tuners.lora.layer.Linear)]
    assert len(adapted) == 14 and all(type(m.base_layer) is LinearNF4 for m in adapted)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    peftops.patch(model, strict=True)
    before = {n: p.clone() for n, p in model.named_parameters()}
    data = [{"input_ids": tokens[0], "labels": tokens[0]}] * 4
    options = {"use_cpu": True, "bf16": True, "gradient_checkpointing": True, "max_steps": 2}
    options |= {"report_to": [], "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(str(out / "trainer"), **options)
    trainer = Trainer(model, arguments, train_dataset=data)
    loss = trainer.train().training_loss
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert loss == loss and changed and all("lora_" in n for n in changed)
    model.save_pretrained(out / "adapter")
    assert peftops.report(model).fused == 14, str(peftops.report(model))
assert sys.modules["bitsandbytes"] is None
"""


def test_does_without_bitsandbytes(saved, tmp_path):
    stored = tmp_path / "theirs"
    try:
        import bitsandbytes  # noqa: F401

        load(
            saved / "llama", quantization_config=config(), dtype=torch.bfloat16
        ).save_pretrained(stored)
    except ImportError:
        pass
    script = tmp_path / "alone.py"
    forced = peftops.backends.forced()
    script.write_text(isa.again() + ALONE)
    command = [
        sys.executable,
        str(script),
        str(saved / "llama"),
        str(stored),
        str(tmp_path),
        *filter(None, [forced]),
    ]
    environment = os.environ | {"PYTHONPATH": ranks.python_path()}
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert files(tmp_path / "saved") == files(
        stored if stored.exists() else tmp_path / "made"
    )
    with enable():
        assert torch.equal(
            logits(load(tmp_path / "saved")), torch.load(tmp_path / "logits.pt")
        )


def test_undoes_itself():
    before = AUTO_QUANTIZER_MAPPING[METHOD]
    with enable():
        assert AUTO_QUANTIZER_MAPPING[METHOD] is not before
        inner = enable()
        inner.undo()
        assert AUTO_QUANTIZER_MAPPING[METHOD] is not before
    assert AUTO_QUANTIZER_MAPPING[METHOD] is before
    with pytest.raises(KeyError), enable():
        raise KeyError
    assert AUTO_QUANTIZER_MAPPING[METHOD] is before
    enable()
    enable(experts=True)
    disable()
    assert AUTO_QUANTIZER_MAPPING[METHOD] is before


def test_the_old_name_answers_with_the_new():
    before = AUTO_QUANTIZER_MAPPING[METHOD]
    with (
        pytest.warns(FutureWarning, match="enable_nf4 is now called enable"),
        enable_nf4(),
    ):
        assert AUTO_QUANTIZER_MAPPING[METHOD] is not before
    assert AUTO_QUANTIZER_MAPPING[METHOD] is before


def test_names_a_checkpoint_that_is_broken(saved, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    with enable():
        load(
            saved / "llama", quantization_config=config(), dtype=torch.bfloat16
        ).save_pretrained(tmp_path)
        tensors = safetensors.load_file(tmp_path / "model.safetensors")
        del tensors["model.layers.0.mlp.up_proj.weight.absmax"]
        safetensors.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(RuntimeError):
            load(tmp_path)


def test_dequantizes(saved):
    with enable():
        model = load(
            saved / "llama", quantization_config=config(), dtype=torch.bfloat16
        )
    expected = logits(model)
    plain = model.dequantize()
    assert not any(isinstance(m, LinearNF4) for m in plain.modules())
    assert not plain.is_loaded_in_4bit
    out = logits(plain)
    exact = logits(copy.deepcopy(plain).double())
    assert error(expected, exact) <= bound(out, exact)
    assert plain.num_parameters() == load(saved / "llama").num_parameters()


def test_copies_and_counts(saved):
    with enable():
        model = load(
            saved / "llama", quantization_config=config(), dtype=torch.bfloat16
        )
    other = copy.deepcopy(model)
    nn.init.zeros_(other.lm_head.weight)
    assert logits(model).any()
    assert not logits(other).any()
    other.lm_head = nn.Linear(64, 2)
    assert model.num_parameters() == load(saved / "llama").num_parameters()
    assert other.num_parameters() != model.num_parameters()
    assert json.loads(model.config.to_json_string())["quantization_config"][
        "load_in_4bit"
    ]


@pytest.mark.parametrize("device", ["disk", "cpu"])
def test_modules_that_come_for_a_call_are_refused_on_loading(saved, tmp_path, device):
    """As bitsandbytes does. If all modules are on the CPU, none is moved for a call."""
    device_map = (
        {"model": "cpu", "lm_head": "disk"} if device == "disk" else {"": "cpu"}
    )
    options = {
        "quantization_config": config(),
        "device_map": device_map,
        "offload_folder": str(tmp_path),
    }
    with enable():
        if device == "cpu":
            model = load(saved / "llama", **options)
            assert isinstance(model.model.layers[0].mlp.up_proj, LinearNF4)
            return
        with pytest.raises(
            ValueError,
            match=r"load_in_4bit: device_map must leave no .*, got model on cpu \(2 of 2\)",
        ):
            load(saved / "llama", **options)


def test_modules_on_disk_may_stay_as_they_are(saved, tmp_path):
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
    }
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    options = {
        "quantization_config": config(llm_int8_enable_fp32_cpu_offload=True),
        "offload_folder": str(tmp_path),
    }
    with enable():
        model = load(saved / "llama", device_map=places, **options)
    assert not any(isinstance(module, LinearNF4) for module in model.modules())
    assert logits(model).isfinite().all()


def test_a_weight_that_is_not_finite_is_named(saved, tmp_path, caplog):
    model = load(saved / "llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4:7] = float("nan")
    model.save_pretrained(tmp_path)
    # A command of another test may have lowered it.
    transformers.utils.logging.set_verbosity_warning()
    with enable(), pytest.raises(RuntimeError) as caught:
        load(tmp_path, quantization_config=config())
    message = (
        "load_in_4bit: model.layers.1.mlp.up_proj.weight: nf4: w must be finite, "
        "got 3 NaN and 0 infinite of 8192"
    )
    assert message in caplog.text + str(caught.value)


def test_a_model_that_divides_its_weights_in_place_is_refused(tmp_path):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "context_length": 16,
    }
    transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes)).save_pretrained(
        tmp_path
    )
    with (
        enable(),
        pytest.raises(
            ValueError, match="load_in_4bit: rwkv models cannot be quantized"
        ),
    ):
        load(tmp_path, quantization_config=config())
