"""How bitsandbytes stores a 4-bit weight: tensors under dotted keys, one with the bytes of JSON."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .nf4_tables import FOUR_BITS, four_bits

Tensors = Mapping[str, Tensor]
BLOCKS = tuple(32 << i for i in range(8))
NESTED = 256  # scales that share a scale
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
FLOATS = *DTYPES.values(), torch.float64  # what scales and tables may have been cast to
STATE = "quant_state.bitsandbytes__"
LONGEST = 1 << 16  # bytes of the JSON object; bitsandbytes writes some 200
MOST = 1 << 48  # elements of a weight
DIMENSIONS = 64  # of a tensor


def write(
    name: str,
    base: list[Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
    block: int,
    quant_type: str,
) -> dict[str, Tensor]:
    """The tensors of a weight by key, in the order of bitsandbytes; base is NF4Weight's."""
    codes, table, *scales = base
    state = {
        "quant_type": quant_type,
        "blocksize": block,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    tensors = {
        name: codes[:, None],
        f"{name}.absmax": scales[0],
        f"{name}.quant_map": table,
    }
    if len(scales) == 4:
        _, nested, nested_table, offset = scales
        tensors |= {
            f"{name}.nested_absmax": nested,
            f"{name}.nested_quant_map": nested_table,
        }
        state |= {
            "nested_blocksize": NESTED,
            "nested_dtype": "float32",
            "nested_offset": offset.item(),
        }
    text = list(json.dumps(state).encode())
    packed = torch.tensor(text, dtype=torch.uint8, device=codes.device)
    return tensors | {f"{name}.{STATE}{quant_type}": packed}


def read(
    tensors: Tensors, name: str
) -> tuple[list[Tensor], list[int], torch.dtype, int, str]:
    """(base, shape, dtype, block, quant_type) of the weight under this name.

    Raises ValueError or TypeError with the key that cannot be right.
    """
    key, state = read_state(tensors, name)
    shape = state["shape"]
    block = state["blocksize"]
    quant_type = state["quant_type"]
    blocks = -(-math.prod(shape) // block)
    codes = read_codes(tensors, name, shape, key)
    table = four_bit_table(tensors, f"{name}.quant_map", quant_type)
    scales = read_scales(tensors, name, blocks, state)
    base = [codes, *(t.to(codes.device) for t in (table, *scales))]
    return base, shape, DTYPES[state["dtype"]], block, quant_type


def read_codes(tensors: Tensors, name: str, shape: list[int], key: str) -> Tensor:
    """The codes as flat uint8; key is that of the JSON object, which says the shape."""
    size = math.prod(shape)
    codes = tensor_of(tensors, name)
    if codes.is_complex():
        raise TypeError(
            f"nf4: {name} must be bytes in a tensor of uint8 or real numbers, got {codes.dtype}"
        )
    if codes.element_size() * codes.numel() != -(-size // 2):
        raise ValueError(
            f"nf4: {name} must be {-(-size // 2)} bytes for {shape} in {key}, got {codes.nbytes}"
        )
    return codes.contiguous().flatten().view(torch.uint8)


def read_scales(
    tensors: Tensors, name: str, blocks: int, state: dict[str, Any]
) -> list[Tensor]:
    """The scales as NF4Weight takes them."""
    if "nested_blocksize" not in state:
        return [numbers(tensors, f"{name}.absmax", blocks)]
    absmax = tensor_of(tensors, f"{name}.absmax")
    check(f"{name}.absmax", absmax, blocks, torch.uint8)
    nested = numbers(tensors, f"{name}.nested_absmax", -(-blocks // NESTED))
    nested_table = numbers(tensors, f"{name}.nested_quant_map", NESTED)
    offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
    return [absmax, nested, nested_table, offset]


def read_state(tensors: Tensors, name: str) -> tuple[str, dict[str, Any]]:
    """The key of the JSON object, and the object after all of its members were checked."""
    keys = [
        key
        for key in tensors
        if isinstance(key, str) and key.startswith(f"{name}.{STATE}")
    ]
    if len(keys) != 1:
        raise ValueError(
            f"nf4: there must be one key {name}.{STATE}nf4 or {STATE}fp4, "
            f"got {short(keys or 'none')}"
        )
    key = keys[0]
    packed = tensor_of(tensors, key)
    quant_type = key.removeprefix(f"{name}.{STATE}")
    if quant_type not in FOUR_BITS:
        raise ValueError(
            f"nf4: {name}.{STATE} must end in nf4 or fp4, got {short(quant_type)}"
        )
    if packed.numel() > LONGEST:
        raise ValueError(
            f"nf4: {key} must be at most {LONGEST} bytes, got {packed.numel()}"
        )
    check(key, packed, packed.numel(), torch.uint8)
    written = bytes(packed.tolist())
    try:
        state = json.loads(written.decode())
    except (ValueError, RecursionError):  # ValueError is for UTF-8 and for JSON
        raise ValueError(f"nf4: {key} must be JSON, got {written[:40]!r}") from None
    if not isinstance(state, dict):
        raise ValueError(
            f"nf4: {key} must be a JSON object, got {type(state).__name__}"
        )
    expect_state(key, state, quant_type)
    if (
        any(member.startswith("nested_") for member in state)
        or f"{name}.nested_absmax" in tensors
        or f"{name}.nested_quant_map" in tensors
    ):
        expect_nested_state(key, state)
    return key, state


def expect_member(
    key: str,
    state: dict[str, Any],
    member: str,
    wanted: object,
    right: Callable[[Any], object],
) -> None:
    """Raises if right(value) is False for a member of the JSON object."""
    value = state.get(member)
    if not right(value):
        raise ValueError(f"nf4: {member} in {key} must be {wanted}, got {short(value)}")


def expect_state(key: str, state: dict[str, Any], quant_type: str) -> None:
    """Raises for the first member that every weight has and that cannot be right."""
    expect = partial(expect_member, key, state)
    expect("quant_type", repr(quant_type), lambda v: v == quant_type)
    expect("blocksize", f"one of {BLOCKS}", lambda v: type(v) is int and v in BLOCKS)
    expect("dtype", " or ".join(DTYPES), lambda v: isinstance(v, str) and v in DTYPES)
    expect(
        "shape",
        "a list of positive whole numbers",
        lambda v: isinstance(v, list) and v and all(map(positive, v)),
    )
    expect("shape", f"at most {MOST} elements", few_elements)


def expect_nested_state(key: str, state: dict[str, Any]) -> None:
    """Raises for the first member of double quantization that cannot be right."""
    expect = partial(expect_member, key, state)
    expect("nested_blocksize", NESTED, lambda v: type(v) is int and v == NESTED)
    expect("nested_dtype", "float32", lambda v: v == "float32")
    expect(
        "nested_offset",
        "a finite number",
        lambda v: type(v) in (int, float) and abs(v) < 3e38,
    )


def scales_of(state: Any) -> list[Tensor]:
    """The scales of bitsandbytes' QuantState as NF4Weight takes them, in float32."""
    if not state.nested:
        return [wide(state.absmax)]
    return [
        state.absmax,
        wide(state.state2.absmax),
        wide(state.state2.code),
        wide(state.offset),
    ]


def table_of(state: Any) -> Tensor:
    """The values of a QuantState's codes.

    A cast may have rounded its table. Then bitsandbytes uses the values of quant_type; so do we.
    """
    if state.code.dtype is torch.float32:
        return state.code
    return four_bits(state.quant_type, state.code.device)


def wide(t: Tensor) -> Tensor:
    """t in float32, as bitsandbytes reads scales that were cast together with their model."""
    return t if t.dtype is torch.float32 else t.float()


def positive(v: object) -> bool:
    return type(v) is int and 0 < v <= MOST


def few_elements(shape: list[int]) -> bool:
    """Whether a shape has at most MOST elements and DIMENSIONS dimensions.

    The product is checked after each dimension, so that it stays small.
    """
    size = 1
    for n in shape:
        size *= n
        if size > MOST:
            return False
    return len(shape) <= DIMENSIONS


def short(value: object) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def tensor_of(tensors: Tensors, key: str) -> Tensor:
    """The tensor of a key; raises unless it is dense and has data."""
    t = tensors.get(key)
    if t is None:
        raise ValueError(f"nf4: {key} must be a tensor, got none")
    if not isinstance(t, Tensor):
        raise ValueError(f"nf4: {key} must be a tensor, got {type(t).__name__}")
    if t.layout is not torch.strided or t.is_quantized:
        raise ValueError(f"nf4: {key} must be a dense tensor, got {t.layout}")
    if t.is_meta:
        raise ValueError(f"nf4: {key} must have data, got a tensor on the meta device")
    return t.detach()


def check(key: str, t: Tensor, size: int, *dtypes: torch.dtype) -> None:
    """Raises unless t is a vector of this size in one of these dtypes."""
    if t.dtype not in dtypes:
        raise TypeError(
            f"nf4: {key} must be {' or '.join(map(str, dtypes))}, got {t.dtype}"
        )
    if t.shape != (size,):
        raise ValueError(f"nf4: {key} must be ({size},), got {tuple(t.shape)}")


def numbers(tensors: Tensors, key: str, size: int) -> Tensor:
    """The finite numbers of a key in float32; a cast of the model may have changed their dtype."""
    given = tensor_of(tensors, key)
    check(key, given, size, *FLOATS)
    t = wide(given)
    if not t.isfinite().all():
        raise ValueError(
            f"nf4: {key} must be finite, got {given[~t.isfinite()][0].item()}"
        )
    return t


def four_bit_table(tensors: Tensors, key: str, quant_type: str) -> Tensor:
    """The sixteen values of quant_type, with which bitsandbytes computes whatever the file says.

    A cast may have rounded the file's values. Raises for any other difference.
    """
    given = tensor_of(tensors, key)
    check(key, given, 16, *FLOATS)
    table = four_bits(quant_type, given.device)
    if not torch.equal(given, table.to(given.dtype)):
        raise ValueError(
            f"nf4: {key} must be the values of {quant_type}, got {short(given.tolist())}"
        )
    return table
