"""peftops bench readme: rewrites the tables of docs/benchmarks.md from the newest results."""

from pathlib import Path
from typing import NamedTuple

from peftops.cli import BadInput, Parser, named, replace

from . import results
from .host import NARROW, STOCK
from .peers import BASE, COPY, LORA, OURS
from .problem import FEW

MARKS = "<!-- bench -->", "<!-- /bench -->"
PEFT = {"of PEFT's time": ("PEFT", "PEFT + bitsandbytes")}


class Table(NamedTuple):
    """How the results of one family are shown.

    Attributes:
        title: what stands above the table.
        first: the peers whose columns come first.
        shares: {title of a column: peers}. The column shows our share of the time of the first of
            these peers that was measured.
        unit: the contender whose time is 1 in the table.
    """

    title: str
    first: tuple[str, ...]
    shares: dict[str, tuple[str, ...]] = PEFT
    unit: str = BASE


TABLES = {
    "lora": Table(
        "Times as multiples of the frozen layer's",
        ("torch", "torch.compile", "PEFT", "PEFT, narrow adapters", "PEFT, compiled"),
    ),
    "nf4": Table(
        "LoRA over a **4-bit base** (NF4): times as multiples of the frozen 16-bit layer's",
        ("bitsandbytes, frozen", "PEFT + bitsandbytes", f"{OURS}, frozen"),
    ),
    "dora": Table(
        "**DoRA** over 16 and 4 bits: times as multiples of the frozen 16-bit layer's",
        (
            "PEFT",
            "PEFT, compiled",
            "bitsandbytes, frozen",
            "PEFT + bitsandbytes",
            f"{OURS}, frozen",
            LORA,
        ),
        PEFT | {"of our LoRA's time": (LORA,)},
    ),
    "multi": Table(
        "**Multi-LoRA**: a batch that mixes adapters. Times as multiples of the frozen layer's",
        ("PEFT", "torch, bmm", "torch, grouped_mm", f"{OURS}, gate", LORA),
        PEFT | {"of our LoRA's time": (LORA,)},
    ),
    "norm": Table(
        "**DoRA's norm** of W + s·B·A, W (n, k): times as multiples of those of"
        f" a {COPY} (of its codes, over 4 bits)",
        ("torch", "PEFT"),
        unit=COPY,
    ),
    "merge": Table(
        "**Merging** an adapter into a 16-bit weight W (n, k), and out of it again: times as"
        f" multiples of those of a {COPY}",
        ("torch", "PEFT"),
        unit=COPY,
    ),
    "host": Table(
        "**The host's time** of a layer on a GPU, on a stand-in for one that takes no time:"
        " multiples of PEFT's",
        (NARROW,),
        {},
        unit=STOCK,
    ),
}


def main(argv=None):
    parser = Parser("peftops bench readme", description=__doc__)
    parser.add_argument(
        "--out",
        type=named,
        metavar="DIR",
        default=results.RESULTS,
        help="where the results are",
    )
    o = parser.parse_args(argv)
    target = results.HERE.parent / "docs" / "benchmarks.md"
    print(f"{target}: {rewrite(target, o.out)} rows of {o.out}")
    return 0


def rewrite(target: Path, folder: Path) -> int:
    """Replaces the tables in a file. Returns how many rows they have now.

    Args:
        target: a Markdown file that holds MARKS.
        folder: where the results are.
    """
    shown = [line for line in results.newest(folder) if in_table(line)]
    if not shown:
        raise BadInput(
            f"no line in {folder} belongs into a table"
            " (a pass with backward, or few rows); the tables stay"
        )
    try:
        head, after = target.read_text().split(MARKS[0])[:2]
        _, tail = after.split(MARKS[1])
    except (OSError, ValueError):
        raise BadInput(
            f"{target} must exist and hold {MARKS[0]} and {MARKS[1]} once"
        ) from None
    body = "\n".join([MARKS[0], *tables(shown), MARKS[1]])
    replace(target, lambda beside: beside.write_text(head + body + tail))
    return len(shown)


def tables(lines):
    """The Markdown of a table for each device and family.

    Times are multiples of one contender's; on a GPU milliseconds stand beside them. The multiples
    are medians of the ratios within a round, so a machine that slows down for a while does not
    move them.
    """
    for device in sorted({line["device"] for line in lines}):
        for family, layout in TABLES.items():
            shown = [
                line
                for line in lines
                if line["device"] == device and results.family(line) == family
            ]
            if shown:
                yield from table(device, shown, layout)


def table(device, shown, layout):
    """The Markdown of one table, with a sentence above it and the absent peers below."""
    gpu = any("driver" in line for line in shown)
    yield f"\n{heading(device, shown, gpu)}. {layout.title}:\n"
    peers = [
        peer for peer in layout.first if any(peer in line["ratio"] for line in shown)
    ]
    others = {peer for line in shown for peer in line["ratio"]} - {layout.unit, *peers}
    peers += sorted(others)
    sizes = "n, k, r" if layout.unit == COPY else "m, k, n, r"
    titles = ["layer", sizes, "dtype", "dropout", "pass", *peers, "**peftops**"]
    titles += layout.shares
    if gpu:
        titles += ["ms", "of the roofline", "path"]
    yield f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}"
    for line in shown:
        yield f"| {' | '.join(cells(line, peers, gpu, layout))} |"
    absent = results.absentees(shown)
    yield f"\nAbsent: {'; '.join(absent)}.\n" if absent else ""


def heading(device, shown, gpu):
    """What the results were measured with."""
    last = max(shown, key=lambda line: line["date"])
    commits = " / ".join(sorted({line["commit"] for line in shown}))
    versions = ", ".join(
        f"{package} {number}" for package, number in last["versions"].items()
    )
    driver = f", driver {last['driver']}" if gpu else ""
    return f"{device}{driver}, commit {commits}, {last['date'][:10]}, {versions}"


def in_table(line: dict) -> bool:
    """Whether a table shows the line.

    Only plots show the sweep over rows, and passes forward that have one with backward beside them.
    """
    layout = TABLES.get(results.family(line))
    if layout is None or layout.unit not in line["ratio"] or results.swept(line):
        return False
    return line["pass"] != "forward" or line["shape"][0] <= FEW


def cells(line, peers, gpu, layout):
    """The cells of one row. On a GPU the times are those of CUDA graphs, where there are some."""
    mode = "graph_" if gpu and layout.unit in line.get("graph_ratio", {}) else ""
    ratio = line[f"{mode}ratio"]
    own = ratio[layout.unit]
    texts = [
        line["layer"],
        ", ".join(map(str, line["shape"])),
        line["dtype"],
        str(line["dropout"]),
        line["pass"],
    ]
    texts += [f"{own / ratio[peer]:.2f}" if peer in ratio else "–" for peer in peers]
    texts.append(f"**{own:.2f}**")
    for candidates in layout.shares.values():
        share = next((ratio[peer] for peer in candidates if peer in ratio), None)
        texts.append("–" if share is None else f"{share:.2f}")
    if gpu:
        texts.append(f"{line[f'{mode}ms'][OURS][1]:.4g}")
        texts.append(f"{line.get('roofline', 0):.0%}")
        texts.append(results.kernels_used(line))
    return texts
