"""peftops demo: fine-tune a small real model with stock PEFT and with peftops, side by side.

It shows one table of both. With --adapters N it serves N adapters instead, and shows one table of
a pool, stock PEFT and the model alone.
"""

import json
import logging
import os
import tempfile
from contextlib import contextmanager
from importlib.metadata import version
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
from .demo_report import draw, numbers, of_full, remarks, table
from .progress import Progress

CHOICES = "lora", "qlora", "dora", "qdora", "full"
# A step in fp32 takes twice as long. With these the whole stays under five minutes.
STEPS = {"bf16": 40, "fp32": 20}
STEPS_OF_MANY = 10  # of adapters that are trained to be served


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
    parser.add_argument(
        "--method", default="lora", choices=CHOICES, help="what is trained"
    )
    parser.add_argument(
        "--compare",
        metavar="METHOD,…",
        help="several methods side by side, such as lora,dora,full",
    )
    parser.add_argument(
        "--steps",
        type=positive,
        help=f"of training; by default {STEPS['bf16']} in bf16, {STEPS['fp32']} in fp32,"
        f" {STEPS_OF_MANY} with --adapters",
    )
    parser.add_argument(
        "--rank",
        type=positive,
        default=16,
        help="of the adapters",
    )
    parser.add_argument(
        "--dropout",
        type=probability,
        default=0.0,
        help="of the adapters' input",
    )
    parser.add_argument(
        "--dtype",
        choices=list(STEPS),
        help="of the model; by default bf16, but fp32 on a CPU without bf16 dot products",
    )
    parser.add_argument(
        "--device", help="cpu or cuda; by default cuda where there is a GPU"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of adapters, batches and dropout",
    )
    serving(parser)
    parser.add_argument(
        "--out",
        type=folder,
        metavar="DIR",
        default=Path("peftops-demo"),
        help="what is made is kept here",
    )
    return parser.parse_args(argv)


def serving(parser):
    """Adds the options of --adapters."""
    group = parser.add_argument_group("serving many adapters")
    group.add_argument(
        "--adapters",
        metavar="N",
        type=positive,
        help="serve so many, of which a few are trained; the others are perturbed copies",
    )
    group.add_argument(
        "--requests",
        type=positive,
        default=64,
        help="the i-th adapter is asked for 1/i as often as the first",
    )
    group.add_argument(
        "--memory",
        default="1GiB",
        help="of mounted adapters, such as 500MB",
    )


def main(argv=None):
    o = options(argv)
    need("peft", "transformers", "gguf", "matplotlib", "rich", extra="demo")
    return serve(o) if o.adapters else fine_tune(o)


def fine_tune(o):
    """Trains stock PEFT and ours, and shows both."""
    import torch
    from rich.console import Console

    from .demo_contenders import ADAPTERS, METHODS, refuse_folder

    methods = (o.method if o.compare is None else o.compare).split(",")
    if len(set(methods)) < len(methods):
        raise BadInput(f"--compare names a method twice: {o.compare}")
    if unknown := [method for method in methods if method not in METHODS]:
        raise BadInput(
            f"there is no method {unknown[0]!r}; there are {', '.join(METHODS)}"
        )
    labels = [label for method in methods for label in METHODS[method]]
    device, chosen = resolve(o)
    refuse_folder(o.model)
    console = Console()
    console.print(chosen, highlight=False, soft_wrap=True)
    console.print(f"{' against '.join(labels)}: {o.steps} steps by turns.")
    dtype = torch.bfloat16 if o.dtype == "bf16" else torch.float32
    with logging_to(console):
        result = run(o, labels, dtype, device, console)
    console.print(table(result))
    for line in remarks(result):
        console.print(line, highlight=False, soft_wrap=True)
    draw(result, o.out / "loss.png")
    keep(o, result)
    adapters = [folder for label, folder in ADAPTERS.items() if label in labels]
    console.print(f"In {o.out}: {', '.join([*adapters, 'loss.png', 'result.json'])}")
    return 0


def serve(o):
    """Serves many adapters by a pool and by stock PEFT, and shows both. 1 if a sample is wrong."""
    import torch
    from rich.console import Console

    from . import demo_serving
    from .demo_contenders import refuse_folder

    demo_serving.refuse(o)
    device, chosen = resolve(o)
    refuse_folder(o.model)
    console = Console()
    console.print(chosen, highlight=False, soft_wrap=True)
    dtype = torch.bfloat16 if o.dtype == "bf16" else torch.float32
    with logging_to(console):
        served = demo_serving.run(o, dtype, device, console)
    result = settings(o, device) | served
    console.print(demo_serving.table(result))
    for line in demo_serving.remarks(result):
        console.print(line, highlight=False, soft_wrap=True)
    keep(o, result)
    console.print(f"In {o.out}: adapters, result.json")
    return 1 if result["check"]["wrong"] else 0


def keep(o, result):
    """Writes the result as JSON."""
    text = json.dumps(result, indent=1) + "\n"
    replace(o.out / "result.json", lambda path: path.write_text(text))


def resolve(o):
    """(device, a line of what was chosen and why).

    It sets the options that depend on the machine, where they are None.
    """
    device = find_device(o.device)
    reasons = []
    if o.device is None:
        reasons.append("no GPU is here" if device.type == "cpu" else "a GPU is here")
    if o.dtype is None:
        o.dtype, why = default_dtype(device)
        reasons.append(why)
    if o.steps is None:
        o.steps = STEPS_OF_MANY if o.adapters else STEPS[o.dtype]
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
def logging_to(console):
    """Shows on the console what peftops logs, such as the line of patch."""
    from rich.logging import RichHandler

    log = logging.getLogger("peftops")
    level = log.level
    handler = RichHandler(
        console=console,
        show_time=False,
        show_path=False,
        show_level=False,
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
    """Loads, measures memory, trains by turns and evaluates. Returns all that the JSON holds."""
    import copy

    from . import demo_contenders as training

    text = training.load_text(o.text)
    absent = training.absent(labels)
    labels = [label for label in labels if label not in absent]
    with Progress(console) as progress:
        loading = progress.stage("load the model", 1)
        base, tokenizer = training.load_model(o.model, dtype, device)
        loading.advance()
        ids = training.chunks(tokenizer, text, device, least=8)
        held, batches = training.split(ids, o.steps, o.seed)
        unrelated = Path(__file__).with_name("unrelated.txt").read_text()
        unrelated = training.chunks(tokenizer, unrelated, device)

        def losses(model):
            own = training.evaluate(model, held, dtype)
            return own, training.evaluate(model, unrelated, dtype)

        at_first = losses(base)
        args = base.config, dtype, device, o.rank, o.dropout
        peaks = [
            training.peak_memory(label, *args)
            for label in progress.track("measure memory", labels)
        ]
        contenders = [
            training.build(label, copy.deepcopy(base), o.rank, o.dropout, o.seed)
            for label in labels
        ]
        before = [
            losses(c.model) if c.label in training.PACKED else at_first
            for c in contenders
        ]
        stage = progress.stage("train by turns", o.steps)
        frozen = training.race(
            contenders,
            base,
            batches,
            dtype,
            o.seed,
            lambda loss: stage.advance(f"loss {loss:.3f}"),
        )
        after = [losses(c.model) for c in progress.track("evaluate", contenders)]
    result = settings(o, device)
    result["frozen_s"] = median(frozen.values())
    result["parameters"] = sum(p.numel() for p in base.parameters())
    result["absent"] = absent
    rows = zip(contenders, peaks, before, after, strict=True)
    runs = {}
    for c, peak, start, end in rows:
        size = save(c, o.out, dtype)
        runs[c.label] = numbers(c, peak, start, end, result, frozen, size)
    result["contenders"] = runs
    result["of_full"] = of_full(runs)
    return result


def settings(o, device):
    """What the JSON says of the run before it says what was measured."""
    from . import demo_contenders as training

    packages = "peftops", "torch", "peft", "transformers"
    return {
        "model": o.model or training.DEFAULT,
        "text": o.text or "pydoc_data.topics",
        "steps": o.steps,
        "rank": o.rank,
        "dropout": o.dropout,
        "dtype": o.dtype,
        "seed": o.seed,
        "batch": training.SHAPE,
        "device": device_name(device),
        "device_type": device.type,
        "versions": {name: version(name) for name in packages},
    }


def save(contender, out, dtype):
    """Bytes of the checkpoint. The adapters of peftops are kept, in PEFT's own format."""
    from .demo_contenders import ADAPTERS, FULL

    if contender.label == FULL:  # half a gigabyte, so it is not written
        return sum(p.numel() for p in contender.model.parameters()) * dtype.itemsize
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as saved:
        contender.model.save_pretrained(saved, save_embedding_layers=False)
        files = [file for file in Path(saved).iterdir() if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        if folder := ADAPTERS.get(contender.label):
            (out / folder).mkdir(exist_ok=True)
            for file in files:
                os.replace(file, out / folder / file.name)
    return size
