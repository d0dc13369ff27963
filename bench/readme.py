"""peftops bench readme: rewrites README's tables from the newest results."""

from collections import defaultdict
from pathlib import Path

from peftops.cli import BadInput, Parser, replace

from . import results
from .peers import BASE, OURS

MARKS = "<!-- bench -->", "<!-- /bench -->"
COLUMNS = "torch", "torch.compile", "PEFT", "PEFT, narrow adapters", "PEFT, compiled"


def main(argv=None):
    parser = Parser("peftops bench readme", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="DIR", default=results.RESULTS, help="where the results are")
    o = parser.parse_args(argv)
    rewrite(results.HERE.parent / "README.md", o.out)
    return 0


def rewrite(target, folder):
    lines = results.newest(folder)
    try:
        text = target.read_text()
        head, (_, tail) = text.split(MARKS[0])[0], text.split(MARKS[0])[1].split(MARKS[1])
    except (OSError, IndexError, ValueError):
        raise BadInput(f"{target} must exist and hold {MARKS[0]} and {MARKS[1]} once") from None
    body = "\n".join([MARKS[0], *tables(lines), MARKS[1]])
    replace(target, lambda beside: beside.write_text(head + body + tail))


def tables(lines):
    """Markdown: a table for each device, times as multiples of the frozen layer's, and milliseconds on a GPU.

    From the medians of ratios within a round, which a machine that slows down for a while does not move.
    """
    for name in sorted({line["device"] for line in lines}):
        shown = [line for line in lines if line["device"] == name and in_table(line)]
        if not shown:
            continue
        gpu, last = any("driver" in line for line in shown), max(shown, key=lambda line: line["date"])
        made = " / ".join(sorted({line["commit"] for line in shown}))
        versions = ", ".join(f"{package} {number}" for package, number in last["versions"].items())
        driver = f", driver {last['driver']}" if gpu else ""
        where = f"{name}{driver}, commit {made}, {last['date'][:10]}, {versions}"
        yield f"\n{where}. Times as multiples of the frozen layer's:\n"
        peers = [peer for peer in COLUMNS if any(peer in line["ratio"] for line in shown)]
        peers += sorted({peer for line in shown for peer in line["ratio"]} - {BASE, *peers})
        titles = ["layer", "m, k, n, r", "dtype", "dropout", "pass", *peers, "**peftops**", "of PEFT's time"]
        titles += ["ms", "of the roofline", "path"] if gpu else []
        yield f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}"
        yield from (f"| {' | '.join(cells(line, peers, gpu))} |" for line in shown)
        yield f"\n{absentees(shown)}"


def in_table(line):
    """Without what only plots show: passes forward where there are backward ones too, and the sweep over rows."""
    few = line.get("op") == "lora_gemv" or line["shape"][0] == 1
    return (line["pass"] != "forward" or few) and not line["layer"].endswith(" rows")


def cells(line, peers, gpu):
    mode = "graph_" if gpu and "graph_ms" in line else ""
    ratio = line[f"{mode}ratio"]
    own = ratio[BASE]
    times = [f"{own / ratio[peer]:.2f}" if peer in ratio else "–" for peer in peers]
    facts = [line["layer"], ", ".join(map(str, line["shape"])), line["dtype"], str(line["dropout"]), line["pass"]]
    way = ", ".join(filter(None, (line.get("backend"), line.get("path"))))
    extra = [f"{line[f'{mode}ms'][OURS][1]:.4g}", f"{line.get('roofline', 0):.0%}", way] if gpu else []
    return [*facts, *times, f"**{own:.2f}**", f"{ratio['PEFT']:.2f}" if "PEFT" in ratio else "–", *extra]


def absentees(lines):
    """Who was not there in any of the lines, by their reasons."""
    reasons = defaultdict(set)
    for line in lines:
        for peer, why in line.get("absent", {}).items():
            reasons[why] |= {peer} - set(line["ratio"])
    parts = [f"{', '.join(sorted(peers))} ({why})" for why, peers in sorted(reasons.items()) if peers]
    return f"Absent: {'; '.join(parts)}.\n" if parts else ""
