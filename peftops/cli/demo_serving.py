"""peftops demo --adapters N: N adapters on one model, asked for as on a public server.

A pool, stock PEFT and the model alone answer the same requests by turns, batch by batch.
"""

import tempfile
from math import prod
from pathlib import Path
from statistics import median

import torch

import peftops

from .. import adapter_file
from ..nn.pool import bytes_of
from . import BadInput, refusing
from . import demo_adapters as adapters
from . import demo_contenders as training
from .demo_adapters import BASE
from .demo_servers import NEW, Check, Pooled, Server, Stock, samples
from .progress import Progress

ALONE = "model alone"
STOCK = "PEFT"
OURS = "peftops"
METHODS = {"lora": "LoRA", "dora": "DoRA"}
BATCH = 16  # requests that are answered together
PROMPT = 32  # tokens of a request
# The relative error of a sample's logits. Those of two copies differ by 0.06 or more.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.04}


def refuse(o):
    """BadInput where the options do not go together."""
    if o.compare is not None or o.method not in METHODS:
        raise BadInput("--adapters goes with --method lora or dora, without --compare")
    if o.dropout:
        raise BadInput("--adapters goes without --dropout")


def run(o, dtype, device, console):
    """Trains, copies, serves and checks. Returns what the JSON holds of it."""
    text = training.load_text(o.text)
    o.out.mkdir(parents=True, exist_ok=True)
    with (
        Progress(console) as progress,
        tempfile.TemporaryDirectory(dir=o.out, prefix="copies-") as copies,
    ):
        loading = progress.stage("load the model", 1)
        base, tokenizer = training.load_model(o.model, dtype, device)
        base.eval()
        loading.advance()
        ids = training.chunks(tokenizer, text, device, least=len(ranks(o)))
        servers = serving(base, o)
        losses, folders = make(base, ids, o, dtype, Path(copies), progress)
        for name, folder in folders.items():
            servers[OURS].pool.register(name, folder)
        servers[STOCK].folders = folders
        servers[STOCK].sizes = {name: in_fp32(f) for name, f in folders.items()}
        asked = adapters.requests([*folders], ids, o.requests, PROMPT, o.seed)
        with torch.no_grad():
            check = race(servers, adapters.in_batches(*asked, BATCH), o, progress)
        return {
            "method": o.method,
            "adapters": o.adapters,
            "requests": o.requests,
            "prompt": PROMPT,
            "new": NEW,
            "memory": o.memory,
            "ranks": [*ranks(o).values()],
            "training_losses": losses,
            "asked": len({*asked[0]} - {BASE}),
            "check": vars(check),
            "servers": {
                label: numbers(servers, label, o.requests * NEW) for label in servers
            },
        }


def ranks(o):
    return adapters.ranks(o.rank, o.adapters)


def make(base, ids, o, dtype, copies, progress):
    """(losses of the training, {name: folder} of all adapters)."""
    stage = progress.stage("train together", o.steps)
    torch.manual_seed(o.seed)
    adapted, losses = adapters.train(
        base,
        ranks(o),
        ids,
        o.steps,
        dtype,
        o.method == "dora",
        lambda loss: stage.advance(f"loss {loss:.3f}"),
    )
    stage = progress.stage("perturb copies", max(1, o.adapters - len(ranks(o))))
    folders = adapters.write(
        adapted,
        o.out / "adapters",
        copies,
        o.adapters,
        o.seed,
        stage,
    )
    return losses, folders


def serving(base, o):
    """{label: server}. All of them share the memory of the model's weights."""
    pooled = adapters.sharing(base)
    largest = max(ranks(o).values())
    try:
        with refusing(lambda why: why.replace("AdapterPool: ", "--")):
            pool = peftops.AdapterPool(pooled, memory=o.memory, max_rank=largest)
    except MemoryError as error:
        raise BadInput(f"--memory {o.memory}: {error}") from None
    together = min(BATCH, o.adapters)
    if (room := pool.fits({"r": largest})) < together:
        raise BadInput(
            f"--memory {o.memory} has room for {room} adapters of rank {largest},"
            f" and a batch may have {together}"
        )
    return {
        ALONE: Server(adapters.sharing(base)),
        STOCK: Stock(
            adapters.sharing(base),
            memory=bytes_of(o.memory),
            mixes=o.method == "lora",
        ),
        OURS: Pooled(pooled, pool=pool),
    }


def in_fp32(folder):
    """The bytes that an adapter takes in PEFT, which computes in fp32 by its default."""
    tensors = adapter_file.load(folder).tensors.values()
    return sum(4 * prod(tensor.shape) for tensor in tensors)


def race(servers, batches, o, progress):
    """Lets all servers answer all batches by turns. Returns what became of the samples."""
    names = [*ranks(o)]
    for server in servers.values():
        server.answer(names, batches[0][1][: len(names)])
        server.forget()
    check = Check()
    labels = [*servers]
    stage = progress.stage("serve by turns", len(batches))
    for i, (names, prompts) in enumerate(batches):
        first = i % len(labels)
        made = {
            label: servers[label].answer(names, prompts)
            for label in labels[first:] + labels[:first]
        }
        tokens = made[OURS]
        ours = servers[OURS].logits(names, tokens)
        for name, own in samples(names).items():
            alone = servers[STOCK].logits(name, tokens[own])
            for logits, row in zip(alone, own, strict=True):
                check.take(ours[row], logits, tokens[row], TOLERANCE[o.dtype])
        stage.advance(f"{check.wrong} wrong")
    return check


def numbers(servers, label, tokens):
    """What the table shows of one server that made so many tokens."""
    server = servers[label]
    alone = servers[ALONE].seconds
    mounts = sorted(server.mounts)
    pairs = zip(alone, server.seconds, strict=True)
    seconds = sum(server.seconds) + sum(mounts)
    return {
        "tokens_per_s": tokens / seconds,
        "of_alone": sum(alone) / seconds,
        "answers_of_alone": median(first / own for first, own in pairs),
        "mounts": len(mounts),
        "mount_p50_s": percentile(mounts, 50),
        "mount_p99_s": percentile(mounts, 99),
        "evictions": server.evictions,
        "bytes": server.bytes,
    }


def percentile(values, percent):
    """The smallest of sorted values that so many percent do not exceed; None of none."""
    if not values:
        return None
    return values[max(0, -(-len(values) * percent // 100) - 1)]


def table(result):
    from rich.table import Table

    view = Table(
        title=(
            "{model}, {dtype}\n{adapters} {called} adapters, {requests} requests of"
            " {prompt} tokens, {new} new ones, on {device}"
        ).format(called=METHODS[result["method"]], **result)
    )
    view.add_column("")
    for label in result["servers"]:
        view.add_column(label, justify="right")
    rows = {
        "tokens per second": lambda s: f"{s['tokens_per_s']:.1f}",
        "of the model alone": lambda s: f"{s['of_alone']:.2f}",
        "the same without mounts (median)": lambda s: f"{s['answers_of_alone']:.2f}",
        "mounts / evictions": lambda s: f"{s['mounts']} / {s['evictions']}",
        "a mount, p50": lambda s: milliseconds(s["mount_p50_s"]),
        "a mount, p99": lambda s: milliseconds(s["mount_p99_s"]),
        "memory of mounted adapters": lambda s: f"{s['bytes'] / 1e6:.0f} MB",
    }
    for name, show in rows.items():
        view.add_row(name, *(show(server) for server in result["servers"].values()))
    return view


def milliseconds(seconds):
    return "–" if seconds is None else f"{seconds * 1e3:.1f} ms"


def remarks(result):
    """What a reader of the table should know."""
    losses = result["training_losses"]
    ranks = ", ".join(map(str, result["ranks"]))
    copies = result["adapters"] - len(result["ranks"])
    yield (
        f"Adapters of ranks {ranks} were trained together, a row of each in every batch:"
        f" loss {losses[0]:.3f} → {losses[-1]:.3f}."
        f" The other {copies} are perturbed copies of these."
    )
    yield (
        f"{result['asked']} adapters were asked for, the i-th 1/i as often as the first;"
        f" one request in {adapters.ALONE} is for the model without an adapter."
    )
    if result["method"] == "dora":
        yield "PEFT has no batches that mix adapters of DoRA: it answers them one by one."
    check = result["check"]
    yield (
        f"{check['samples'] - check['wrong']} of {check['samples']} samples have the logits of"
        f" PEFT with their adapter alone (relative error {check['error']:.1e} at most);"
        f" {check['equal']} of {check['tokens']} tokens are its best."
    )
