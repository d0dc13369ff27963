"""peftops bench plot: draws the newest results as PNG and SVG: bars beside peers, the roofline, cost against rows."""

import re
from collections import defaultdict
from pathlib import Path

from peftops.cli import BadInput, Parser, need, replace

from . import results
from .peers import BASE, OURS

COLOURS = {BASE: "#888888", "torch": "#c7b42e", "torch.compile": "#8c6d31", "PEFT": "#d62728"}
COLOURS |= {"PEFT, narrow adapters": "#ff9896", "PEFT, compiled": "#e377c2", OURS: "#1f77b4"}


def main(argv=None):
    parser = Parser("peftops bench plot", description=__doc__)
    parser.add_argument("--results", type=Path, metavar="DIR", default=results.RESULTS)
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("peftops-plots"))
    o = parser.parse_args(argv)
    need("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "peftops", "figure.constrained_layout.use": True, "font.size": 9}
    lines = results.newest(o.results)
    if o.out.exists() and not o.out.is_dir():
        raise BadInput(f"--out must be a folder, got {o.out}")
    for device in sorted({line["device"] for line in lines}):
        mine = [line for line in lines if line["device"] == device]
        for name, draw in {"bars": bars, "roofline": roofline, "rows": rows}.items():
            if figure := draw(mine, device):
                for kind in ("png", "svg"):
                    save(figure, o.out / f"{results.slug(device)}-{name}.{kind}")
                    print(o.out / f"{results.slug(device)}-{name}.{kind}")
    return 0


def save(figure, path):
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    replace(path, lambda beside: figure.savefig(beside, format=path.suffix[1:], dpi=130, metadata=metadata))


def bars(lines, device):
    """Time as a multiple of the frozen layer's, for each layer."""
    from matplotlib import pyplot

    shown = [line for line in lines if not line["layer"].endswith(" rows") and line.get("op") not in (None, "host")]
    if not shown:
        return None
    shown.reverse()  # bars are stacked upwards
    peers = [peer for peer in COLOURS if any(peer in line["ms"] for line in shown)]
    figure, axes = pyplot.subplots(figsize=(9, 0.62 * len(shown) + 1.6))
    height = 0.8 / len(peers)
    for i, peer in enumerate(peers):
        values = [multiple(line, peer) for line in shown]
        places = [j + (len(peers) / 2 - i - 0.5) * height for j in range(len(shown))]
        axes.barh(places, values, height * 0.92, color=COLOURS[peer], label=peer)
    names = [f"{line['layer']}, p = {line['dropout']}, {line['pass']}, {line['dtype']}" for line in shown]
    axes.set_yticks(range(len(shown)), names)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.axvline(1, color="#444444", linewidth=0.8)
    axes.set(xlabel="time ÷ the frozen layer's (shorter is better)", title=device)
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
    top, slope = max(line["gemm_tflops"] for line in shown), max(line["copy_gbps"] for line in shown) / 1000
    least = min(line["flops"] / line["bytes"] for line in shown) / 2
    axes.plot([least, top / slope, 4000], [least * slope, top, top], color="#444444", label="copy, matrix product")
    for kind in sorted({line["pass"] for line in shown}):
        mine = [line for line in shown if line["pass"] == kind]
        axes.plot([line["flops"] / line["bytes"] for line in mine], [line["tflops"] for line in mine], "o", label=kind)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s", title=f"{OURS}, {device}")
    axes.legend()
    return figure


def rows(lines, device):
    """Time of one layer against its rows, beside the frozen layer and PEFT."""
    from matplotlib import pyplot

    groups = defaultdict(list)
    for line in lines:
        found = re.fullmatch(r"(.*), (\d+) rows", line["layer"])
        if found and line["pass"] == "forward" and not line["dropout"]:
            groups[found[1]].append(line)
    if not groups:
        return None
    figure, axes = pyplot.subplots(1, len(groups), figsize=(6 * len(groups), 4.2), squeeze=False)
    for axis, (name, mine) in zip(axes[0], groups.items(), strict=True):
        mine.sort(key=lambda line: line["shape"][0])
        for peer, colour in COLOURS.items():
            points = [(line["shape"][0], multiple(line, peer)) for line in mine if peer in line["ms"]]
            axis.plot(*zip(*points, strict=True), "o-", color=colour, label=peer) if points else None
        axis.set(xscale="log", xlabel="rows", ylabel="time ÷ the frozen layer's", title=f"{name}, forward, {device}")
        axis.legend()
    return figure
