"""peftops <command> [options]; without a command, doctor."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from .cli import BadInput

COMMANDS = {  # the module of each command, and what the command does
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
    "bench": (
        ".bench.__main__",
        "time an op on this machine beside its peers",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command that argv names, sys.argv by default; returns the exit status.

    Raises nothing for bad input: BadInput is printed to stderr, and the status is 2.
    """
    if argv is None:
        argv = sys.argv[1:]
    name, *options = argv or ["doctor"]
    if name in ("-h", "--help"):
        print_usage()
        return 0
    try:
        return run(name, options)
    except BadInput as error:
        prefix = f"peftops {name}" if name in COMMANDS else "peftops"
        print(f"{prefix}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def print_usage():
    print("usage: peftops COMMAND [--help]\n")
    for command, (_, text) in COMMANDS.items():
        print(f"  {command:8} {text}")


def run(name, options):
    """Runs a command by its name and returns its exit status."""
    if name == "--version":
        from . import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        raise BadInput(f"there is no command {name!r}; there are {', '.join(COMMANDS)}")
    if name == "bench" and not has_bench():
        raise BadInput("bench is not installed here: pip install -e .")
    module, _ = COMMANDS[name]
    return import_module(module, "peftops").main(options)


def has_bench():
    """Whether peftops.bench can be imported and belongs to this package.

    An installed package holds its bench; a checkout has it beside the package. In a checkout that
    is not installed, the import may fail or give the bench of another checkout.
    """
    spec = find_spec("peftops.bench")
    if spec is None or spec.origin is None:
        return False
    package = Path(__file__).resolve().parent
    return Path(spec.origin).resolve().parent in (
        package / "bench",
        package.parent / "bench",
    )


if __name__ == "__main__":
    sys.exit(main())
