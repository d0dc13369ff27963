"""The state of a 4-bit weight is bitsandbytes' state, and a damaged one is refused by its key."""

import json
import random
import re
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from cuda_on_cpu import build
from cuda_on_cpu.test_emulator import sanitized

from peftops import NF4Weight

STATE = "weight.quant_state.bitsandbytes__nf4"


def saved(double=True, shape=(24, 40), **options):
    return NF4Weight.quantize(torch.randn(shape), 64, double, **options).state_dict()


def packed(state):
    """A JSON value, or bytes, as the tensor that bitsandbytes saves."""
    text = state if isinstance(state, bytes) else json.dumps(state).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


def unpacked(tensors):
    return json.loads(bytes(tensors[STATE].tolist()))


def values(tensors):
    return NF4Weight.load(tensors).dequantize(torch.float32)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_state_is_bitsandbytes(double, quant_type):
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(24, 64).half()
    codes, state = bnb.quantize_4bit(
        w, blocksize=64, quant_type=quant_type, compress_statistics=double
    )
    theirs = {
        f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()
    }
    theirs["weight"] = codes
    ours = NF4Weight.quantize(w, 64, double, quant_type).state_dict()
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor) and ours[key].dtype == tensor.dtype, key


@pytest.mark.parametrize("double", [False, True])
def test_round_trip(double):
    tensors = saved(double, shape=(7, 33))
    again = NF4Weight.load(tensors)
    assert again.shape == (7, 33) and again.dtype == torch.float32 and again.block == 64
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, tensors[key]), key


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_may_be_stored_as_another_type(storage):
    tensors = saved()
    tensors["weight"] = tensors["weight"].flatten().view(storage)[:, None]
    as_bytes = tensors | {"weight": tensors["weight"].view(torch.uint8)}
    assert torch.equal(values(tensors), values(as_bytes))


def test_memory_that_is_not_aligned():
    tensors = saved()
    moved = {}
    for key, tensor in tensors.items():
        memory = torch.empty(tensor.nbytes + tensor.element_size(), dtype=torch.uint8)
        moved[key] = (
            memory[tensor.element_size() :]
            .view(tensor.dtype)
            .view(tensor.shape)
            .copy_(tensor)
        )
    assert torch.equal(values(moved), values(tensors))
    assert all(tensor.data_ptr() % 16 == 0 for tensor in NF4Weight.load(moved).base)


CASTS = torch.bfloat16, torch.float16, torch.float64


@pytest.mark.parametrize("cast", CASTS, ids=str)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_state_that_was_cast_with_its_model(quant_type, double, cast):
    """Scales stay rounded; the table of 16 values is that of the quant_type, as in bitsandbytes."""
    tensors = saved(double, quant_type=quant_type)
    narrow = {
        key: tensor.to(cast) if tensor.is_floating_point() else tensor
        for key, tensor in tensors.items()
    }
    rounded = {
        key: tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in narrow.items()
    }
    rounded["weight.quant_map"] = tensors["weight.quant_map"]
    assert narrow["weight.quant_map"].dtype is cast
    assert torch.equal(values(narrow), values(rounded))
    assert all(
        tensor.dtype in (torch.uint8, torch.float32)
        for tensor in NF4Weight.load(narrow).base
    )


def state_with(**changes):
    """Changes members of the JSON object; "gone" removes one."""

    def change(tensors):
        state = unpacked(tensors) | changes
        return {
            STATE: packed({k: value for k, value in state.items() if value != "gone"})
        }

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: {"weight": None}, "weight must be a tensor, got none"),
        (
            lambda tensors: {"weight": tensors["weight"][:-1]},
            r"weight must be 480 bytes for \[24, 40\] in .*nf4, got 479",
        ),
        (
            lambda tensors: {"weight.absmax": tensors["weight.absmax"][:-1]},
            r"weight.absmax must be \(15,\), got \(14,\)",
        ),
        (
            lambda tensors: {"weight.absmax": tensors["weight.absmax"].float()},
            "weight.absmax must be torch.uint8",
        ),
        (
            lambda tensors: {
                "weight.nested_absmax": tensors["weight.nested_absmax"] * float("nan")
            },
            "nested_absmax must be finite",
        ),
        (
            lambda tensors: {"weight.nested_absmax": None},
            "weight.nested_absmax must be a tensor",
        ),
        (
            lambda tensors: {"weight.quant_map": tensors["weight.quant_map"].int()},
            "weight.quant_map must be torch.float32",
        ),
        (
            lambda tensors: {"weight.quant_map": tensors["weight.quant_map"] * 0.99},
            "weight.quant_map must be the values of nf4",
        ),
        (
            lambda tensors: {"weight.nested_quant_map": tensors["weight.quant_map"]},
            r"nested_quant_map must be \(256,\)",
        ),
        (
            lambda tensors: {STATE: None},
            "there must be one key weight.quant_state.bitsandbytes__nf4",
        ),
        (lambda tensors: {STATE: packed(b"{")}, "bitsandbytes__nf4 must be JSON"),
        (
            lambda tensors: {STATE: packed(b"\xff\xfe")},
            "bitsandbytes__nf4 must be JSON",
        ),
        (
            lambda tensors: {STATE: packed([])},
            "bitsandbytes__nf4 must be a JSON object",
        ),
        (
            lambda tensors: {STATE: packed(b"[" * 60000)},
            "bitsandbytes__nf4 must be JSON",
        ),
        (
            lambda tensors: {STATE: packed(b"[" * 100000)},
            "bitsandbytes__nf4 must be at most 65536 bytes, got 100000",
        ),
        (state_with(quant_type="fp4"), "quant_type in .* must be 'nf4'"),
        (state_with(quant_type="int8"), "quant_type in .* got 'int8'"),
        (state_with(blocksize=63), "blocksize in .* must be one of"),
        (
            state_with(shape=[24, -40]),
            "shape in .* must be a list of positive whole numbers",
        ),
        (state_with(shape="gone"), "shape in .* got None"),
        (
            state_with(shape=[1 << 30, 1 << 30]),
            "shape in .* must be at most 281474976710656 elements",
        ),
        (
            state_with(shape=[1] * 5000),
            "shape in .* must be at most 281474976710656 elements",
        ),
        (
            state_with(shape=[10**4000]),
            "shape in .* must be a list of positive whole numbers, got .{203}$",
        ),
        (
            state_with(dtype="int8"),
            "dtype in .* must be float32 or float16 or bfloat16",
        ),
        (state_with(nested_blocksize=64), "nested_blocksize in .* must be 256"),
        (
            state_with(nested_offset=float("nan")),
            "nested_offset in .* must be a finite number",
        ),
        (state_with(nested_offset="gone"), "nested_offset in .* got None"),
    ],
)
def test_a_damaged_state_is_refused_by_its_key(change, message):
    tensors = saved()
    tensors |= change(tensors)
    with pytest.raises((ValueError, TypeError), match=message):
        NF4Weight.load(
            {key: tensor for key, tensor in tensors.items() if tensor is not None}
        )


def mutate(tensors, chance):
    """Changes a byte, a length, a dtype or a key."""
    key = chance.choice(list(tensors))
    tensor = tensors[key].clone()
    choice = chance.randrange(6)
    if choice == 0:
        tensor.flatten().view(torch.uint8)[chance.randrange(tensor.nbytes)] = (
            chance.randrange(256)
        )
    elif choice == 1:
        tensor = (
            tensor[: chance.randrange(len(tensor) + 1)]
            if tensor.dim()
            else tensor[None]
        )
    elif choice == 2:
        tensor = tensor.to(
            chance.choice([torch.float16, torch.int64, torch.uint8, torch.bool])
        )
    elif choice == 3:
        tensor = torch.cat([tensor, tensor[: chance.randrange(1, 9)]])
    elif choice == 4:
        return {other: value for other, value in tensors.items() if other != key}
    else:
        return tensors | {chance.choice(list(tensors)): tensor}
    return tensors | {key: tensor}


@pytest.mark.parametrize("double", [False, True])
def test_a_thousand_mutations(double):
    """Each loads and reads no byte out of bounds, or is refused in words that name a key."""
    chance = random.Random(7)
    tensors = saved(double, shape=(24, 41))
    counts = {"loaded": 0, "refused": 0}
    for _ in range(500):
        changed = mutate(tensors, chance)
        try:
            weight = NF4Weight.load(changed)
        except (ValueError, TypeError) as error:
            assert re.match(r"nf4: .*weight", str(error)), str(error)
            counts["refused"] += 1
        else:
            for dtype in (torch.float32, torch.bfloat16):
                assert weight.dequantize(dtype).shape == weight.shape
            counts["loaded"] += 1
    assert min(counts.values()) > 50, counts


UNDER_ASAN = """
from cuda_on_cpu import build
from peftops import backends
from peftops.cpu import nf4
import test_nf4_state
nf4._C = build.opened({library!r})
for double in (False, True):
    test_nf4_state.test_a_thousand_mutations(double)
print("clean")
"""


@pytest.mark.parametrize("isa", ["portable", "avx512"])
def test_mutations_read_no_byte_out_of_bounds(isa):
    """Runs test_a_thousand_mutations under AddressSanitizer."""
    compiled = pytest.importorskip("peftops._C")
    pybind11 = pytest.importorskip("pybind11")
    if not hasattr(compiled, isa) or not shutil.which("g++"):
        pytest.skip(f"this machine builds or runs no {isa}")
    root = Path(__file__).parents[1]
    sources = [root / "tests/nf4_alone.cpp", root / "csrc/cpu/nf4.cpp"]
    includes = [root / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    flags = (
        "-std=c++17 -O1 -g -shared -fPIC -fopenmp -fsanitize=address -ffp-contract=off"
    )
    command = ["g++", *flags.split(), f"-DISA={isa}"]
    if isa == "avx512":
        command.append("-march=x86-64-v4")
    command += [f"-I{folder}" for folder in includes]
    command += map(str, sources)
    read = [*sources, *(root / "csrc/cpu").glob("*.h"), *(root / "csrc").glob("*.h")]
    library = build.made(
        "alone.so", read, command, lambda target: build.call(*command, "-o", target)
    )
    done = sanitized("address", UNDER_ASAN.format(library=str(library)))
    assert done.returncode == 0 and done.stdout == "clean\n", done.stderr[-3000:]
