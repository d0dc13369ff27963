"""peftops bench plot: draws the newest results as PNG and SVG: bars beside peers, the roofline, cost against rows."""

import re
from collections import defaultdict
from functools import partial
from itertools import cycle
from pathlib import Path

from peftops.cli import BadInput, Parser, folder, named, need, replace

from . import results
from .peers import BASE, OURS

COLOURS = {BASE: "#888888", "torch": "#c7b42e", "torch.compile": "#8c6d31", "PEFT": "#d62728"}
COLOURS |= {"PEFT, narrow adapters": "#ff9896", "PEFT, compiled": "#e377c2", OURS: "#1f77b4"}
OTHERS = (
    "#2ca02c",
    "#9467bd",
    "#ff7f0e",
    "#17becf",
    "#aec7e8",
    "#98df8a",
    "#c5b0d5",
    "#ffbb78",
    "#9edae5",
    "#c49c94",
)
TITLES = {"lora": "", "nf4": ", 4-bit base", "dora": ", DoRA"}
MARKERS = {"lora": "o", "nf4": "s", "dora": "^"}
BARS = {
    "bars" if family == "lora" else f"bars-{family}": (family, title)
    for family, title in TITLES.items()
}


def main(argv=None):
    parser = Parser("peftops bench plot", description=__doc__)
    parser.add_argument(
        "--results",
        type=named,
        metavar="DIR",
        default=results.RESULTS,
        help="where the results are",
    )
    parser.add_argument(
        "--out", type=folder, metavar="DIR", default=Path("peftops-plots"), help="where to draw"
    )
    o = parser.parse_args(argv)
    need("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "peftops",
        "figure.constrained_layout.use": True,
        "font.size": 9,
    }
    lines = [line for line in results.newest(o.results) if BASE in line["ratio"]]
    figures = {name: partial(bars, *which) for name, which in BARS.items()} | {
        "roofline": roofline,
        "rows": rows,
    }
    drawn = []
    for device in sorted({line["device"] for line in lines}):
        mine = [line for line in lines if line["device"] == device]
        for name, draw in figures.items():
            if figure := draw(mine, device):
                for kind in ("png", "svg"):
                    drawn.append(o.out / f"{results.slug(device)}-{name}.{kind}")
                    save(figure, drawn[-1])
                    print(drawn[-1])
    if not drawn:
        raise BadInput(f"no line in {o.results} can be drawn")
    return 0


def colours(lines):
    """{contender: colour} of everyone in the lines."""
    there = {peer for line in lines for peer in line["ratio"]} | {OURS}
    more = sorted(there - set(COLOURS))
    return {peer: COLOURS[peer] for peer in COLOURS if peer in there} | dict(
        zip(more, cycle(OTHERS), strict=False)
    )


def save(figure, path):
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    replace(
        path,
        lambda beside: figure.savefig(
            beside, format=path.suffix[1:], dpi=130, metadata=metadata
        ),
    )


def bars(family, title, lines, device):
    """Time as a multiple of the frozen layer's, for each layer."""
    from matplotlib import pyplot

    shown = [
        line for line in lines if results.family(line) == family and not results.swept(line)
    ]
    shown = [line for line in shown if line.get("op") not in (None, "host")]
    if not shown:
        return None
    peers = colours(shown)
    shown.reverse()  # bars are stacked upwards
    figure, axes = pyplot.subplots(figsize=(9, max(0.62, 0.09 * len(peers)) * len(shown) + 1.6))
    height = 0.8 / len(peers)
    for i, peer in enumerate(peers):
        values = [multiple(line, peer) for line in shown]
        places = [j + (len(peers) / 2 - i - 0.5) * height for j in range(len(shown))]
        axes.barh(places, values, height * 0.92, color=peers[peer], label=peer)
    names = [
        f"{line['layer']}, p = {line['dropout']}, {line['pass']}, {line['dtype']}"
        for line in shown
    ]
    axes.set_yticks(range(len(shown)), names)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.axvline(1, color="#444444", linewidth=0.8)
    axes.set(xlabel="time ÷ the frozen layer's (shorter is better)", title=f"{device}{title}")
    axes.legend(loc="lower right")
    return figure


def multiple(line, peer):
    own = line["ratio"][BASE]
    return own if peer == OURS else own / line["ratio"][peer] if peer in line["ratio"] else 0


def roofline(lines, device):
    """Operations a second against operations a byte, under what a copy and a matrix product reach on this device."""
    from matplotlib import pyplot

    shown = [line for line in lines if "roofline" in line]
    if not shown:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    top, slope = (
        max(line["gemm_tflops"] for line in shown),
        max(line["copy_gbps"] for line in shown) / 1000,
    )
    least = min(line["flops"] / line["bytes"] for line in shown) / 2
    axes.plot(
        [least, top / slope, 4000],
        [least * slope, top, top],
        color="#444444",
        label="copy, matrix product",
    )
    for family, kind in sorted({(results.family(line), line["pass"]) for line in shown}):
        mine = [
            line for line in shown if (results.family(line), line["pass"]) == (family, kind)
        ]
        axes.plot(
            [line["flops"] / line["bytes"] for line in mine],
            [line["tflops"] for line in mine],
            MARKERS[family],
            label=f"{kind}{TITLES[family]}",
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte",
        ylabel="TFLOP/s",
        title=f"{OURS}, {device}",
    )
    axes.legend()
    return figure


def rows(lines, device):
    """Time of one layer against its rows, beside all others."""
    from matplotlib import pyplot

    groups = defaultdict(list)
    for line in lines:
        found = re.fullmatch(r"(.*), (\d+) rows", line["layer"])
        if found and line["pass"] == "forward" and not line["dropout"]:
            groups[f"{found[1]}{TITLES[results.family(line)]}"].append(line)
    if not groups:
        return None
    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(6 * len(groups), 4.2), squeeze=False
    )
    for axis, (name, mine) in zip(axes[0], groups.items(), strict=True):
        mine.sort(key=lambda line: line["shape"][0])
        for peer, colour in colours(lines).items():
            points = [
                (line["shape"][0], multiple(line, peer))
                for line in mine
                if peer in {OURS, *line["ratio"]}
            ]
            axis.plot(
                *zip(*points, strict=True), "o-", color=colour, label=peer
            ) if points else None
        axis.set(
            xscale="log",
            xlabel="rows",
            ylabel="time ÷ the frozen layer's",
            title=f"{name}, forward, {device}",
        )
        axis.legend()
    return figure
