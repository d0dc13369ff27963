"""peftops bench model: a whole model's steps and generation, frozen, with stock PEFT and with peftops.

DoRA stands beside our LoRA too, and under dropout in the dropout_mode that PEFT has not. With --fuse, memory is shown.
The model, its text and its steps are those of `peftops demo`.
"""

import copy

from peftops.cli import BadInput, Parser, find_device, need, positive

from . import results
from .__main__ import common, torch_dtype
from .progress import Progress

RANK, TOKENS = 16, 24  # of the adapters; in a generation
STEP = "step without optimizer"


def options(argv):
    parser = Parser("peftops bench model", description=__doc__)
    common(parser)
    parser.add_argument("--model", help="as in peftops demo")
    parser.add_argument("--text", metavar="FILE", help="as in peftops demo")
    parser.add_argument(
        "--method", default="lora", help="of peftops demo: lora, qlora, dora or qdora"
    )
    parser.add_argument("--rank", type=positive, default=RANK, help="of the adapters")
    parser.add_argument(
        "--fuse", choices=("mlp",), help="beside ours also with peft.mlp.fuse, experimental"
    )
    return parser.parse_args(argv)


def main(argv=None):
    o = options(argv)
    need("torch", "peft", "transformers", "gguf")
    from peftops.cli.demo_contenders import METHODS, load_text, refuse_folder

    from . import dora, lora
    from .measure import show, unlawful

    if len(METHODS.get(o.method, ())) != 2:
        able = ", ".join(method for method, labels in METHODS.items() if len(labels) == 2)
        raise BadInput(f"--method must be of {able}, got {o.method!r}")
    device, dtype = find_device(o.device), torch_dtype(o.dtype)
    refuse_folder(o.model), load_text(o.text)
    for row in (lora, dora) if "dora" in o.method else (lora,):
        if wrong := unlawful(row, dtype, device):
            print(wrong)
            return 1
    folder, why = results.keep(o)
    if why:
        print(f"Results are only shown, since {why}.")
    about = results.describe(device) | {"row": "model", "dtype": o.dtype}
    with Progress() as progress:
        for line in measure(o, dtype, device, progress):
            show(line)
            for title, key in (
                (("at most", "peak_mb"), ("kept for backward", "saved_mb")) if o.fuse else ()
            ):
                sizes = ", ".join(
                    f"{size:.0f} MB {label}" for label, size in line.get(key, {}).items()
                )
                if sizes:
                    print(f"  {title}: {sizes}", flush=True)
            if folder:
                results.append(folder / f"{results.slug(about['device'])}.jsonl", about | line)
    return 0


def measure(o, dtype, device, progress):
    """A result for each dropout, under autocast as trainers do, and one for a generation of one sequence, without."""
    from peftops.cli import demo_contenders as t
    from peftops.integrations.peft import mlp, report

    from .dora import ANOTHER
    from .measure import finish, times
    from .peers import BASE, FUSE, OURS
    from .timing import Contender

    kinds, rounds = contenders(o.method), 3 if o.quick else 9
    base, tokenizer = t.load_model(o.model, dtype, device)
    batch = t.chunks(tokenizer, t.load_text(o.text), device)[: t.SHAPE[0]]
    width, name = base.config.hidden_size, (o.model or "SmolLM2-135M").rpartition("/")[2]
    layer = f"{name}, all linear layers{'' if o.method == 'lora' else f', {o.method}'}"

    def raced(calls, kind, rows, **about):
        found = {label: Contender({kind: [call]}, device) for label, call in calls.items()}
        line = {
            "layer": layer,
            "op": "model",
            "absent": dict(missing),
            "shape": (rows, width, width, o.rank),
        } | about
        return finish(line, *times(found, kind, rounds, device, modes=("eager",)))

    def steps(models, **about):
        calls = {label: step(model, batch, dtype) for label, model in models.items()}
        if FUSE in models:
            about["saved_mb"] = {
                label: round(saved(models[label], run) / 1e6, 2) for label, run in calls.items()
            }
        calls[BASE] = lambda: t.frozen_seconds(base, batch, dtype)
        return raced(calls, STEP, batch.numel(), **about)

    missing = t.absent(kinds.values())
    kinds = {label: kind for label, kind in kinds.items() if kind not in missing}
    drops = (o.dropout,) if o.dropout is not None else (0.0, 0.1)
    for p in progress.track(drops, len(drops), "steps of the model"):
        models = {
            label: t.build(kind, copy.deepcopy(base), o.rank, p, 0).model
            for label, kind in kinds.items()
        }
        if o.fuse:
            models[FUSE] = mlp.fuse(copy.deepcopy(models[OURS]))
        about = {"dropout": p, "path": ", ".join(report(models[OURS]).paths)}
        yield steps(models, **about)
        if p and kinds[OURS] in t.DORA:
            other = {label: model for label, model in models.items() if label.startswith(OURS)}
            other[OURS] = undropped_base(copy.deepcopy(models[OURS]))
            yield steps(other, layer=layer + ANOTHER, **about)
    calls = {label: generate(model, batch) for label, model in (models | {BASE: base}).items()}
    yield raced(calls, f"generate {TOKENS} tokens", 1, dropout=0.0)


def contenders(method):
    """{label: kind}: stock, ours, and beside our DoRA our LoRA."""
    from peftops.cli.demo_contenders import METHODS

    from .nf4 import PEER
    from .peers import LORA, OURS

    plain = method.replace("dora", "lora")
    kinds = {"PEFT" if plain == "lora" else PEER: METHODS[method][0], OURS: METHODS[method][1]}
    return kinds if plain == method else kinds | {LORA: METHODS[plain][1]}


def undropped_base(model):
    """In place, DoRA layers as nn.LoRALinear in dropout_mode "lora"."""
    from peftops.integrations.peft import lora_layers
    from peftops.nn import LoRALinear

    for name, layer in lora_layers(model).items():
        own = LoRALinear.from_peft(layer)
        own.dropout_mode = "lora"
        model.set_submodule(name, own)
    return model


def step(model, batch, dtype):
    """Forward and backward; gradients start from nothing, as after zero_grad."""
    from peftops.cli.demo_contenders import forward_backward

    def run():
        forward_backward(model, batch, dtype)
        for parameter in model.parameters():
            parameter.grad = None

    return run


def saved(model, run):
    """Bytes of distinct memory, the model's own aside, that are kept for backward in this run of it."""
    import torch

    own, kept = (
        {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())},
        {},
    )

    def pack(t):
        kept.setdefault(
            t.untyped_storage().data_ptr(), t
        )  # alive, so that no other takes its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(t.untyped_storage().nbytes() for start, t in kept.items() if start not in own)


def generate(model, batch):
    """TOKENS tokens, one at a time, after a short prompt."""
    import torch

    model.eval()
    for layer in model.modules():
        if hasattr(
            layer, "support_avx512bf16_for_cpu"
        ):  # bitsandbytes' kernel for evaluation, after which none trains
            from bitsandbytes.functional import has_avx512bf16

            layer.support_avx512bf16_for_cpu = has_avx512bf16()
    prompt = batch[:1, :16]
    options = {
        "max_new_tokens": TOKENS,
        "min_new_tokens": TOKENS,
        "do_sample": False,
        "pad_token_id": 0,
    }

    def run():
        with torch.inference_mode():
            model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                use_cache=True,
                **options,
            )

    return run
