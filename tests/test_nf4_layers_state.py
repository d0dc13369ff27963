"""LinearNF4's state: copies, state dicts, and the files of bitsandbytes."""

import copy
import io

import pytest
import torch
from law import bound, error
from nf4_layers import DTYPES, FORMATS, bits, dense, linear, same_bits, trained

from peftops.nn import LinearNF4

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("double", [True, False])
def test_copies_pickles_and_loads(double):
    layer = LinearNF4.from_linear(linear(), 128, double)
    x = torch.randn(3, 64)
    before = bits(layer)
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    blank = LinearNF4(64, 96, blocksize=128, double_quant=double)
    other = LinearNF4(
        64, 96, double_quant=not double
    )  # takes the format of what it loads
    meta = LinearNF4(64, 96, device="meta")
    assigned = LinearNF4(64, 96, device="meta")
    codes = blank.weight
    for new in (blank, other, meta):
        new.load_state_dict(before)
    assigned.load_state_dict(before, assign=True)
    assert assigned.weight.data_ptr() == before["weight"].data_ptr()
    assert blank.weight.shape == codes.shape
    unpickled = torch.load(file, weights_only=False)
    for new in (copy.deepcopy(layer), unpickled, blank, other, meta, assigned):
        assert same_bits(bits(new), before) and torch.equal(new(x), expected)
    with torch.no_grad():
        other.weight.zero_()
        other.quant_map.zero_()
    assert torch.equal(layer(x), expected)
    assert torch.equal(LinearNF4.from_linear(linear(), 128, double)(x), expected)


def test_a_dense_weight_is_quantized_where_it_is_loaded():
    layer = LinearNF4(64, 96, double_quant=False)
    layer.load_state_dict(linear().state_dict())
    assert same_bits(
        bits(layer), bits(LinearNF4.from_linear(linear(), double_quant=False))
    )


@pytest.mark.parametrize("assign", [False, True])
def test_codes_are_saved_as_they_were_stored(assign):
    stored = LinearNF4(64, 96, quant_storage=torch.bfloat16)
    layer = LinearNF4(64, 96)
    layer.load_state_dict(bits(stored), assign=assign)
    loaded = bits(layer)
    expected = bits(stored)
    assert loaded["weight"].dtype is torch.bfloat16
    for state in (loaded, expected):
        state["weight"] = state["weight"].view(
            torch.uint8
        )  # a NaN does not equal itself
    assert same_bits(loaded, expected)


def test_loading_names_what_is_wrong():
    layer = LinearNF4(64, 96)
    state = bits(LinearNF4(32, 96))
    with pytest.raises(
        RuntimeError, match=r"LinearNF4: weight must be \(96, 64\), got \(96, 32\)"
    ):
        layer.load_state_dict(state)
    state = bits(layer)
    del state["weight.absmax"]
    with pytest.raises(
        RuntimeError, match=r"nf4: weight\.absmax must be a tensor, got none"
    ):
        layer.load_state_dict(state)
    state = bits(layer)
    del state["bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias"'):
        layer.load_state_dict(state)
    assert layer.load_state_dict(state, strict=False).missing_keys == ["bias"]
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight2"'):
        layer.load_state_dict({**bits(layer), "weight2": torch.ones(1)})


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes")


def theirs(bnb, dtype, quant_type="nf4", double=True, block=64, storage=torch.uint8):
    """bitsandbytes' layer. It has 128 inputs, as its CPU kernel wants whole blocks in a row."""
    source = linear(128, dtype=dtype)
    layer = bnb.nn.Linear4bit(128, 96)
    options = {
        "quant_type": quant_type,
        "compress_statistics": double,
        "blocksize": block,
        "quant_storage": storage,
    }
    layer.weight = bnb.nn.Params4bit(source.weight.data, **options).to("cpu")
    layer.bias = source.bias
    return layer


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type, double, block", FORMATS)
def test_writes_the_file_that_bitsandbytes_writes(
    bnb, quant_type, double, block, dtype, storage
):
    safetensors = pytest.importorskip("safetensors.torch")
    expected = theirs(bnb, dtype, quant_type, double, block, storage)
    state = expected.state_dict()
    file = safetensors.save(state)
    ours = LinearNF4.from_linear(linear(128, dtype=dtype), block, double, quant_type)
    ours.quant_storage = storage
    loaded = LinearNF4(128, 96, device="meta")
    loaded.load_state_dict(safetensors.load(file))
    for layer in (ours, loaded, LinearNF4.from_bnb(expected)):
        assert list(layer.state_dict()) == list(state)
        assert safetensors.save(layer.state_dict()) == file
        back = bnb.functional.dequantize_4bit(
            expected.weight, expected.weight.quant_state
        )
        assert (
            torch.equal(layer.dequantize(), back) and layer.dequantize().dtype == dtype
        )
    x = torch.randn(5, 128, dtype=dtype)
    exact = trained(dense(ours, torch.float64), x.double())
    same = trained(expected, x)
    assert error(trained(ours, x), exact) <= bound(same, exact)


def test_bitsandbytes_loads_what_it_writes(bnb):
    state = LinearNF4.from_linear(linear()).state_dict()
    stats = {
        key.removeprefix("weight."): tensor
        for key, tensor in state.items()
        if key.startswith("weight.")
    }
    weight = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
    back = bnb.functional.dequantize_4bit(weight, weight.quant_state)
    assert torch.equal(back, LinearNF4.from_linear(linear()).dequantize())


def test_refuses_layers_that_bitsandbytes_has_not_quantized_or_has_repacked(bnb):
    with pytest.raises(ValueError, match="LinearNF4: linear must be quantized"):
        LinearNF4.from_bnb(bnb.nn.Linear4bit(64, 96))
    layer = theirs(bnb, torch.float32)
    weight = layer.weight
    weight.data, weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        weight.data, weight.quant_state
    )
    with pytest.raises(
        ValueError, match="LinearNF4: linear must be as it was loaded, got one repacked"
    ):
        LinearNF4.from_bnb(layer)
