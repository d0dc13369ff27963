"""What bitsandbytes writes of a 4-bit weight: tensors under dotted keys, one of them the bytes of a JSON object."""

import json
import math

import torch
from torch import Tensor

from .nf4_tables import FOUR_BITS, four_bits

BLOCKS = tuple(32 << i for i in range(8))
NESTED = 256  # scales that share a scale
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FLOATS = *DTYPES.values(), torch.float64  # what scales and tables may have been cast to
STATE = "quant_state.bitsandbytes__"
LONGEST = 1 << 16  # bytes of the JSON object, of which bitsandbytes writes some 200
MOST = 1 << 48  # elements of a weight
DIMENSIONS = 64  # of a tensor


def write(name, base, shape, dtype, block, quant_type):
    """The tensors of a weight, in the order of bitsandbytes; base is that of NF4Weight."""
    codes, table, *scales = base
    state = {
        "quant_type": quant_type, "blocksize": block, "dtype": str(dtype).removeprefix("torch."), "shape": list(shape),
    }  # fmt: skip
    tensors = {name: codes[:, None], f"{name}.absmax": scales[0], f"{name}.quant_map": table}
    if len(scales) == 4:
        _, nested, nested_table, offset = scales
        tensors |= {f"{name}.nested_absmax": nested, f"{name}.nested_quant_map": nested_table}
        state |= {
            "nested_blocksize": NESTED,
            "nested_dtype": "float32",
            "nested_offset": offset.item(),
        }
    packed = torch.tensor(
        list(json.dumps(state).encode()), dtype=torch.uint8, device=codes.device
    )
    return tensors | {f"{name}.{STATE}{quant_type}": packed}


def read(tensors, name):
    """(base, shape, dtype, block, quant_type), or ValueError or TypeError with the key that cannot be right."""
    key, state = read_state(tensors, name)
    shape, block, quant_type = state["shape"], state["blocksize"], state["quant_type"]
    size = math.prod(shape)
    blocks = -(-size // block)
    codes = found(tensors, name)
    if codes.is_complex():
        raise TypeError(
            f"nf4: {name} must be bytes in a tensor of uint8 or real numbers, got {codes.dtype}"
        )
    if codes.element_size() * codes.numel() != -(-size // 2):
        raise ValueError(
            f"nf4: {name} must be {-(-size // 2)} bytes for {shape} in {key}, got {codes.nbytes}"
        )
    codes = codes.contiguous().flatten().view(torch.uint8)
    table = four_bit_table(tensors, f"{name}.quant_map", quant_type)
    if "nested_blocksize" in state:
        absmax = found(tensors, f"{name}.absmax")
        check(f"{name}.absmax", absmax, blocks, torch.uint8)
        nested = numbers(tensors, f"{name}.nested_absmax", -(-blocks // NESTED))
        nested_table = numbers(tensors, f"{name}.nested_quant_map", NESTED)
        scales = [
            absmax,
            nested,
            nested_table,
            torch.tensor(state["nested_offset"], dtype=torch.float32),
        ]
    else:
        scales = [numbers(tensors, f"{name}.absmax", blocks)]
    base = [codes, *(t.to(codes.device) for t in (table, *scales))]
    return base, shape, DTYPES[state["dtype"]], block, quant_type


def read_state(tensors, name):
    """The key of the JSON object, and the object, every member of which is as it has to be."""
    keys = [
        key for key in tensors if isinstance(key, str) and key.startswith(f"{name}.{STATE}")
    ]
    if len(keys) != 1:
        raise ValueError(
            f"nf4: there must be one key {name}.{STATE}nf4 or {STATE}fp4, got {short(keys or 'none')}"
        )
    key, packed = keys[0], found(tensors, keys[0])
    kind = key.removeprefix(f"{name}.{STATE}")
    if kind not in FOUR_BITS:
        raise ValueError(f"nf4: {name}.{STATE} must end in nf4 or fp4, got {short(kind)}")
    if packed.numel() > LONGEST:
        raise ValueError(f"nf4: {key} must be at most {LONGEST} bytes, got {packed.numel()}")
    check(key, packed, packed.numel(), torch.uint8)
    written = bytes(packed.tolist())
    try:
        state = json.loads(written.decode())
    except (ValueError, RecursionError):  # of UTF-8 and of JSON
        raise ValueError(f"nf4: {key} must be JSON, got {written[:40]}") from None
    if not isinstance(state, dict):
        raise ValueError(f"nf4: {key} must be a JSON object, got {type(state).__name__}")

    def expect(member, wanted, right):
        if not right(state.get(member)):
            raise ValueError(
                f"nf4: {member} in {key} must be {wanted}, got {short(state.get(member))}"
            )

    expect("quant_type", repr(kind), lambda v: v == kind)
    expect("blocksize", f"one of {BLOCKS}", lambda v: type(v) is int and v in BLOCKS)
    expect("dtype", " or ".join(DTYPES), lambda v: isinstance(v, str) and v in DTYPES)
    expect(
        "shape",
        "a list of positive whole numbers",
        lambda v: isinstance(v, list) and v and all(map(positive, v)),
    )
    expect("shape", f"at most {MOST} elements", few_elements)
    nested = {member for member in state if member.startswith("nested_")}
    if nested or f"{name}.nested_absmax" in tensors or f"{name}.nested_quant_map" in tensors:
        expect("nested_blocksize", NESTED, lambda v: type(v) is int and v == NESTED)
        expect("nested_dtype", "float32", lambda v: v == "float32")
        expect(
            "nested_offset",
            "a finite number",
            lambda v: type(v) in (int, float) and abs(v) < 3e38,
        )
    return key, state


def scales_of(state):
    """What a QuantState of bitsandbytes has of scales, as a base has them, in float32."""
    if not state.nested:
        return [wide(state.absmax)]
    return [
        state.absmax,
        wide(state.state2.absmax),
        wide(state.state2.code),
        wide(state.offset),
    ]


def table_of(state):
    """The values of a QuantState's codes: bitsandbytes goes by quant_type, whatever a cast has made of the table."""
    if state.code.dtype is torch.float32:
        return state.code
    return four_bits(state.quant_type, state.code.device)


def wide(t):
    """In float32, as bitsandbytes reads scales that were cast with their model."""
    return t if t.dtype is torch.float32 else t.float()


def positive(v):
    return type(v) is int and 0 < v <= MOST


def few_elements(shape):
    """Whether no product of the first dimensions is too large, each bounded before it is multiplied."""
    size = 1
    for n in shape:
        size *= n
        if size > MOST:
            return False
    return len(shape) <= DIMENSIONS


def short(value):
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def found(tensors, key):
    """The tensor of a key, which has memory that can be read."""
    t = tensors.get(key)
    if not isinstance(t, Tensor):
        raise ValueError(
            f"nf4: {key} must be a tensor, got {'none' if t is None else type(t).__name__}"
        )
    if t.layout is not torch.strided or t.is_quantized:
        raise ValueError(f"nf4: {key} must be a dense tensor, got {t.layout}")
    if t.is_meta:
        raise ValueError(f"nf4: {key} must have data, got a tensor on the meta device")
    return t.detach()


def check(key, t, size, *dtypes):
    if t.dtype not in dtypes:
        raise TypeError(f"nf4: {key} must be {' or '.join(map(str, dtypes))}, got {t.dtype}")
    if t.shape != (size,):
        raise ValueError(f"nf4: {key} must be ({size},), got {tuple(t.shape)}")


def numbers(tensors, key, size):
    """Finite numbers in float32, whatever floating type a cast of the model has left them in."""
    given = found(tensors, key)
    check(key, given, size, *FLOATS)
    t = wide(given)
    if not t.isfinite().all():
        raise ValueError(f"nf4: {key} must be finite, got {given[~t.isfinite()][0].item()}")
    return t


def four_bit_table(tensors, key, quant_type):
    """The sixteen values of quant_type, which bitsandbytes computes with whatever the file says.

    A cast may have rounded what the file says. A table of other values is that of no weight we can read.
    """
    given = found(tensors, key)
    check(key, given, 16, *FLOATS)
    table = four_bits(quant_type, given.device)
    if not torch.equal(given, table.to(given.dtype)):
        raise ValueError(
            f"nf4: {key} must be the values of {quant_type}, got {short(given.tolist())}"
        )
    return table
