"""peftops bench: time kernels on this machine beside their peers, after proving that they compute right.

ROW: lora, nf4 (by default both). Commands: model (whole training steps and generation), readme (rewrites README's
tables), plot (draws results), compare COMMIT (this tree against another), static (what compilers make of the GPU
kernels), check (everything a GPU can tell, in one go); each has its own --help.
"""

import importlib
import sys
from pathlib import Path

from peftops.cli import BadInput, Parser, find_device, need, probability

from . import results
from .progress import Progress

ROWS = ("lora", "nf4")
COMMANDS = ("model", "readme", "plot", "compare", "static", "check")
BACKENDS = ("triton", "cuda", "cpu", "reference")


def options(argv):
    parser = Parser("peftops bench", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; by default all")
    common(parser)
    parser.add_argument("--backend", type=backends, default=(), metavar="NAME,…", help="these beside the one in use")
    parser.add_argument("--shape", type=shape, metavar="m,k,n,r", help="instead of the layers of real models")
    parser.add_argument("--peers", metavar="NAME,…", type=lambda text: text.split(","), help="only these beside ours")
    return parser.parse_args(argv)


def common(parser):
    """What rows and model share."""
    parser.add_argument("--device", help="by default cuda where there is a GPU, else cpu")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--dropout", type=probability, help="by default 0 and 0.1")
    parser.add_argument("--quick", action="store_true", help="the smallest, in few rounds")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to append results, by default bench/results")


def shape(text):
    sizes = text.split(",")
    if len(sizes) != 4 or not all(size.isdigit() and int(size) for size in sizes):
        raise BadInput(f"--shape must be four whole numbers m,k,n,r, got {text!r}")
    return tuple(map(int, sizes))


def backends(text):
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in BACKENDS]:
        raise BadInput(f"--backend must be of {', '.join(BACKENDS)}, got {unknown[0]!r}")
    return names


def main(argv=None):
    name = argv[0] if argv else ""
    if name in COMMANDS:
        return importlib.import_module(f".{name}", __package__).main(argv[1:])
    o = options(argv)
    if unknown := [row for row in o.rows if row not in ROWS]:
        raise BadInput(f"there is no row {unknown[0]!r}; there are {', '.join(ROWS)} and {', '.join(COMMANDS)}")
    need("torch", "peft")
    return run(o, [importlib.import_module(f".{row}", __package__) for row in o.rows or ROWS])


def run(o, rows):
    """Holds the rows to the law, then measures, shows and keeps."""
    from .measure import measure, show, unlawful

    device, dtype = find_device(o.device), torch_dtype(o.dtype)
    if o.out and o.out.exists() and not o.out.is_dir():
        raise BadInput(f"--out must be a folder, got {o.out}")
    for row in rows:
        if wrong := unlawful(row, dtype, device):
            print(wrong)
            return 1
    folder, why = (o.out, None) if o.out else results.place()
    if why:
        print(f"Results are only shown, since {why}.")
    about = results.describe(device)
    with Progress() as progress:
        for row in rows:
            for line in measure(row, o, dtype, device, progress):
                show(line)
                if folder:
                    here = about | {"row": row.__name__.rpartition(".")[2], "dtype": o.dtype}
                    results.append(folder / f"{results.slug(about['device'])}.jsonl", here | line)
    return 0


def torch_dtype(name):
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


if __name__ == "__main__":
    from peftops.__main__ import main as command

    raise SystemExit(command(["bench", *sys.argv[1:]]))
