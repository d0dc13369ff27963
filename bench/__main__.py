"""peftops bench: check that the kernels compute right, then time them beside their peers.

ROW: lora, nf4, dora, multi, merge (by default all). Commands: model (whole training steps and
generation), host (how long a layer keeps the host of a GPU busy), readme (rewrites the tables of
docs/benchmarks.md), plot (draws results), compare COMMIT [ROW ...] (this tree against another),
static (what compilers make of the GPU kernels), gpu (everything a GPU can tell, in one go); each
has its own --help.
"""

import importlib
import sys

from peftops.cli import (
    BadInput,
    Parser,
    find_device,
    folder,
    need,
    probability,
    sentence,
)

from . import results
from .progress import Progress

ROWS = ("lora", "nf4", "dora", "multi", "merge")
COMMANDS = {
    "model": ".model",
    "host": ".host",
    "readme": ".readme",
    "plot": ".plot",
    "compare": ".compare",
    "static": ".proof.static",
    "gpu": ".proof.gpu",
}
BACKENDS = ("triton", "cuda", "cpu", "reference")


def options(argv):
    parser = Parser("peftops bench", description=__doc__)
    parser.add_argument(
        "rows",
        nargs="*",
        metavar="ROW",
        help=f"of {', '.join(ROWS)}; by default all",
    )
    common(parser)
    parser.add_argument(
        "--backend",
        type=backends,
        default=(),
        metavar="NAME,…",
        help=f"these beside the one in use, of {', '.join(BACKENDS)}",
    )
    parser.add_argument(
        "--shape",
        type=shape,
        metavar="m,k,n,r",
        help="one layer instead of those of real models",
    )
    parser.add_argument(
        "--peers",
        metavar="NAME",
        action="append",
        help="only this one beside ours; may be repeated",
    )
    return parser.parse_args(argv)


def common(parser):
    """Adds the options that rows and model share."""
    parser.add_argument(
        "--device", help="by default cuda where there is a GPU, else cpu"
    )
    parser.add_argument(
        "--dtype",
        default="bf16",
        choices=["bf16", "fp16", "fp32"],
        help="of weights and input",
    )
    parser.add_argument(
        "--dropout",
        type=probability,
        help="by default 0 and 0.1; few rows go without",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the smallest, in few rounds",
    )
    parser.add_argument(
        "--out",
        type=folder,
        metavar="DIR",
        help="where to append results, by default bench/results for whole runs",
    )


def shape(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if len(sizes) != 4 or not all(size.isdecimal() and int(size) for size in sizes):
        raise BadInput(f"--shape must be four whole numbers m,k,n,r, got {text!r}")
    return tuple(map(int, sizes))


def backends(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in BACKENDS]:
        raise BadInput(
            f"--backend must be of {', '.join(BACKENDS)}, got {unknown[0]!r}"
        )
    return names


def main(argv=None):
    name = argv[0] if argv else ""
    if name in COMMANDS:
        try:
            return importlib.import_module(COMMANDS[name], __package__).main(argv[1:])
        except BadInput as error:
            print(f"peftops bench {name}: {error}", file=sys.stderr)
            return 2
    if name == "check":
        raise BadInput("check is now called gpu: peftops bench gpu")
    o = options(argv)
    if unknown := [row for row in o.rows if row not in ROWS]:
        raise BadInput(
            f"there is no row {unknown[0]!r};"
            f" there are {', '.join(ROWS)} and {', '.join(COMMANDS)}"
        )
    need("torch", "peft", extra="bench")
    names = dict.fromkeys(o.rows or ROWS)
    rows = [importlib.import_module(f".{row}", __package__) for row in names]
    device = find_device(o.device)
    dtype = torch_dtype(o.dtype)
    refuse_impossible(o, rows, device, dtype)
    return run(o, rows, device, dtype)


def refuse_impossible(o, rows, device, dtype):
    """BadInput where this machine lacks the peers, a backend or the memory for the shape."""
    from . import timing
    from .peers import known

    if o.peers:
        o.peers = known(o.peers)
    for name in o.backend:
        for row in rows:
            if why := unserved(name, row, device):
                raise BadInput(f"--backend {name} cannot run here ({why})")
    if not o.shape:
        return
    free = timing.free(device)
    m, k, n, r = o.shape
    weights = n * k + r * (k + n)
    activations = 2 * m * (k + n)  # the input, the output and their gradients
    least = dtype.itemsize * (weights + activations)
    if least > free:
        raise BadInput(
            f"--shape takes {least / 1e9:,.1f} GB at least, and {free / 1e9:,.1f} GB are free"
        )


def unserved(name, row, device):
    """Why a backend serves no op of a row on this device, or None if it serves one."""
    from peftops import backends

    for op in row.OPS:
        try:
            backends.choose(op, name, device.type, False)
        except NotImplementedError as error:
            why = sentence(error)
        else:
            return None
    return why


def run(o, rows, device, dtype):
    """Checks that each row computes right, then measures, prints and stores its results."""
    from .measure import measure, show, unlawful

    for row in rows:
        if wrong := unlawful(row, dtype, device):
            print(wrong)
            return 1
    folder, why = results.keep(o)
    if why:
        print(f"Results are only shown, since {why}.")
    if o.dropout and any_few(o, rows, device, dtype):
        print("Few rows are measured without dropout, since they are a generation's.")
    origin = results.describe(device)
    lines = []
    with Progress() as progress:
        for row in rows:
            fields = origin | {"row": row.__name__.rpartition(".")[2], "dtype": o.dtype}
            for line in measure(
                row,
                o,
                dtype,
                device,
                progress,
                others=not o.shape,
            ):
                show(line)
                lines.append(line)
                if folder:
                    file = folder / f"{results.slug(origin['device'])}.jsonl"
                    results.append(file, fields | line)
    if absent := results.absentees(lines):
        print(f"Absent: {'; '.join(absent)}.")
    return 0


def any_few(o, rows, device, dtype):
    """Whether any of the problems has few rows."""
    for row in rows:
        for _, problem in row.jobs(o, dtype, device):
            if problem.few:
                return True
    return False


def torch_dtype(name: str):
    import torch

    return {
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp32": torch.float32,
    }[name]


if __name__ == "__main__":
    from peftops.__main__ import main as command

    raise SystemExit(command(["bench", *sys.argv[1:]]))
