"""peftops bench host: how long a layer keeps the host busy before a GPU has all its work, with stock PEFT and peftops.

Without a GPU a stand-in takes the launches (bench/standin), on which torch's dispatcher and autograd, Triton's launcher
and ours are the real ones; there PEFT over 4 bits stands on bitsandbytes' own Python, whose kernels cost a launch and
nothing else. On a GPU layers have so few rows that it waits for the host.
"""

from functools import partial
from importlib.util import find_spec

from peftops.cli import BadInput, Parser, find_device, folder, need, probability

from . import results, standin
from .progress import Progress

LAYERS = 16  # of a chain, each of which takes what the one before gives
NAME, SHAPE = "Llama-3.1-8B q, o", (8192, 4096, 4096, 16)
ROWS = 128  # on a GPU
KINDS = {"lora": "", "nf4": ", NF4", "dora": ", DoRA", "nf4 dora": ", NF4, DoRA"}
STOCK, NARROW, OURS = "PEFT", "PEFT, narrow adapters", "peftops"
TRAIN, BACK, BOTH, TOKEN = (
    "forward, with gradient",
    "backward",
    "forward + backward",
    "one token",
)
TARGET = 0.85  # of PEFT's time, in every row


def main(argv=None):
    parser = Parser("peftops bench host", description=__doc__)
    parser.add_argument(
        "--device", help="by default cuda where there is a GPU, else the stand-in for one"
    )
    parser.add_argument(
        "--dropout", type=probability, help="by default 0 and 0.1; tokens go without"
    )
    parser.add_argument("--quick", action="store_true", help="LoRA alone, in few rounds")
    parser.add_argument(
        "--out",
        type=folder,
        metavar="DIR",
        help="where to append results, by default bench/results",
    )
    o = parser.parse_args(argv)
    need("torch", "peft", "triton")
    device = find_device(o.device)
    if standin.interpreted():
        raise BadInput(
            "TRITON_INTERPRET must not be set, since what is interpreted is not launched"
        )
    if device.type == "cpu" and (why := standin.missing()):
        raise BadInput(f"the stand-in for a GPU cannot be built ({why})")
    where, why = results.keep(o)
    if why:
        print(f"Results are only shown, since {why}.")
    return run(o, device, where)


def run(o, device, where):
    from .measure import show

    about = results.describe(device) | {"row": "host", "dtype": "bf16"}
    device, kept = (
        (enter(), bitsandbytes_on_standin()) if device.type == "cpu" else (device, None)
    )
    drops = (0.0, 0.1) if o.dropout is None else (o.dropout,)
    with Progress() as progress:
        for line in measure(
            device, list(KINDS)[: 1 if o.quick else None], drops, 5 if o.quick else 15, progress
        ):
            show(line)
            if where:
                results.append(where / f"{results.slug(about['device'])}.jsonl", about | line)
    del kept  # a library's kernels go with it
    return 0


def enter():
    """The stand-in, on which launches and products cost what they cost the host of a GPU"""
    import torch

    extension, driver = standin.enter()
    extension.costs(standin.LAUNCH, standin.PRODUCT)
    driver.standin_cost(standin.LAUNCH)
    return torch.device(standin.NAME)


def bitsandbytes_on_standin():
    """Gives bitsandbytes kernels on the stand-in, where it is installed."""
    if not find_spec("bitsandbytes"):
        return None
    import bitsandbytes  # noqa: F401  defines its ops
    import torch

    extension = standin.extension()

    def kernel(like, shape, dtype):
        extension.launch()
        return torch.empty(shape, dtype=dtype, device=like.device)

    library = torch.library.Library("bitsandbytes", "IMPL")
    kernels = {
        "dequantize_4bit": lambda A, absmax, blocksize, quant_type, shape, dtype: kernel(
            A, shape, dtype
        ),
        "dequantize_blockwise": lambda A, absmax, code, blocksize, dtype: kernel(
            A, A.shape, dtype
        ),
        "gemv_4bit": lambda A, B, shape, *_: kernel(A, (*A.shape[:-1], shape[0]), A.dtype),
    }
    for name, function in kernels.items():
        library.impl(name, function, "PrivateUse1")
    return library


def measure(device, kinds, drops, rounds, progress):
    """A result for each kind of layer, dropout and pass, in milliseconds of one layer."""
    import torch

    from .measure import finish, times
    from .timing import Contender

    clock = torch.device("cpu")  # whose time is taken, whatever the device does meanwhile
    rows = ROWS if device.type == "cuda" else SHAPE[0]
    todo = [(kind, p) for kind in kinds for p in (*drops, None)]  # None: a token
    for kind, p in progress.track(todo, len(todo), "host"):
        absent, found = {}, {}
        for label in (STOCK, NARROW, OURS):
            try:
                calls = (
                    token(device, kind, label)
                    if p is None
                    else training(device, rows, kind, label, p)
                )
            except (ImportError, NotImplementedError) as error:
                absent[label] = str(error)
                continue
            found[label] = Contender({name: [call] for name, call in calls.items()}, clock)
        shape = (1 if p is None else rows, *SHAPE[1:])
        line = {
            "layer": NAME + KINDS[kind],
            "op": "host",
            "shape": shape,
            "dropout": p or 0.0,
            "absent": absent,
        }
        for name in found[OURS].calls if OURS in found else ():
            measured, failed = times(found, name, rounds, clock, modes=("eager",))
            measured["ms"] = {
                who: [round(t / LAYERS, 6) for t in ms] for who, ms in measured["ms"].items()
            }
            yield finish(line, measured, failed)


def training(device, rows, kind, label, p):
    """{pass: call} of a chain of layers under autocast, as trainers run it"""
    import torch

    chain = [layer(device, kind, label, p) for _ in range(LAYERS)]
    x = torch.empty(rows, SHAPE[1], device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.empty(rows, SHAPE[2], device=device, dtype=torch.bfloat16)
    wanted = [x] + [t for one in chain for t in one.parameters() if t.requires_grad]

    def forward():
        y = x
        with torch.autocast(device.type, torch.bfloat16):
            for one in chain:
                y = one(y)
        return y

    backward = partial(torch.autograd.grad, inputs=wanted, grad_outputs=dy)
    y = forward()
    return {
        TRAIN: forward,
        BACK: lambda: backward(y, retain_graph=True),
        BOTH: lambda: backward(forward()),
    }


def token(device, kind, label):
    """{pass: call} of a chain of layers that generates a token"""
    import torch

    chain = [layer(device, kind, label, 0.0).eval() for _ in range(LAYERS)]
    x = torch.empty(1, SHAPE[1], device=device, dtype=torch.bfloat16)

    def generate():
        y = x
        with torch.no_grad():
            for one in chain:
                y = one(y)

    return {TOKEN: generate}


def layer(device, kind, label, p):
    """One layer of PEFT, stock or patched, without values"""
    import peft
    import torch
    from torch import nn

    import peftops

    (_, k, n, r), narrow = SHAPE, torch.bfloat16
    model = nn.Module()
    model.linear = packed(8, 8) if "nf4" in kind else nn.Linear(8, 8, bias=False)
    config = peft.LoraConfig(
        r=r, lora_dropout=p, target_modules=["linear"], use_dora="dora" in kind
    )
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=label != NARROW)
    one = model.base_model.model.linear

    def parameter(*shape, dtype=narrow if label == NARROW else torch.float32):
        return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

    one.base_layer = packed(k, n, device) if "nf4" in kind else one.base_layer
    if "nf4" not in kind:
        one.base_layer.weight = parameter(n, k, dtype=narrow).requires_grad_(False)
    one.lora_A["default"].weight, one.lora_B["default"].weight = (
        parameter(r, k),
        parameter(n, r),
    )
    if "dora" in kind:
        one.lora_magnitude_vector["default"].weight = parameter(n)
    one.in_features, one.out_features = k, n
    if label == OURS:
        peftops.patch(model)
    return one


def packed(k, n, device="cpu"):
    """bitsandbytes' layer of NF4 with nested scales, without values"""
    import torch
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

    one = Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    blocks = n * k // 64
    empty = partial(torch.empty, device=device)
    code, nested = (
        empty(16),
        QuantState(
            empty(-(-blocks // 256)), blocksize=256, code=empty(256), dtype=torch.float32
        ),
    )
    state = QuantState(
        empty(blocks, dtype=torch.uint8),
        torch.Size((n, k)),
        code,
        64,
        "nf4",
        torch.bfloat16,
        empty(()),
        nested,
    )
    data = empty(n * k // 2, 1, dtype=torch.uint8)
    one.weight = Params4bit(
        data, requires_grad=False, quant_state=state, bnb_quantized=True, module=one
    )
    one.quant_state = state
    return one
