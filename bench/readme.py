"""peftops bench readme: rewrites README's tables from the newest results."""

from typing import NamedTuple

from peftops.cli import BadInput, Parser, named, replace

from . import results
from .host import NARROW, STOCK
from .peers import BASE, COPY, FEW, LORA, OURS

MARKS = "<!-- bench -->", "<!-- /bench -->"
PEFT = {"of PEFT's time": ("PEFT", "PEFT + bitsandbytes")}


class Table(NamedTuple):
    title: str
    first: tuple[str, ...]  # columns that come first
    shares: dict[str, tuple[str, ...]] = (
        PEFT  # {title: whose time it is a share of, the first who is there}
    )
    unit: str = BASE  # whose time times are multiples of


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
    "norm": Table(
        f"**DoRA's norm** of W + s·B·A, W (n, k): times as multiples of those of a {COPY} (of its codes, over 4 bits)",
        ("torch", "PEFT"),
        unit=COPY,
    ),
    "host": Table(
        "**The host's time** of a layer on a GPU, on a stand-in for one that takes no time: multiples of PEFT's",
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
    target = results.HERE.parent / "README.md"
    print(f"{target}: {rewrite(target, o.out)} rows of {o.out}")
    return 0


def rewrite(target, folder):
    """How many rows the tables have now."""
    shown = [line for line in results.newest(folder) if in_table(line)]
    if not shown:
        raise BadInput(
            f"no line in {folder} belongs into a table (a pass with backward, or few rows); README stays"
        )
    try:
        text = target.read_text()
        head, (_, tail) = text.split(MARKS[0])[0], text.split(MARKS[0])[1].split(MARKS[1])
    except (OSError, IndexError, ValueError):
        raise BadInput(f"{target} must exist and hold {MARKS[0]} and {MARKS[1]} once") from None
    body = "\n".join([MARKS[0], *tables(shown), MARKS[1]])
    replace(target, lambda beside: beside.write_text(head + body + tail))
    return len(shown)


def tables(lines):
    """Markdown: tables for each device, times as multiples of one contender's, and milliseconds on a GPU.

    From the medians of ratios within a round, which a machine that slows down for a while does not move.
    """
    for name in sorted({line["device"] for line in lines}):
        for family, kind in TABLES.items():
            shown = [
                line
                for line in lines
                if line["device"] == name and results.family(line) == family
            ]
            if shown:
                yield from table(name, shown, kind)


def table(name, shown, kind):
    gpu, last = (
        any("driver" in line for line in shown),
        max(shown, key=lambda line: line["date"]),
    )
    made = " / ".join(sorted({line["commit"] for line in shown}))
    versions = ", ".join(f"{package} {number}" for package, number in last["versions"].items())
    driver = f", driver {last['driver']}" if gpu else ""
    where = f"{name}{driver}, commit {made}, {last['date'][:10]}, {versions}"
    yield f"\n{where}. {kind.title}:\n"
    peers = [peer for peer in kind.first if any(peer in line["ratio"] for line in shown)]
    peers += sorted({peer for line in shown for peer in line["ratio"]} - {kind.unit, *peers})
    sizes = "n, k, r" if kind.unit == COPY else "m, k, n, r"
    titles = ["layer", sizes, "dtype", "dropout", "pass", *peers, "**peftops**", *kind.shares]
    titles += ["ms", "of the roofline", "path"] if gpu else []
    yield f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}"
    yield from (f"| {' | '.join(cells(line, peers, gpu, kind))} |" for line in shown)
    absent = results.absentees(shown)
    yield f"\nAbsent: {'; '.join(absent)}.\n" if absent else ""


def in_table(line):
    """Without what only plots show: passes forward where there are backward ones too, and the sweep over rows."""
    few = line["shape"][0] <= FEW
    measured = (
        results.family(line) in TABLES and TABLES[results.family(line)].unit in line["ratio"]
    )
    return measured and (line["pass"] != "forward" or few) and not results.swept(line)


def cells(line, peers, gpu, kind):
    mode = "graph_" if gpu and kind.unit in line.get("graph_ratio", {}) else ""
    ratio = line[f"{mode}ratio"]
    own = ratio[kind.unit]
    times = [f"{own / ratio[peer]:.2f}" if peer in ratio else "–" for peer in peers]
    facts = [
        line["layer"],
        ", ".join(map(str, line["shape"])),
        line["dtype"],
        str(line["dropout"]),
        line["pass"],
    ]
    way = ", ".join(filter(None, (line.get("backend"), line.get("path"))))
    found = [
        next((ratio[peer] for peer in peers if peer in ratio), None)
        for peers in kind.shares.values()
    ]
    shares = ["–" if share is None else f"{share:.2f}" for share in found]
    extra = (
        [f"{line[f'{mode}ms'][OURS][1]:.4g}", f"{line.get('roofline', 0):.0%}", way]
        if gpu
        else []
    )
    return [*facts, *times, f"**{own:.2f}**", *shares, *extra]
