"""peftops quantize: writes a transformers checkpoint with its linear layers in 4 bits.

transformers + bitsandbytes load the result. The command works shard by shard, so that memory
holds little more than one. Run it again after an interruption and it goes on.
"""

import math
from functools import partial
from pathlib import Path

from . import BadInput, Parser, find_device, need, one_line, refusing, sentence

PLAIN = {
    "highlight": False,
    "soft_wrap": True,
    "markup": False,
}  # rich shows names as they are


def options(argv):
    parser = Parser("peftops quantize", description=__doc__)
    parser.add_argument(
        "model",
        metavar="MODEL",
        type=Path,
        help="a folder with config.json and safetensors",
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        type=Path,
        help="a new folder, or one that was interrupted",
    )
    parser.add_argument(
        "--blocksize",
        type=int,
        default=64,
        help="elements that share a scale: 32, 64 … 4096",
    )
    parser.add_argument(
        "--no-double-quant",
        action="store_true",
        help="keep the scales in fp32",
    )
    parser.add_argument(
        "--quant-type",
        default="nf4",
        choices=["nf4", "fp4"],
        help="the table of the 16 codes",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="where to compute",
    )
    return parser.parse_args(argv)


def main(argv=None):
    try:
        return run(options(argv))
    except BadInput as error:  # names of files and keys may hold anything
        raise BadInput(one_line(str(error))) from None


def run(o):
    need("transformers", "safetensors", "rich", extra="demo")
    import transformers
    from rich.console import Console
    from safetensors import SafetensorError

    from ..integrations.transformers import checkpoint, output, shards
    from ..ops.nf4_state import BLOCKS

    if o.blocksize not in BLOCKS:
        raise BadInput(
            f"--blocksize must be one of {', '.join(map(str, BLOCKS))}, got {o.blocksize}"
        )
    device = find_device(o.device)
    transformers.utils.logging.set_verbosity_error()
    o.model = o.model.resolve()
    o.out = o.out.resolve()
    refuse_nested(o)
    with refusing():
        model = checkpoint.load(o.model)
    origin = describe(o, model, device)
    with refusing():
        output.begin(o.out, origin)
    console = Console()
    try:
        written = write_shards(o, model, device, console)
        links = shards.finish(model, o.out, written, make_config(o, model))
    except BadInput:
        output.take_back(o.out, model.shards)
        raise
    except (OSError, SafetensorError) as error:
        message = f"stopped: {sentence(error)}; run it again to go on where it stopped"
        raise BadInput(message) from None
    show(o, model, worst_errors(written), links, console)
    return 0


def refuse_nested(o):
    if o.out == o.model:
        raise BadInput(f"OUT must not be MODEL itself: {o.out}")
    if o.model in o.out.parents:
        raise BadInput(f"OUT must not lie inside MODEL: {o.out}")
    if o.out in o.model.parents:
        raise BadInput(f"MODEL must not lie inside OUT: {o.model}")


def describe(o, model, device):
    """What the result depends on. A run that goes on must have the same, else two models mix."""
    from .. import __version__

    return {
        "blocksize": o.blocksize,
        "double_quant": not o.no_double_quant,
        "quant_type": o.quant_type,
        "device": device.type,
        "peftops": __version__,
        "files": model.stamps(),
    }


def write_shards(o, model, device, console):
    """{name: Shard}, with a progress bar."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    from ..integrations.transformers.checkpoint import state_endings
    from ..integrations.transformers.shards import ShardWriter

    description = TextColumn("{task.description}", markup=False)
    columns = [description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    make = partial(quantize_weight, o, model)
    measure = partial(error_of_weight, model)
    writer = ShardWriter(
        model,
        o.out,
        device,
        model.linear,
        make,
        measure,
        state_endings(),
    )
    written = {}
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("quantize", total=len(model.linear))
        for name in model.shards:
            progress.update(bar, description=one_line(name))
            written[name] = writer.ensure(name, partial(progress.advance, bar))
    return written


def quantize_weight(o, model, key, w):
    """The state of the 4-bit weight, as bitsandbytes saves it."""
    from ..ops.nf4 import NF4Weight

    w = as_linear(model, key, w)
    refuse_infinite(key, w)
    q = NF4Weight.quantize(w, o.blocksize, not o.no_double_quant, o.quant_type)
    # The copies are separate: the tensors of all weights share their tables.
    state = {name: t.to("cpu", copy=True) for name, t in q.state_dict(key).items()}
    try:
        NF4Weight.load(state, key)
    except ValueError as error:  # its scales are too large for fp32
        raise BadInput(f"{key} cannot be quantized: {sentence(error)}") from None
    return state


def as_linear(model, key, w):
    """The weight as transformers hands it to bitsandbytes: (out, in)."""
    return w.T.contiguous() if model.linear[key] else w


def refuse_infinite(key, w):
    """BadInput if values are not finite: they would spoil all others of the same scale."""
    if all(end.isfinite() for end in w.aminmax()):
        return
    count = sum(piece.numel() - int(piece.isfinite().sum()) for piece in w.split(256))
    layer = key.removesuffix(".weight")
    raise BadInput(
        f"{layer} cannot be quantized:"
        f" {count} of its {w.numel()} weights are NaN or infinite in {w.dtype}"
    )


def error_of_weight(model, key, w, state):
    """‖W − Ŵ‖ ÷ ‖W‖, or ValueError where the state is broken."""
    from ..ops.nf4 import NF4Weight

    q = NF4Weight.load(state, key).to(w.device)
    return distance(as_linear(model, key, w), q)


def distance(w, q):
    """‖W − Ŵ‖ ÷ ‖W‖, or ‖Ŵ‖² where W is zero.

    It works on pieces, since a whole layer in fp32 takes twice the memory of one in bf16.
    """
    lost = 0
    whole = 0
    for a, b in zip(w.split(256), q.dequantize().split(256), strict=True):
        lost += (a.float() - b.float()).square().sum()
        whole += a.float().square().sum()
    lost = lost.item()
    whole = whole.item()
    return (lost / whole) ** 0.5 if whole else lost


def worst_errors(shards):
    """{type of layer: (number of layers, worst error)}"""
    worst = {}
    for shard in shards.values():
        for key, error in shard.errors.items():
            name = layer_type(key)
            count, most = worst.get(name, (0, 0.0))
            worst[name] = count + 1, worse(most, error)
    return worst


def worse(a, b):
    """The larger of two errors. NaN is larger than any."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def layer_type(key):
    """q_proj of model.layers.0.self_attn.q_proj.weight"""
    names = key.removesuffix(".weight").split(".")
    return next((name for name in reversed(names) if not name.isdigit()), key)


def make_config(o, model):
    """config.json, which tells transformers how the weights are quantized."""
    import transformers

    dtype = str(model.dtype).removeprefix("torch.")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=o.quant_type,
        bnb_4bit_use_double_quant=not o.no_double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=model.skipped,
    )
    config = {**model.config, "quantization_config": settings.to_dict()}
    if not config.get("dtype") and not config.get("torch_dtype"):
        config["dtype"] = (
            dtype  # else transformers would take the dtype of the scales, fp32
        )
    return config


def show(o, model, worst, links, console):
    console.print(table(worst))
    if model.kept:
        console.print(
            f"{len(model.kept)} linear layers stay as they are:"
            " loading makes them of several tensors."
        )
    if links:
        text = f"{len(links)} links were not copied, such as {links[0].name}."
        console.print(one_line(text), **PLAIN)
    before = sum((o.model / name).stat().st_size for name in model.shards)
    after = sum((o.out / name).stat().st_size for name in model.shards)
    sizes = f"{before / 1e6:,.1f} MB → {after / 1e6:,.1f} MB ({after / before:.1%})"
    console.print(f"{sizes} in {one_line(str(o.out))}", **PLAIN)


def table(worst):
    from rich.table import Table
    from rich.text import Text

    view = Table()
    for column in ("layer", "number", "worst ‖W − Ŵ‖ ÷ ‖W‖"):
        view.add_column(column, justify="left" if column == "layer" else "right")
    for name, (count, error) in worst.items():
        view.add_row(Text(one_line(name)), str(count), f"{error:.4f}")
    return view
