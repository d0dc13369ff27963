"""peftops bench model: steps and generation of a whole model: frozen, with PEFT, with peftops.

DoRA also stands beside our LoRA, and under dropout it is measured in the dropout_mode that PEFT
does not have. With --fuse, memory is shown. The model, its text and its steps are those of
`peftops demo`.
"""

import copy
from functools import partial

from peftops.cli import BadInput, Parser, find_device, need, positive

from . import results
from .__main__ import common, torch_dtype
from .progress import Progress

RANK = 16  # of the adapters
TOKENS = 24  # in a generation
STEP = "step without optimizer"


def options(argv):
    parser = Parser("peftops bench model", description=__doc__)
    common(parser)
    parser.add_argument("--model", help="as in peftops demo")
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="as in peftops demo",
    )
    parser.add_argument(
        "--method",
        default="lora",
        help="of peftops demo: lora, qlora, dora or qdora",
    )
    parser.add_argument(
        "--rank",
        type=positive,
        default=RANK,
        help="of the adapters",
    )
    parser.add_argument(
        "--fuse",
        choices=("mlp",),
        help="beside ours also with peft.mlp.fuse, experimental",
    )
    return parser.parse_args(argv)


def main(argv=None):
    o = options(argv)
    need("torch", "peft", "transformers", "gguf", extra="bench")
    from peftops.cli.demo_contenders import METHODS, load_text, refuse_folder

    from . import dora, lora
    from .measure import show, unlawful

    if len(METHODS.get(o.method, ())) != 2:
        able = ", ".join(
            method for method, labels in METHODS.items() if len(labels) == 2
        )
        raise BadInput(f"--method must be of {able}, got {o.method!r}")
    device = find_device(o.device)
    dtype = torch_dtype(o.dtype)
    refuse_folder(o.model)
    load_text(o.text)  # so that a bad file is refused at once
    rows = [lora, dora] if "dora" in o.method else [lora]
    for row in rows:
        if wrong := unlawful(row, dtype, device):
            print(wrong)
            return 1
    folder, why = results.keep(o)
    if why:
        print(f"Results are only shown, since {why}.")
    origin = results.describe(device) | {"row": "model", "dtype": o.dtype}
    with Progress() as progress:
        for line in measure(o, dtype, device, progress):
            show(line)
            if o.fuse:
                show_memory(line)
            if folder:
                file = folder / f"{results.slug(origin['device'])}.jsonl"
                results.append(file, origin | line)
    return 0


def show_memory(line):
    for title, key in (("at most", "peak_mb"), ("kept for backward", "saved_mb")):
        sizes = [f"{size:.0f} MB {label}" for label, size in line.get(key, {}).items()]
        if sizes:
            print(f"  {title}: {', '.join(sizes)}", flush=True)


def measure(o, dtype, device, progress):
    """A result for each dropout, and one for a generation of one sequence.

    Steps run under autocast, as in training. The generation does not.
    """
    from peftops.cli import demo_contenders as training
    from peftops.integrations.peft import mlp, report

    from .dora import ANOTHER
    from .peers import BASE, FUSE, OURS

    demo_labels = contenders(o.method)
    missing = training.absent(demo_labels.values())
    demo_labels = {
        label: demo_label
        for label, demo_label in demo_labels.items()
        if demo_label not in missing
    }
    base, tokenizer = training.load_model(o.model, dtype, device)
    batch = training.chunks(tokenizer, training.load_text(o.text), device)[
        : training.SHAPE[0]
    ]
    common = {"layer": layer_name(o), "op": "model", "absent": missing}
    race = partial(raced, o, device, base.config.hidden_size)
    drops = (0.0, 0.1) if o.dropout is None else (o.dropout,)
    for p in progress.track(drops, len(drops), "steps of the model"):
        models = {
            label: training.build(demo_label, copy.deepcopy(base), o.rank, p, 0).model
            for label, demo_label in demo_labels.items()
        }
        if o.fuse:
            models[FUSE] = mlp.fuse(copy.deepcopy(models[OURS]))
        line = common | {
            "dropout": p,
            "path": ", ".join(report(models[OURS]).paths),
        }
        calls, memory = steps(models, base, batch, dtype)
        yield race(line | memory, calls, STEP, batch.numel())
        if p and demo_labels[OURS] in training.DORA:
            own = {
                label: model
                for label, model in models.items()
                if label.startswith(OURS)
            }
            own[OURS] = undropped_base(copy.deepcopy(models[OURS]))
            calls, memory = steps(own, base, batch, dtype)
            line["layer"] += ANOTHER
            yield race(line | memory, calls, STEP, batch.numel())
    models[BASE] = base
    calls = {label: generate(model, batch) for label, model in models.items()}
    yield race(common | {"dropout": 0.0}, calls, f"generate {TOKENS} tokens", 1)


def layer_name(o):
    """What a result line names the model."""
    name = (o.model or "SmolLM2-135M").rpartition("/")[2]
    method = "" if o.method == "lora" else f", {o.method}"
    return f"{name}, all linear layers{method}"


def raced(o, device, width, line, calls, pass_name, rows):
    """The line with what was measured of these calls."""
    from .measure import finish, times
    from .timing import Contender

    contenders = {
        label: Contender({pass_name: [call]}, device) for label, call in calls.items()
    }
    line = line | {
        "absent": dict(line["absent"]),
        "shape": (rows, width, width, o.rank),
    }
    rounds = 3 if o.quick else 9
    return finish(line, *times(contenders, pass_name, rounds, device, modes=("eager",)))


def steps(models, base, batch, dtype):
    """({label: a call of one step}, the memory that is kept for backward if a model is fused)."""
    from peftops.cli.demo_contenders import frozen_seconds

    from .peers import BASE, FUSE

    calls = {label: step(model, batch, dtype) for label, model in models.items()}
    memory = {}
    if FUSE in models:
        memory["saved_mb"] = {
            label: round(saved(models[label], run) / 1e6, 2)
            for label, run in calls.items()
        }
    calls[BASE] = lambda: frozen_seconds(base, batch, dtype)
    return calls, memory


def contenders(method: str) -> dict[str, str]:
    """{label: label of the demo}: stock PEFT and ours, and our LoRA if the method is DoRA."""
    from peftops.cli.demo_contenders import METHODS

    from .nf4 import PEER
    from .peers import LORA, OURS

    stock, ours = METHODS[method]
    without_dora = method.replace("dora", "lora")
    labels = {
        "PEFT" if without_dora == "lora" else PEER: stock,
        OURS: ours,
    }
    if without_dora != method:
        labels[LORA] = METHODS[without_dora][1]
    return labels


def undropped_base(model):
    """Replaces, in place, DoRA layers by nn.LoRALinear in dropout_mode "lora"."""
    from peftops.integrations.peft import lora_layers
    from peftops.nn import LoRALinear

    for name, layer in lora_layers(model).items():
        own = LoRALinear.from_peft(layer)
        own.dropout_mode = "lora"
        model.set_submodule(name, own)
    return model


def step(model, batch, dtype):
    """A call that goes forward and backward. It starts without gradients, as after zero_grad."""
    from peftops.cli.demo_contenders import forward_backward

    def run():
        forward_backward(model, batch, dtype)
        for parameter in model.parameters():
            parameter.grad = None

    return run


def saved(model, run) -> int:
    """Bytes that this run of a model keeps for backward, without the model's own memory."""
    import torch

    own = {
        t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())
    }
    kept = {}

    def pack(t):
        # It keeps the tensor alive, so that no other takes its address.
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(
        t.untyped_storage().nbytes() for start, t in kept.items() if start not in own
    )


def generate(model, batch):
    """A call that generates TOKENS tokens, one at a time, after a short prompt."""
    import torch

    model.eval()
    for layer in model.modules():
        # The demo disables this kernel of bitsandbytes, since a layer that used it cannot train.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            from bitsandbytes.functional import has_avx512bf16

            layer.support_avx512bf16_for_cpu = has_avx512bf16()
    prompt = batch[:1, :16]

    def run():
        with torch.inference_mode():
            model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                use_cache=True,
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                do_sample=False,
                pad_token_id=0,
            )

    return run
