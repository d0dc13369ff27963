"""peftops bench host: how long a layer keeps the host busy, with stock PEFT and with peftops.

That is the time until a GPU has all work of the layer. On a GPU, layers have so few rows that the
GPU waits for the host. Without a GPU, a stand-in takes the launches (bench/standin): torch's
dispatcher and autograd, Triton's launcher and ours are the real ones. There, PEFT over 4 bits
runs on bitsandbytes' own Python, with kernels that cost a launch and nothing else.
"""

from functools import partial
from importlib.util import find_spec

from peftops.cli import BadInput, Parser, find_device, folder, need, probability

from . import results, standin
from .progress import Progress

LAYERS = 16  # of a chain: each takes the output of the one before
NAME = "Llama-3.1-8B q, o"
SHAPE = (8192, 4096, 4096, 16)
ROWS = 128  # on a GPU
SUFFIXES = {
    "lora": "",
    "nf4": ", NF4",
    "dora": ", DoRA",
    "nf4 dora": ", NF4, DoRA",
}
STOCK = "PEFT"
NARROW = "PEFT, narrow adapters"
OURS = "peftops"
TRAIN = "forward, with gradient"
BACK = "backward"
BOTH = "forward + backward"
TOKEN = "one token"
TARGET = 0.85  # of PEFT's time, in every row


def options(argv):
    parser = Parser("peftops bench host", description=__doc__)
    parser.add_argument(
        "--device",
        help="by default cuda where there is a GPU, else the stand-in for one",
    )
    parser.add_argument(
        "--dropout",
        type=probability,
        help="by default 0 and 0.1; tokens go without",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="LoRA alone, in few rounds",
    )
    parser.add_argument(
        "--out",
        type=folder,
        metavar="DIR",
        help="where to append results, by default bench/results",
    )
    return parser.parse_args(argv)


def main(argv=None):
    o = options(argv)
    need("torch", "peft", "triton", extra="bench")
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

    origin = results.describe(device) | {"row": "host", "dtype": "bf16"}
    library = None
    if device.type == "cpu":
        device = enter()
        library = bitsandbytes_on_standin()
    drops = (0.0, 0.1) if o.dropout is None else (o.dropout,)
    methods = ["lora"] if o.quick else list(SUFFIXES)
    rounds = 5 if o.quick else 15
    with Progress() as progress:
        for line in measure(device, methods, drops, rounds, progress):
            show(line)
            if where:
                file = where / f"{results.slug(origin['device'])}.jsonl"
                results.append(file, origin | line)
    del library  # its kernels live until here
    return 0


def enter():
    """The stand-in, on which launches and products cost what they cost the host of a GPU."""
    import torch

    extension, driver = standin.enter()
    extension.costs(standin.LAUNCH, standin.PRODUCT)
    driver.standin_cost(standin.LAUNCH)
    return torch.device(standin.NAME)


def bitsandbytes_on_standin():
    """Gives bitsandbytes kernels on the stand-in, if it is installed.

    Returns:
        The torch library that holds the kernels, or None. They are gone when it is deleted.
    """
    if not find_spec("bitsandbytes"):
        return None
    import bitsandbytes  # noqa: F401  defines its ops
    import torch

    extension = standin.extension()

    def kernel(like, shape, dtype):
        extension.launch()
        return torch.empty(shape, dtype=dtype, device=like.device)

    def dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype):
        return kernel(A, shape, dtype)

    def dequantize_blockwise(A, absmax, code, blocksize, dtype):
        return kernel(A, A.shape, dtype)

    def gemv_4bit(A, B, shape, *_):
        return kernel(A, (*A.shape[:-1], shape[0]), A.dtype)

    library = torch.library.Library("bitsandbytes", "IMPL")
    for function in (dequantize_4bit, dequantize_blockwise, gemv_4bit):
        library.impl(function.__name__, function, "PrivateUse1")
    return library


def measure(device, methods, drops, rounds, progress):
    """A result for each method, dropout and pass, in milliseconds of one layer.

    Args:
        methods: keys of SUFFIXES.
        drops: probabilities of dropout in training. One token goes without.
    """
    import torch

    from .measure import finish, times
    from .timing import Contender

    clock = torch.device(
        "cpu"
    )  # measure the host's time, whatever the device does meanwhile
    rows = ROWS if device.type == "cuda" else SHAPE[0]
    jobs = [
        (method, p) for method in methods for p in (*drops, None)
    ]  # None: one token
    for method, p in progress.track(jobs, len(jobs), "host"):
        absent = {}
        contenders = {}
        for label in (STOCK, NARROW, OURS):
            try:
                if p is None:
                    calls = token(device, method, label)
                else:
                    calls = training(device, rows, method, label, p)
            except (ImportError, NotImplementedError) as error:
                absent[label] = str(error)
                continue
            passes = {name: [call] for name, call in calls.items()}
            contenders[label] = Contender(passes, clock)
        if OURS not in contenders:
            continue
        line = {
            "layer": NAME + SUFFIXES[method],
            "op": "host",
            "shape": (1 if p is None else rows, *SHAPE[1:]),
            "dropout": p or 0.0,
            "absent": absent,
        }
        for name in contenders[OURS].calls:
            measured, failures = times(
                contenders, name, rounds, clock, modes=("eager",)
            )
            measured["ms"] = {
                label: [round(t / LAYERS, 6) for t in ms]
                for label, ms in measured["ms"].items()
            }
            yield finish(line, measured, failures)


def training(device, rows, method, label, p):
    """{pass: call} of a chain of layers under autocast, as in training."""
    import torch

    chain = [layer(device, method, label, p) for _ in range(LAYERS)]
    x = torch.empty(
        rows,
        SHAPE[1],
        device=device,
        dtype=torch.bfloat16,
        requires_grad=True,
    )
    dy = torch.empty(
        rows,
        SHAPE[2],
        device=device,
        dtype=torch.bfloat16,
    )
    wanted = [x]
    for module in chain:
        wanted += [t for t in module.parameters() if t.requires_grad]

    def forward():
        y = x
        with torch.autocast(device.type, torch.bfloat16):
            for module in chain:
                y = module(y)
        return y

    backward = partial(torch.autograd.grad, inputs=wanted, grad_outputs=dy)
    y = forward()
    return {
        TRAIN: forward,
        BACK: lambda: backward(y, retain_graph=True),
        BOTH: lambda: backward(forward()),
    }


def token(device, method, label):
    """{pass: call} of a chain of layers that generates a token."""
    import torch

    chain = [layer(device, method, label, 0.0).eval() for _ in range(LAYERS)]
    x = torch.empty(1, SHAPE[1], device=device, dtype=torch.bfloat16)

    def generate():
        y = x
        with torch.no_grad():
            for module in chain:
                y = module(y)

    return {TOKEN: generate}


def layer(device, method, label, p):
    """One layer of PEFT, stock or patched. Its tensors have no values."""
    import peft
    import torch
    from torch import nn

    import peftops

    _, k, n, r = SHAPE
    narrow = torch.bfloat16
    model = nn.Module()
    model.linear = packed(8, 8) if "nf4" in method else nn.Linear(8, 8, bias=False)
    config = peft.LoraConfig(
        r=r,
        lora_dropout=p,
        target_modules=["linear"],
        use_dora="dora" in method,
    )
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=label != NARROW)
    module = model.base_model.model.linear

    def parameter(*shape, dtype=narrow if label == NARROW else torch.float32):
        return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

    if "nf4" in method:
        module.base_layer = packed(k, n, device)
    else:
        module.base_layer.weight = parameter(n, k, dtype=narrow).requires_grad_(False)
    module.lora_A["default"].weight = parameter(r, k)
    module.lora_B["default"].weight = parameter(n, r)
    if "dora" in method:
        module.lora_magnitude_vector["default"].weight = parameter(n)
    module.in_features = k
    module.out_features = n
    if label == OURS:
        peftops.patch(model)
    return module


def packed(k, n, device="cpu"):
    """bitsandbytes' layer of NF4 with nested scales. Its tensors have no values."""
    import torch
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

    linear = Linear4bit(
        k,
        n,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
    )
    blocks = n * k // 64
    empty = partial(torch.empty, device=device)
    nested = QuantState(
        empty(-(-blocks // 256)),
        blocksize=256,
        code=empty(256),
        dtype=torch.float32,
    )
    state = QuantState(
        empty(blocks, dtype=torch.uint8),
        torch.Size((n, k)),
        empty(16),
        64,
        "nf4",
        torch.bfloat16,
        empty(()),
        nested,
    )
    linear.weight = Params4bit(
        empty(n * k // 2, 1, dtype=torch.uint8),
        requires_grad=False,
        quant_state=state,
        bnb_quantized=True,
        module=linear,
    )
    linear.quant_state = state
    return linear
