"""peftops quantize: the linear layers of a transformers checkpoint in 4 bits, as transformers + bitsandbytes load them.

Shard by shard, so that memory holds little more than one. Run it again after an interruption and it goes on.
"""

import json
import math
import shutil
from pathlib import Path

from . import BadInput, Parser, find_device, need, one_line, refusing, sentence

PLAIN = {"highlight": False, "soft_wrap": True, "markup": False}  # a name is text to rich, whatever it holds


def options(argv):
    parser = Parser("peftops quantize", description=__doc__)
    parser.add_argument("model", metavar="MODEL", type=Path, help="a folder with config.json and safetensors")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder, or one that was interrupted")
    parser.add_argument("--blocksize", type=int, default=64, help="elements that share a scale: 32, 64 … 4096")
    parser.add_argument("--no-double-quant", action="store_true", help="keep the scales in fp32")
    parser.add_argument("--quant-type", default="nf4", choices=["nf4", "fp4"], help="the table of the 16 codes")
    parser.add_argument("--device", default="cpu", help="where to compute")
    return parser.parse_args(argv)


def main(argv=None):
    try:
        return run(options(argv))
    except BadInput as error:  # names of files and keys may hold anything
        raise BadInput(one_line(str(error))) from None


def run(o):
    need("transformers", "safetensors", "rich")
    from rich.console import Console
    from safetensors import SafetensorError

    from ..integrations.transformers_files import checkpoint, output
    from ..ops.nf4_state import BLOCKS

    if o.blocksize not in BLOCKS:
        raise BadInput(f"--blocksize must be one of {', '.join(map(str, BLOCKS))}, got {o.blocksize}")
    device = find_device(o.device)
    o.model, o.out = o.model.resolve(), o.out.resolve()
    refuse_nested(o)
    with refusing():
        model = checkpoint.load(o.model)
    origin = describe(o, model, device)
    with refusing():
        output.begin(o.out, origin)
    console = Console()
    try:
        worst, total = make_shards(o, model, device, console)
        links = finish(o, model, total)
    except BadInput:
        output.take_back(o.out, model.shards)
        raise
    except (OSError, SafetensorError) as error:
        raise BadInput(f"stopped: {sentence(error)}; run it again to go on where it stopped") from None
    console.print(table(worst))
    if model.kept:
        console.print(f"{len(model.kept)} linear layers stay as they are: loading makes them of several tensors.")
    if links:
        console.print(one_line(f"{len(links)} links were not copied, such as {links[0].name}."), **PLAIN)
    before, after = (sum((folder / name).stat().st_size for name in model.shards) for folder in (o.model, o.out))
    sizes = f"{before / 1e6:,.1f} MB → {after / 1e6:,.1f} MB ({after / before:.1%})"
    console.print(f"{sizes} in {one_line(str(o.out))}", **PLAIN)
    return 0


def refuse_nested(o):
    if o.out == o.model:
        raise BadInput(f"OUT must not be MODEL itself: {o.out}")
    if o.model in o.out.parents:
        raise BadInput(f"OUT must not lie inside MODEL: {o.out}")
    if o.out in o.model.parents:
        raise BadInput(f"MODEL must not lie inside OUT: {o.model}")


def describe(o, model, device):
    """What the result depends on; going on with something else would mix two models."""
    from .. import __version__

    stats = {file.name: file.stat() for file in model.files}
    return {
        "blocksize": o.blocksize, "double_quant": not o.no_double_quant, "quant_type": o.quant_type,
        "device": device.type, "peftops": __version__,
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }  # fmt: skip


def make_shards(o, model, device, console):
    """({kind of layer: (layers, worst error)}, bytes of all tensors); shards that are there already are not redone."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    worst, total, weight_map = {}, 0, {}
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("quantize", total=len(model.linear))
        for name, keys in model.shards.items():
            layers = sum(key in model.linear for key in keys)
            progress.update(bar, description=one_line(name))
            done = measure(o, model, name, device)
            if done is None:
                write_shard(o, model, name, device, lambda: progress.advance(bar))
                done = measure(o, model, name, device)
                if done is None:
                    raise OSError(f"{o.out / name} does not hold what was written to it")
            else:
                progress.advance(bar, layers)
            errors, sizes = done
            total += sum(sizes.values())
            weight_map |= dict.fromkeys(sizes, name)
            for key, error in errors.items():
                count, most = worst.get(kind(key), (0, 0.0))
                worst[kind(key)] = count + 1, worse(most, error)
    return worst, (total, weight_map)


def worse(a, b):
    """The larger of two errors; NaN is larger than any."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def write_shard(o, model, name, device, tick):
    """Quantized weights are held until the file is written; all else goes from file to file."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from ..integrations.transformers_files import output
    from ..ops.nf4 import NF4Weight

    with safe_open(o.model / name, framework="pt") as source:
        tensors = {}
        for key in model.shards[name]:
            w = as_loaded(source, model, key, device)
            if key not in model.linear:
                tensors[key] = w
                continue
            refuse_infinite(key, w)
            q = NF4Weight.quantize(w, o.blocksize, not o.no_double_quant, o.quant_type)
            state = {part: t.to("cpu", copy=True) for part, t in q.state_dict(key).items()}  # tables are shared
            try:
                NF4Weight.load(state, key)
            except ValueError as error:  # its scales are too large for fp32
                raise BadInput(f"{key} cannot be quantized: {sentence(error)}") from None
            tensors |= state
            tick()

        def write(beside):
            with torch.no_grad():
                save_file(tensors, beside, metadata={"format": "pt"})

        output.put(o.out, name, write)


def refuse_infinite(key, w):
    """BadInput where values are not finite: they would spoil all that share a scale with them, or the whole weight."""
    if all(end.isfinite() for end in w.aminmax()):
        return
    count = sum(piece.numel() - int(piece.isfinite().sum()) for piece in w.split(256))
    layer = key.removesuffix(".weight")
    raise BadInput(f"{layer} cannot be quantized: {count} of its {w.numel()} weights are NaN or infinite in {w.dtype}")


def as_loaded(source, model, key, device):
    """The tensor as transformers would load it, and hand it to bitsandbytes: in the model's dtype, (out, in)."""
    w = source.get_tensor(key)
    w = w.to(device if key in model.linear else w.device, model.dtypes.get(key, w.dtype))
    return w.T.contiguous() if model.linear.get(key) else w


def measure(o, model, name, device):
    """({weight: ‖W − Ŵ‖ ÷ ‖W‖}, {key: bytes}) of a shard on disk, or None where it is not whole."""
    from safetensors import SafetensorError, safe_open

    from ..integrations.transformers_files.checkpoint import state_parts
    from ..ops.nf4 import NF4Weight

    if not (o.out / name).is_file():
        return None
    errors, sizes = {}, {}
    try:
        with safe_open(o.model / name, framework="pt") as source, safe_open(o.out / name, framework="pt") as out:
            written = set(out.keys())
            for key in model.shards[name]:
                beside = [key + part for part in state_parts()] if key in model.linear else []
                parts = [key, *(part for part in beside if part in written)]
                tensors = {part: out.get_tensor(part) for part in parts}
                sizes |= {part: t.nbytes for part, t in tensors.items()}
                w = as_loaded(source, model, key, device)
                if key in model.linear:
                    errors[key] = distance(w, NF4Weight.load(tensors, key).to(device))
                elif not same(tensors[key], w):
                    return None
            return (errors, sizes) if written == set(sizes) else None
    except (SafetensorError, ValueError, TypeError):
        return None


def same(a, b):
    """To the bit: NaN equals itself."""
    import torch

    return a.dtype == b.dtype and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def distance(w, q):
    """In pieces, since a layer in fp32 would be twice its size."""
    pieces = zip(w.split(256), q.dequantize().split(256), strict=True)
    squares = [((a.float() - b.float()).square().sum(), a.float().square().sum()) for a, b in pieces]
    lost, whole = (sum(values).item() for values in zip(*squares, strict=True))
    return (lost / whole) ** 0.5 if whole else lost


def kind(key):
    """q_proj of model.layers.0.self_attn.q_proj.weight"""
    return next((part for part in key.removesuffix(".weight").split(".")[::-1] if not part.isdigit()), key)


def finish(o, model, totals):
    """What is beside the weights; config.json is the last to come, and without it nothing loads OUT.

    Returns the links that are not copied.
    """
    import transformers

    from ..integrations.transformers_files import output
    from ..integrations.transformers_files.checkpoint import CONFIG, INDEX
    from ..integrations.transformers_files.folder import beside_weights

    total, weight_map = totals
    files, links = beside_weights(o.model)
    for file in files:
        if file.name not in (CONFIG, output.UNFINISHED) and not file.name.endswith(".index.json"):
            name = file.relative_to(o.model)
            output.put(o.out, name, lambda path, file=file: shutil.copyfile(file, path))
    if model.index:
        metadata = {**(model.index.get("metadata") or {}), "total_size": total}
        put_json(o.out, INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
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
        config["dtype"] = dtype  # else it would be guessed from what is fp32: the scales
    put_json(o.out, CONFIG, config)
    output.end(o.out)
    return links


def put_json(out, name, value):
    from ..integrations.transformers_files import output

    output.put(out, name, lambda path: path.write_text(json.dumps(value, indent=2) + "\n"))


def table(worst):
    from rich.table import Table
    from rich.text import Text

    view = Table()
    for column in ("layer", "number", "worst ‖W − Ŵ‖ ÷ ‖W‖"):
        view.add_column(column, justify="left" if column == "layer" else "right")
    for name, (count, error) in worst.items():
        view.add_row(Text(one_line(name)), str(count), f"{error:.4f}")
    return view
