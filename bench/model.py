"""peftops bench model: a whole model's steps and generation, frozen, with stock PEFT and with peftops.

The model, its text and its steps are those of `peftops demo`.
"""

import copy

from peftops.cli import BadInput, Parser, find_device, need, positive

from . import results
from .__main__ import common, torch_dtype
from .progress import Progress

RANK, TOKENS = 16, 24  # of the adapters; in a generation


def options(argv):
    parser = Parser("peftops bench model", description=__doc__)
    common(parser)
    parser.add_argument("--model", help="as in peftops demo")
    parser.add_argument("--text", metavar="FILE", help="as in peftops demo")
    parser.add_argument("--method", default="lora", help="of peftops demo: lora or qlora")
    parser.add_argument("--rank", type=positive, default=RANK, help="of the adapters")
    return parser.parse_args(argv)


def main(argv=None):
    o = options(argv)
    need("torch", "peft", "transformers", "gguf")
    from peftops.cli.training import METHODS, load_text, refuse_folder

    from . import lora
    from .measure import show, unlawful

    if len(METHODS.get(o.method, ())) != 2:
        able = ", ".join(method for method, labels in METHODS.items() if len(labels) == 2)
        raise BadInput(f"--method must be of {able}, got {o.method!r}")
    device, dtype = find_device(o.device), torch_dtype(o.dtype)
    refuse_folder(o.model), load_text(o.text)
    if wrong := unlawful(lora, dtype, device):
        print(wrong)
        return 1
    folder, why = results.keep(o)
    if why:
        print(f"Results are only shown, since {why}.")
    about = results.describe(device) | {"row": "model", "dtype": o.dtype}
    with Progress() as progress:
        for line in measure(o, dtype, device, progress):
            show(line)
            if folder:
                results.append(folder / f"{results.slug(about['device'])}.jsonl", about | line)
    return 0


def measure(o, dtype, device, progress):
    """A result for each dropout, under autocast as trainers do, and one for a generation of one sequence, without."""
    from peftops.cli import training as t
    from peftops.integrations.peft import report

    from .measure import finish, times
    from .peers import BASE, OURS
    from .timing import Contender

    kinds = dict(zip(("PEFT", OURS), t.METHODS[o.method], strict=True))
    rounds = 3 if o.quick else 9
    base, tokenizer = t.load_model(o.model, dtype, device)
    batch = t.chunks(tokenizer, t.load_text(o.text), device)[: t.SHAPE[0]]
    width, name = base.config.hidden_size, (o.model or "SmolLM2-135M").rpartition("/")[2]
    method = "" if o.method == "lora" else f", {o.method}"
    common = {"layer": f"{name}, all linear layers{method}", "op": "model", "absent": {}}
    drops = (o.dropout,) if o.dropout is not None else (0.0, 0.1)
    for p in progress.track(drops, len(drops), "steps of the model"):
        models = {label: t.build(kind, copy.deepcopy(base), o.rank, p, 0).model for label, kind in kinds.items()}
        calls = {label: step(model, batch, dtype) for label, model in models.items()}
        calls[BASE] = lambda: t.frozen_seconds(base, batch, dtype)
        found = {label: Contender({"step without optimizer": [call]}, device) for label, call in calls.items()}
        about = common | {"shape": (batch.numel(), width, width, o.rank), "dropout": p}
        about["path"] = ", ".join(report(models[OURS]).paths)
        yield finish(about, *times(found, "step without optimizer", rounds, device, modes=("eager",)))
    everyone, kind = models | {BASE: base}, f"generate {TOKENS} tokens"
    found = {label: Contender({kind: [generate(model, batch)]}, device) for label, model in everyone.items()}
    about = common | {"shape": (1, width, width, o.rank), "dropout": 0.0}
    yield finish(about, *times(found, kind, rounds, device, modes=("eager",)))


def step(model, batch, dtype):
    """Forward and backward; gradients start from nothing, as after zero_grad."""
    from peftops.cli.training import forward_backward

    def run():
        forward_backward(model, batch, dtype)
        for parameter in model.parameters():
            parameter.grad = None

    return run


def generate(model, batch):
    """TOKENS tokens, one at a time, after a short prompt."""
    import torch

    model.eval()
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # bitsandbytes' kernel for evaluation, after which none trains
            from bitsandbytes.functional import has_avx512bf16

            layer.support_avx512bf16_for_cpu = has_avx512bf16()
    prompt = batch[:1, :16]
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}

    def run():
        with torch.inference_mode():
            model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **options)

    return run
