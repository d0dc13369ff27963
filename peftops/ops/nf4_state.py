"""What bitsandbytes writes of a 4-bit weight: tensors under dotted keys, one of them the bytes of a JSON object."""

import json
import math

import torch
from torch import Tensor

from .nf4_tables import FOUR_BITS

BLOCKS = tuple(32 << i for i in range(8))
NESTED = 256  # scales that share a scale
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STATE = "quant_state.bitsandbytes__"


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
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset.item()}
    packed = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device=codes.device)
    return tensors | {f"{name}.{STATE}{quant_type}": packed}


def read(tensors, name):
    """(base, shape, dtype, block, quant_type), or ValueError or TypeError with the key that cannot be right."""
    key, state = read_state(tensors, name)
    shape, block = state["shape"], state["blocksize"]
    size = math.prod(shape)
    blocks = -(-size // block)
    codes = found(tensors, name)
    if codes.element_size() * codes.numel() != -(-size // 2):
        raise ValueError(f"nf4: {name} must be {-(-size // 2)} bytes for {shape} in {key}, got {codes.nbytes}")
    table = numbers(tensors, f"{name}.quant_map", 16)
    if "nested_blocksize" in state:
        absmax = found(tensors, f"{name}.absmax")
        check(f"{name}.absmax", absmax, blocks, torch.uint8)
        nested = numbers(tensors, f"{name}.nested_absmax", -(-blocks // NESTED))
        nested_table = numbers(tensors, f"{name}.nested_quant_map", NESTED)
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=absmax.device)
        scales = [absmax, nested, nested_table, offset]
    else:
        scales = [numbers(tensors, f"{name}.absmax", blocks)]
    base = [codes.contiguous().view(torch.uint8).flatten(), table, *scales]
    return base, shape, DTYPES[state["dtype"]], block, state["quant_type"]


def read_state(tensors, name):
    """The key of the JSON object, and the object, every member of which is as it has to be."""
    keys = [key for key in tensors if key.startswith(f"{name}.{STATE}")]
    if len(keys) != 1:
        raise ValueError(f"nf4: there must be one key {name}.{STATE}nf4 or {STATE}fp4, got {keys or 'none'}")
    key, packed = keys[0], found(tensors, keys[0])
    check(key, packed, packed.numel(), torch.uint8)
    try:
        state = json.loads(bytes(packed.cpu().tolist()).decode())
    except (ValueError, RecursionError):  # of UTF-8 and of JSON
        raise ValueError(f"nf4: {key} must be JSON, got {bytes(packed.cpu().tolist()[:40])}") from None
    if not isinstance(state, dict):
        raise ValueError(f"nf4: {key} must be a JSON object, got {type(state).__name__}")

    def expect(member, wanted, right):
        if not right(state.get(member)):
            raise ValueError(f"nf4: {member} in {key} must be {wanted}, got {state.get(member)!r}")

    expect("quant_type", f"{key.removeprefix(f'{name}.{STATE}')!r} and nf4 or fp4",
           lambda v: isinstance(v, str) and v in FOUR_BITS and key.endswith(f"__{v}"))  # fmt: skip
    expect("blocksize", f"one of {BLOCKS}", lambda v: type(v) is int and v in BLOCKS)
    expect("dtype", " or ".join(DTYPES), lambda v: isinstance(v, str) and v in DTYPES)
    expect("shape", "a list of positive whole numbers", lambda v: isinstance(v, list) and v and all(map(positive, v)))
    nested = {member for member in state if member.startswith("nested_")}
    if nested or f"{name}.nested_absmax" in tensors or f"{name}.nested_quant_map" in tensors:
        expect("nested_blocksize", NESTED, lambda v: type(v) is int and v == NESTED)
        expect("nested_dtype", "float32", lambda v: v == "float32")
        expect("nested_offset", "a finite number", lambda v: type(v) in (int, float) and abs(v) < 3e38)
    return key, state


def scales_of(state):
    """What a QuantState of bitsandbytes has of scales, as a base has them."""
    if not state.nested:
        return [state.absmax]
    return [state.absmax, state.state2.absmax, state.state2.code, state.offset]


def positive(v):
    return type(v) is int and 0 < v < 1 << 48


def found(tensors, key):
    t = tensors.get(key)
    if not isinstance(t, Tensor):
        raise ValueError(f"nf4: {key} must be a tensor, got {'none' if t is None else type(t).__name__}")
    return t


def check(key, t, size, dtype):
    if t.dtype is not dtype:
        raise TypeError(f"nf4: {key} must be {dtype}, got {t.dtype}")
    if t.shape != (size,):
        raise ValueError(f"nf4: {key} must be ({size},), got {tuple(t.shape)}")


def numbers(tensors, key, size):
    t = found(tensors, key)
    check(key, t, size, torch.float32)
    if not t.isfinite().all():
        raise ValueError(f"nf4: {key} must be finite, got {t[~t.isfinite()][0].item()}")
    return t
