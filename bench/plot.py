"""peftops bench plot: draws the newest results as PNG and SVG.

It draws bars of all peers, the roofline, the time of a layer against its rows, and the chart of
README.
"""

import re
from collections import defaultdict
from functools import partial
from itertools import cycle
from pathlib import Path

from peftops.cli import BadInput, Parser, folder, named, need, replace

from . import chart, results
from .peers import BASE, OURS

COLOURS = {
    BASE: "#888888",
    "torch": "#c7b42e",
    "torch.compile": "#8c6d31",
    "PEFT": "#d62728",
    "PEFT, narrow adapters": "#ff9896",
    "PEFT, compiled": "#e377c2",
    OURS: "#1f77b4",
}
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
TITLES = {"lora": "", "nf4": ", 4-bit base", "dora": ", DoRA", "multi": ", multi-LoRA"}
MARKERS = {"lora": "o", "nf4": "s", "dora": "^", "multi": "D"}
README = results.HERE.parent / "docs" / "speed"
BARS = {
    "bars" if family == "lora" else f"bars-{family}": (family, title)
    for family, title in TITLES.items()
}


def options(argv):
    parser = Parser("peftops bench plot", description=__doc__)
    parser.add_argument(
        "--results",
        type=named,
        metavar="DIR",
        default=results.RESULTS,
        help="where the results are",
    )
    parser.add_argument(
        "--out",
        type=folder,
        metavar="DIR",
        default=Path("peftops-plots"),
        help="where to draw",
    )
    parser.add_argument(
        "--readme",
        action="store_true",
        help="draw nothing but the chart of README, in its place",
    )
    return parser.parse_args(argv)


def main(argv=None):
    o = options(argv)
    need("matplotlib", extra="bench")
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "peftops",
        "svg.fonttype": "none",  # letters stay letters
        "figure.constrained_layout.use": True,
        "font.size": 9,
    }
    lines = [line for line in results.newest(o.results) if BASE in line["ratio"]]
    if o.readme:
        return draw_all({README: partial(chart.draw, lines)}, (".svg",), o.results)
    figures = {
        name: partial(bars, family, title) for name, (family, title) in BARS.items()
    }
    figures["roofline"] = roofline
    figures["rows"] = rows
    drawings = {o.out / "speed": partial(chart.draw, lines)}
    for device in sorted({line["device"] for line in lines}):
        of_device = [line for line in lines if line["device"] == device]
        for name, draw in figures.items():
            path = o.out / f"{results.slug(device)}-{name}"
            drawings[path] = partial(draw, of_device, device)
    return draw_all(drawings, (".png", ".svg"), o.results)


def draw_all(drawings, suffixes, source):
    """Draws and saves all figures for which there are results.

    Args:
        drawings: {path without suffix: a function that draws the figure, or returns None}.
        suffixes: of the files.
        source: the folder of the results, for the error where there is nothing to draw.
    """
    drawn = 0
    for path, draw in drawings.items():
        figure = draw()
        if figure is None:
            continue
        for suffix in suffixes:
            target = path.with_suffix(suffix)
            save(figure, target)
            print(target)
            drawn += 1
    if not drawn:
        raise BadInput(f"no line in {source} can be drawn")
    return 0


def colours(lines: list[dict]) -> dict[str, str]:
    """{contender: colour} of all contenders in the lines."""
    present = {peer for line in lines for peer in line["ratio"]} | {OURS}
    colours = {peer: colour for peer, colour in COLOURS.items() if peer in present}
    others = sorted(present - set(COLOURS))
    return colours | dict(zip(others, cycle(OTHERS), strict=False))


def save(figure, path):
    metadata = {"Date": None} if path.suffix == ".svg" else {}

    def write(beside):
        figure.savefig(
            beside,
            format=path.suffix[1:],
            dpi=130,
            metadata=metadata,
        )

    replace(path, write)


def bars(family, title, lines, device):
    """Time as a multiple of the frozen layer's, for each layer of a family."""
    from matplotlib import pyplot

    shown = [
        line
        for line in lines
        if results.family(line) == family
        and not results.swept(line)
        and line.get("op") not in (None, "host")
    ]
    if not shown:
        return None
    peers = colours(shown)
    shown.reverse()  # bars are stacked upwards
    figure, axes = pyplot.subplots(
        figsize=(9, max(0.62, 0.09 * len(peers)) * len(shown) + 1.6)
    )
    height = 0.8 / len(peers)
    for i, peer in enumerate(peers):
        values = [multiple(line, peer) for line in shown]
        places = [j + (len(peers) / 2 - i - 0.5) * height for j in range(len(shown))]
        axes.barh(
            places,
            values,
            height * 0.92,
            color=peers[peer],
            label=peer,
        )
    names = [
        f"{line['layer']}, p = {line['dropout']}, {line['pass']}, {line['dtype']}"
        for line in shown
    ]
    axes.set_yticks(range(len(shown)), names)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.axvline(1, color="#444444", linewidth=0.8)
    axes.set(
        xlabel="time ÷ the frozen layer's (shorter is better)", title=f"{device}{title}"
    )
    axes.legend(loc="lower right")
    return figure


def multiple(line: dict, peer: str) -> float:
    """The time of a contender as a multiple of the frozen layer's; 0 where it was not measured."""
    own = line["ratio"][BASE]
    if peer == OURS:
        return own
    return own / line["ratio"][peer] if peer in line["ratio"] else 0


def roofline(lines, device):
    """Operations a second against operations a byte.

    A copy and a matrix product on this device set the limits.
    """
    from matplotlib import pyplot

    shown = [line for line in lines if "roofline" in line]
    if not shown:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    top = max(line["gemm_tflops"] for line in shown)
    slope = max(line["copy_gbps"] for line in shown) / 1000
    least = min(line["flops"] / line["bytes"] for line in shown) / 2
    axes.plot(
        [least, top / slope, 4000],
        [least * slope, top, top],
        color="#444444",
        label="copy, matrix product",
    )
    groups = defaultdict(list)
    for line in shown:
        groups[results.family(line), line["pass"]].append(line)
    for (family, pass_name), group in sorted(groups.items(), key=lambda item: item[0]):
        axes.plot(
            [line["flops"] / line["bytes"] for line in group],
            [line["tflops"] for line in group],
            MARKERS[family],
            label=f"{pass_name}{TITLES[family]}",
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
    """Time of one layer against its rows, for all contenders."""
    from matplotlib import pyplot

    groups = defaultdict(list)
    for line in lines:
        match = re.fullmatch(r"(.*), (\d+) rows", line["layer"])
        if match and line["pass"] == "forward" and not line["dropout"]:
            groups[f"{match[1]}{TITLES[results.family(line)]}"].append(line)
    if not groups:
        return None
    figure, axes = pyplot.subplots(
        1,
        len(groups),
        figsize=(6 * len(groups), 4.2),
        squeeze=False,
    )
    for axis, (name, group) in zip(axes[0], groups.items(), strict=True):
        group.sort(key=lambda line: line["shape"][0])
        for peer, colour in colours(lines).items():
            measured = [line for line in group if peer == OURS or peer in line["ratio"]]
            if measured:
                sizes = [line["shape"][0] for line in measured]
                values = [multiple(line, peer) for line in measured]
                axis.plot(sizes, values, "o-", color=colour, label=peer)
        axis.set(
            xscale="log",
            xlabel="rows",
            ylabel="time ÷ the frozen layer's",
            title=f"{name}, forward, {device}",
        )
        axis.legend()
    return figure
