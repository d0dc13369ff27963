"""peftops demo: fine-tune a small real model with stock PEFT and with peftops, side by side, and show one table."""

import json
import logging
import os
import tempfile
from contextlib import contextmanager
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from statistics import median

from . import (
    BadInput,
    Parser,
    cpu_kernels,
    device_name,
    find_device,
    folder,
    need,
    positive,
    probability,
    replace,
)
from .progress import Progress

WARM_UP = 2  # rounds that do not count
CHOICES = "lora", "qlora", "dora", "qdora", "full"
STEPS = {
    "bf16": 40,
    "fp32": 20,
}  # a step in fp32 takes twice as long; the whole stays under five minutes


def options(argv):
    parser = Parser("peftops demo", description=__doc__)
    parser.add_argument(
        "--model",
        help="a local directory or a hub id; by default SmolLM2-135M-Instruct from PyPI",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="what to learn; by default the reference of the Python language",
    )
    parser.add_argument("--method", default="lora", choices=CHOICES, help="what is trained")
    parser.add_argument(
        "--compare",
        metavar="METHOD,…",
        help="several methods side by side, such as lora,dora,full",
    )
    parser.add_argument(
        "--steps",
        type=positive,
        help=f"of training; by default {STEPS['bf16']} in bf16, {STEPS['fp32']} in fp32",
    )
    parser.add_argument("--rank", type=positive, default=16, help="of the adapters")
    parser.add_argument(
        "--dropout", type=probability, default=0.0, help="of the adapters' input"
    )
    parser.add_argument(
        "--dtype",
        choices=list(STEPS),
        help="of the model; by default bf16, but fp32 on a CPU without bf16 dot products",
    )
    parser.add_argument("--device", help="cpu or cuda; by default cuda where there is a GPU")
    parser.add_argument("--seed", type=int, default=0, help="of adapters, batches and dropout")
    parser.add_argument(
        "--out",
        type=folder,
        metavar="DIR",
        default=Path("peftops-demo"),
        help="what is made is kept here",
    )
    return parser.parse_args(argv)


def main(argv=None):
    o = options(argv)
    need("peft", "transformers", "gguf", "matplotlib", "rich")
    import torch
    from rich.console import Console

    from .demo_contenders import ADAPTERS, METHODS, refuse_folder

    methods = (o.method if o.compare is None else o.compare).split(",")
    if len(set(methods)) < len(methods):
        raise BadInput(f"--compare names a method twice: {o.compare}")
    if unknown := [method for method in methods if method not in METHODS]:
        raise BadInput(f"there is no method {unknown[0]!r}; there are {', '.join(METHODS)}")
    labels = [label for method in methods for label in METHODS[method]]
    device, chosen = resolve(o)
    refuse_folder(o.model)
    console = Console()
    console.print(chosen, highlight=False, soft_wrap=True)
    console.print(f"{' against '.join(labels)}: {o.steps} steps by turns.")
    with heard(console):
        result = run(
            o, labels, {"bf16": torch.bfloat16, "fp32": torch.float32}[o.dtype], device, console
        )
    console.print(table(result))
    for line in remarks(result):
        console.print(line, highlight=False, soft_wrap=True)
    draw(result, o.out / "loss.png")
    replace(
        o.out / "result.json", lambda path: path.write_text(json.dumps(result, indent=1) + "\n")
    )
    adapters = [folder for label, folder in ADAPTERS.items() if label in labels]
    console.print(f"In {o.out}: {', '.join([*adapters, 'loss.png', 'result.json'])}")
    return 0


def resolve(o):
    """(device, a line of what was chosen and why). Options that depend on the machine are set where they were None."""
    device = find_device(o.device)
    reasons = []
    if o.device is None:
        reasons.append("no GPU is here" if device.type == "cpu" else "a GPU is here")
    if o.dtype is None:
        o.dtype, why = default_dtype(device)
        reasons.append(why)
    if o.steps is None:
        o.steps = STEPS[o.dtype]
    because = f" ({', '.join(reasons)})" if reasons else ""
    return device, f"On {device_name(device)}, in {o.dtype}{because}."


def default_dtype(device):
    """(bf16 or fp32, why)."""
    if device.type == "cuda":
        return "bf16", "GPUs multiply it fast"
    kernels = cpu_kernels()
    if "bf16" in kernels:
        return "bf16", "this CPU has bf16 dot products"
    if kernels == "no kernels":
        return "fp32", "peftops' kernels are not compiled"
    return "fp32", "this CPU has no bf16 dot products"


@contextmanager
def heard(console):
    """What peftops logs, such as the line of patch, is shown as a user with logging would see it."""
    from rich.logging import RichHandler

    log = logging.getLogger("peftops")
    handler, level = (
        RichHandler(console=console, show_time=False, show_path=False, show_level=False),
        log.level,
    )
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def run(o, labels, dtype, device, console):
    """Loads, measures memory, trains by turns and evaluates: everything that the JSON holds."""
    import copy

    from . import demo_contenders as t

    text, absent = t.load_text(o.text), t.absent(labels)
    labels = [label for label in labels if label not in absent]
    with Progress(console) as progress:
        loading = progress.stage("load the model", 1)
        base, tokenizer = t.load_model(o.model, dtype, device)
        loading.advance()
        held, batches = t.split(t.chunks(tokenizer, text, device, least=8), o.steps, o.seed)
        unrelated = t.chunks(
            tokenizer, Path(__file__).with_name("unrelated.txt").read_text(), device
        )

        def losses(model):
            return t.evaluate(model, held, dtype), t.evaluate(model, unrelated, dtype)

        at_first = losses(base)
        args = base.config, dtype, device, o.rank, o.dropout
        peaks = [
            t.peak_memory(label, *args) for label in progress.track("measure memory", labels)
        ]
        contenders = [
            t.build(label, copy.deepcopy(base), o.rank, o.dropout, o.seed) for label in labels
        ]
        before = [losses(c.model) if c.label in t.PACKED else at_first for c in contenders]
        training = progress.stage("train by turns", o.steps)
        frozen = t.race(
            contenders,
            base,
            batches,
            dtype,
            o.seed,
            lambda loss: training.advance(f"loss {loss:.3f}"),
        )
        after = [losses(c.model) for c in progress.track("evaluate", contenders)]
    result = {
        "model": o.model or t.DEFAULT, "text": o.text or "pydoc_data.topics", "steps": o.steps, "rank": o.rank,
        "dropout": o.dropout, "dtype": o.dtype, "seed": o.seed, "batch": t.SHAPE, "device": device_name(device),
        "device_type": device.type,
        "versions": {name: version(name) for name in ("peftops", "torch", "peft", "transformers")},
        "frozen_s": median(frozen.values()), "parameters": sum(p.numel() for p in base.parameters()), "absent": absent,
    }  # fmt: skip
    rows = zip(contenders, peaks, before, after, strict=True)
    result["contenders"] = {
        c.label: numbers(c, peak, start, end, result, frozen, save(c, o.out, dtype))
        for c, peak, start, end in rows
    }
    result["of_full"] = of_full(result["contenders"])
    return result


def numbers(c, peak, before, after, result, frozen, size):
    """What the table shows of one contender."""
    import peftops

    from .demo_contenders import ADAPTERS, FULL

    seconds = median(c.steps[WARM_UP:] or c.steps)
    trained = sum(p.numel() for p in c.trained)
    total = result["parameters"] + trained * (c.label != FULL)
    report = peftops.report(c.model) if c.label in ADAPTERS else None
    return {
        "step_s": seconds, "tokens_per_s": result["batch"][0] * result["batch"][1] / seconds,
        "over_frozen": median(c.passes[i] / took for i, took in frozen.items()), "peak_bytes": peak,
        "trained": trained, "trained_share": trained / total, "checkpoint_bytes": size,
        "held_out": [before[0], after[0]], "unrelated": [before[1], after[1]],
        "fused": report and report.fused, "fallback": report and report.fallback, "norms": report and report.norms,
        "reasons": dict(report.reasons) if report else {}, "losses": c.losses,
    }  # fmt: skip


def save(contender, out, dtype):
    """Bytes of the checkpoint; those of peftops are kept, in PEFT's own format."""
    from .demo_contenders import ADAPTERS, FULL

    if contender.label == FULL:  # half a gigabyte, so it is not written
        return sum(p.numel() for p in contender.model.parameters()) * dtype.itemsize
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as made:
        contender.model.save_pretrained(made, save_embedding_layers=False)
        files = [file for file in Path(made).iterdir() if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        if folder := ADAPTERS.get(contender.label):
            (out / folder).mkdir(exist_ok=True)
            for file in files:
                os.replace(file, out / folder / file.name)
    return size


def table(result):
    from rich.table import Table

    batch, tokens = result["batch"]
    title = "{model}, {dtype}\nrank {rank}, dropout {dropout}, {steps} steps of {0} × {1} tokens on {device}"
    view = Table(title=title.format(batch, tokens, **result))
    view.add_column("")
    for label in result["contenders"]:
        view.add_column(label, justify="right")
    for label, why in result["absent"].items():
        view.add_column(f"{label}\n({why})", justify="right")
    rows = {
        "seconds per step (median)": "{step_s:.3f}",
        "tokens per second": "{tokens_per_s:.0f}",
        "forward + backward ÷ frozen model": "{over_frozen:.2f}",
        "peak memory": "{peak_mb:.0f} MB",
        "trained parameters": "{trained:,} ({trained_share:.2%})",
        "checkpoint": "{checkpoint_mb:.1f} MB",
        "held-out loss": "{held_out[0]:.3f} → {held_out[1]:.3f}",
        "loss on unrelated text": "{unrelated[0]:.3f} → {unrelated[1]:.3f}",
        "layers fused / fallen back": "{layers}",
    }
    shown = [
        c
        | {"peak_mb": c["peak_bytes"] / 1e6, "checkpoint_mb": c["checkpoint_bytes"] / 1e6}
        | {"layers": "–" if c["fused"] is None else f"{c['fused']} / {c['fallback']}"}
        for c in result["contenders"].values()
    ]
    for name, form in rows.items():
        view.add_row(name, *(form.format(**c) for c in shown), *("–" for _ in result["absent"]))
    return view


def remarks(result):
    """What a reader of the table should know."""
    from .demo_contenders import FULL, METHODS, PACKED, RATES

    runs = result["contenders"]
    yield f"The frozen model's forward + backward alone takes {result['frozen_s']:.3f} s (measured in the same rounds)."
    for stock, ours in (pair for pair in METHODS.values() if pair[1:] and pair[1] in runs):
        if stock in runs:
            most = max(
                abs(a - b)
                for a, b in zip(runs[stock]["losses"], runs[ours]["losses"], strict=True)
            )
            why = (
                "the dropout masks differ"
                if result["dropout"]
                else "same arithmetic, other roundings"
            )
            doubt = " Too few steps to be sure." if result["steps"] < 10 + WARM_UP else ""
            ratio = runs[ours]["step_s"] / runs[stock]["step_s"]
            yield f"{ours} takes {ratio:.2f} × the time of {stock} for a step.{doubt}"
            yield f"Their training losses differ by {most:.4f} at most ({why})."
        for reason, layers in runs[ours]["reasons"].items():
            yield f"{layers} layers of {ours} fell back to PEFT's own forward: {reason}."
    if not runs.keys().isdisjoint(PACKED):
        yield "4-bit bases are NF4 with double quantization in all linear layers but the head; losses start from there."
    if FULL in runs:
        yield "The checkpoint of full fine-tuning is not written; its size is that of the weights in the model's dtype."
    how = (
        "growth of resident memory"
        if result["device_type"] == "cpu"
        else "memory that torch allocated"
    )
    yield f"Peak memory is the {how} in a process of its own, weights included."
    if shares := result["of_full"]:
        before, after = runs[FULL]["held_out"]
        rates = f"learning rate {RATES[FULL]:g}, of the others {max(RATES.values()):g}"
        reached = "; ".join(f"{share:.0%} by {label}" for label, share in shares.items())
        yield f"Of what full fine-tuning takes off the held-out loss ({before - after:.3f}; {rates}): {reached}."
    elif shares is not None:
        yield "Full fine-tuning does not lower the held-out loss here, so there is nothing to compare the others with."


def of_full(runs):
    """{label: what it takes off the base's held-out loss, as a share of what full fine-tuning does}; empty where that
    takes nothing off, None where there are not both."""
    from .demo_contenders import FULL

    if FULL not in runs or len(runs) == 1:
        return None
    before, after = runs[FULL]["held_out"]
    others = {label: c["held_out"][1] for label, c in runs.items() if label != FULL}
    return {
        label: (before - loss) / (before - after)
        for label, loss in others.items()
        if after < before
    }


def draw(result, path):
    """The loss curves, with the held-out loss at both ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for (label, c), style in zip(
        result["contenders"].items(), cycle(("-", "--", ":", "-.")), strict=False
    ):
        steps = range(1, len(c["losses"]) + 1)
        (line,) = axes.plot(
            steps, c["losses"], style, label=f"{label}: {c['step_s']:.3f} s per step"
        )
        axes.plot([0, len(steps)], c["held_out"], "o", color=line.get_color())
    axes.set(
        xlabel="step (dots: held-out text)",
        ylabel="loss",
        title=f"{result['model']}, rank {result['rank']}",
    )
    axes.legend()
    replace(path, lambda beside: figure.savefig(beside, format="png", dpi=120))
    pyplot.close(figure)
