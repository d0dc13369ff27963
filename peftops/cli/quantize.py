"""peftops quantize: the linear layers of a transformers checkpoint in 4 bits, as transformers + bitsandbytes load them.

Shard by shard, so that memory holds little more than one. Run it again after an interruption and it goes on.
"""

import json
import shutil
from pathlib import Path

from . import BadInput, Parser, find_device, need, replace, sentence

UNFINISHED = "unfinished.json"  # in OUT until all is there: what it is being made of
TEMPLATES = "additional_chat_templates"
WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz", ".ot", ".tflite",
}  # fmt: skip
SMALL = 100_000_000


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
    o = options(argv)
    need("transformers", "safetensors", "rich")
    from rich.console import Console
    from safetensors import SafetensorError

    from ..ops.nf4_state import BLOCKS
    from . import checkpoint

    if o.blocksize not in BLOCKS:
        raise BadInput(f"--blocksize must be one of {', '.join(map(str, BLOCKS))}, got {o.blocksize}")
    device = find_device(o.device)
    o.model, o.out = o.model.resolve(), o.out.resolve()
    refuse_nested(o)
    model = checkpoint.load(o.model)
    origin = describe(o, model, device)
    begin(o.out, origin)
    console = Console()
    try:
        worst, total = make_shards(o, model, device, console)
        finish(o, model, total)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"stopped: {sentence(error)}; run it again to go on where it stopped") from None
    console.print(table(worst))
    if model.kept:
        console.print(f"{len(model.kept)} linear layers stay as they are: loading makes them of several tensors.")
    before, after = (sum((folder / name).stat().st_size for name in model.shards) for folder in (o.model, o.out))
    console.print(
        f"{before / 1e6:,.1f} MB → {after / 1e6:,.1f} MB ({after / before:.1%}) in {o.out}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
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


def begin(out, origin):
    """OUT is new, or was begun with the same origin, or BadInput."""
    progress = out / UNFINISHED
    try:
        held = {file.name for file in out.iterdir()} if out.exists() else set()
        if progress.is_file():
            try:
                same = json.loads(progress.read_text()) == origin
            except ValueError:
                same = False
            if not same:
                raise BadInput(f"{out} was begun from another model or with other options: finish those, or remove it")
        elif held - {UNFINISHED + ".new"}:
            raise BadInput(f"{out} is not empty: it holds {sorted(held)[0]}")
        else:
            replace(progress, lambda beside: beside.write_text(json.dumps(origin, indent=1) + "\n"))
    except OSError as error:
        raise BadInput(f"cannot write to {out}: {error.strerror}") from None


def make_shards(o, model, device, console):
    """({kind of layer: (layers, worst error)}, bytes of all tensors); shards that are there already are not redone."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    worst, total, weight_map = {}, 0, {}
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("quantize", total=len(model.linear))
        for name, keys in model.shards.items():
            layers = sum(key in model.linear for key in keys)
            progress.update(bar, description=name)
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
                worst[kind(key)] = count + 1, most if most >= error else error  # NaN is worst
    return worst, (total, weight_map)


def write_shard(o, model, name, device, tick):
    """Quantized weights are held until the file is written; all else goes from file to file."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from ..ops.nf4 import NF4Weight

    with safe_open(o.model / name, framework="pt") as source:
        tensors = {}
        for key in model.shards[name]:
            w = as_loaded(source, model, key, device)
            if key not in model.linear:
                tensors[key] = w
                continue
            q = NF4Weight.quantize(w, o.blocksize, not o.no_double_quant, o.quant_type)
            tensors |= {part: t.to("cpu", copy=True) for part, t in q.state_dict(key).items()}  # tables are shared
            tick()

        def write(beside):
            with torch.no_grad():
                save_file(tensors, beside, metadata={"format": "pt"})

        replace(o.out / name, write)


def as_loaded(source, model, key, device):
    """The tensor as transformers would load it, and hand it to bitsandbytes: in the model's dtype, (out, in)."""
    w = source.get_tensor(key)
    w = w.to(device if key in model.linear else w.device, model.dtypes.get(key, w.dtype))
    return w.T.contiguous() if model.linear.get(key) else w


def measure(o, model, name, device):
    """({weight: ‖W − Ŵ‖ ÷ ‖W‖}, {key: bytes}) of a shard on disk, or None where it is not whole."""
    from safetensors import SafetensorError, safe_open

    from ..ops.nf4 import NF4Weight

    if not (o.out / name).is_file():
        return None
    errors, sizes = {}, {}
    try:
        with safe_open(o.model / name, framework="pt") as source, safe_open(o.out / name, framework="pt") as out:
            written = set(out.keys())
            for key in model.shards[name]:
                parts = [key, *(part for part in written if key in model.linear and part.startswith(f"{key}."))]
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
    return next(part for part in key.removesuffix(".weight").split(".")[::-1] if not part.isdigit())


def finish(o, model, totals):
    """What is beside the weights; config.json is the last to come, and without it nothing loads OUT."""
    import transformers

    from .checkpoint import CONFIG, INDEX

    total, weight_map = totals
    for file in [*o.model.iterdir(), *(o.model / TEMPLATES).glob("*")]:
        aside = file.name in (CONFIG, INDEX, UNFINISHED) or file.name.endswith(".index.json")
        if file.is_file() and file.suffix not in WEIGHTS and not aside and file.stat().st_size <= SMALL:
            replace(o.out / file.relative_to(o.model), lambda beside, file=file: shutil.copyfile(file, beside))
    if model.index:
        index = {
            "metadata": {**model.index.get("metadata", {}), "total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        replace(o.out / INDEX, lambda beside: beside.write_text(json.dumps(index, indent=2) + "\n"))
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
    replace(o.out / CONFIG, lambda beside: beside.write_text(json.dumps(config, indent=2) + "\n"))
    (o.out / UNFINISHED).unlink()


def table(worst):
    from rich.table import Table

    view = Table()
    for column in ("layer", "number", "worst ‖W − Ŵ‖ ÷ ‖W‖"):
        view.add_column(column, justify="left" if column == "layer" else "right")
    for name, (count, error) in worst.items():
        view.add_row(name, str(count), f"{error:.4f}")
    return view
