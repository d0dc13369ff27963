"""peftops <command> [options]; without a command, doctor."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from .cli import BadInput

COMMANDS = {
    "doctor": (
        ".cli.doctor",
        "what runs here, on which kernels, and whether it computes right",
    ),
    "demo": (
        ".cli.demo",
        "fine-tune a small real model with stock PEFT and with peftops, side by side",
    ),
    "quantize": (
        ".cli.quantize",
        "write a checkpoint whose linear layers take 4 bits, as bitsandbytes loads it",
    ),
    "check": (
        ".cli.check",
        "whether a saved adapter loads, and all of it counts, in PEFT, vLLM and SGLang",
    ),
    "bench": (".bench.__main__", "time an op on this machine beside its peers"),
}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    name, *rest = argv or ["doctor"]
    if name in ("-h", "--help"):
        print("usage: peftops COMMAND [--help]\n")
        print("\n".join(f"  {command:8} {text}" for command, (_, text) in COMMANDS.items()))
        return 0
    try:
        if name == "--version":
            from . import __version__

            print(__version__)
            return 0
        if name not in COMMANDS:
            raise BadInput(f"there is no command {name!r}; there are {', '.join(COMMANDS)}")
        if name == "bench" and not has_bench():
            raise BadInput("bench is not installed here: pip install -e .")
        return import_module(COMMANDS[name][0], "peftops").main(rest)
    except BadInput as error:
        print(
            f"peftops {name}: {error}" if name in COMMANDS else f"peftops: {error}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def has_bench():
    """Whether peftops.bench is that of this package.

    It lies in the package where that is installed, and beside it in a checkout. A checkout that is
    not installed has none, or is offered that of another one.
    """
    spec = find_spec("peftops.bench")
    if spec is None or spec.origin is None:
        return False
    package = Path(__file__).resolve().parent
    return Path(spec.origin).resolve().parent in (package / "bench", package.parent / "bench")


if __name__ == "__main__":
    sys.exit(main())
