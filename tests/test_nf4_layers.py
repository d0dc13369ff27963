"""LinearNF4: bitsandbytes' bytes in and out, the law forward and backward, and scales that no cast can reach."""

import copy
import io

import pytest
import ranks
import torch
from law import bound, error
from torch import nn

import peftops
import peftops.functional as F
from peftops.nn import LinearNF4, LoRALinear

pytestmark = pytest.mark.usefixtures("one_thread")
HALF = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [
    (kind, double, block)
    for kind in ("nf4", "fp4")
    for double in (True, False)
    for block in (64, 128)
]


def linear(k=64, n=96, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(k, n, bias, dtype=dtype)


def dense(layer, dtype):
    """nn.Linear of the weight that the layer stands for."""
    new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=dtype)
    new.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
    if layer.bias is not None:
        new.bias.data = layer.bias.data.to(dtype)
    return new


def trained(module, x):
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(3,), (2, 50), (0,), ()], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_trains_like_the_weight_it_stands_for(dtype, rows, bias):
    layer, x = (
        LinearNF4.from_linear(linear(dtype=dtype, bias=bias)),
        torch.randn(*rows, 64, dtype=dtype),
    )
    exact, same = (
        trained(dense(layer, torch.float64), x.double()),
        trained(dense(layer, dtype), x),
    )
    out = trained(layer, x)
    assert [t.dtype for t in out] == [t.dtype for t in same] and [t.shape for t in out] == [
        t.shape for t in same
    ]
    if x.numel():
        assert error(out, exact) <= bound(same, exact)


@pytest.mark.parametrize("k, n", [(33, 7), (96, 40), (1, 1), (70, 130)])
@pytest.mark.parametrize("kind, double, block", FORMATS)
def test_formats_and_odd_sizes(kind, double, block, k, n):
    layer, x = LinearNF4.from_linear(linear(k, n), block, double, kind), torch.randn(5, k)
    exact, same = (
        trained(dense(layer, torch.float64), x.double()),
        trained(dense(layer, torch.float32), x),
    )
    assert error(trained(layer, x), exact) <= bound(same, exact)
    assert error(F.nf4_linear(x, layer.quantized, layer.bias), exact[0]) <= bound(
        same[0], exact[0]
    )


def test_is_exact_in_double():
    layer, x = LinearNF4.from_linear(linear()), torch.randn(4, 64, dtype=torch.float64)
    exact, same = (
        trained(copy.deepcopy(layer).double(), x),
        trained(dense(layer, torch.float32), x.float()),
    )
    assert exact[0].dtype == torch.float64 and error(trained(layer, x.float()), exact) <= bound(
        same, exact
    )


def test_compute_dtype_and_autocast():
    layer, x = LinearNF4.from_linear(linear(), compute_dtype=torch.bfloat16), torch.randn(4, 64)
    exact = trained(dense(layer, torch.float64), x.double())
    same = trained(lambda_of(dense(layer, torch.bfloat16)), x)
    out = trained(layer, x)
    assert out[0].dtype == torch.float32 and error(out[:2], exact[:2]) <= bound(
        same[:2], exact[:2]
    )
    plain = LinearNF4.from_linear(linear())
    with torch.autocast("cpu", torch.bfloat16):
        assert plain(x).dtype == torch.bfloat16 and layer(x).dtype == torch.float32


def lambda_of(linear):
    class Narrow(nn.Module):
        def forward(self, x):
            return linear(x.to(linear.weight.dtype)).to(x.dtype)

    return Narrow()


def bits(layer):
    return {key: t.clone() for key, t in layer.state_dict().items()}


def same_bits(a, b):
    return list(a) == list(b) and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


@pytest.mark.parametrize("double", [True, False])
def test_no_cast_reaches_codes_or_scales(double):
    layer = LinearNF4.from_linear(linear(bias=False), double_quant=double)
    before, weight = bits(layer), layer.dequantize()
    for cast in (
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.to(torch.ones(1, dtype=torch.float16)),
        lambda m: nn.Sequential(m).bfloat16()[0],
    ):
        assert same_bits(bits(cast(layer)), before) and torch.equal(layer.dequantize(), weight)
    biased = LinearNF4.from_linear(linear()).bfloat16()
    assert biased.bias.dtype == torch.bfloat16 and biased.dequantize().dtype == torch.float32
    assert not any(p.requires_grad or p.is_floating_point() for p in layer.parameters())


@pytest.mark.parametrize("double", [True, False])
def test_copies_pickles_and_loads(double):
    layer, x = LinearNF4.from_linear(linear(), 128, double), torch.randn(3, 64)
    before, expected, file = bits(layer), layer(x), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    blank = LinearNF4(64, 96, blocksize=128, double_quant=double)
    other = LinearNF4(64, 96, double_quant=not double)  # takes the format of what it loads
    meta, assigned = LinearNF4(64, 96, device="meta"), LinearNF4(64, 96, device="meta")
    codes = blank.weight
    for new in (blank, other, meta):
        new.load_state_dict(before)
    assigned.load_state_dict(before, assign=True)
    assert (
        assigned.weight.data_ptr() == before["weight"].data_ptr()
        and blank.weight.shape == codes.shape
    )
    for new in (
        copy.deepcopy(layer),
        torch.load(file, weights_only=False),
        blank,
        other,
        meta,
        assigned,
    ):
        assert same_bits(bits(new), before) and torch.equal(new(x), expected)
    with torch.no_grad():
        other.weight.zero_()
        other.quant_map.zero_()
    assert torch.equal(layer(x), expected) and torch.equal(
        LinearNF4.from_linear(linear(), 128, double)(x), expected
    )


def test_what_is_not_quantized_is_quantized_where_it_is_loaded():
    layer = LinearNF4(64, 96, double_quant=False)
    layer.load_state_dict(linear().state_dict())
    assert same_bits(bits(layer), bits(LinearNF4.from_linear(linear(), double_quant=False)))


@pytest.mark.parametrize("assign", [False, True])
def test_codes_are_saved_as_they_were_stored(assign):
    stored, layer = LinearNF4(64, 96, quant_storage=torch.bfloat16), LinearNF4(64, 96)
    layer.load_state_dict(bits(stored), assign=assign)
    made, wanted = bits(layer), bits(stored)
    assert made["weight"].dtype is torch.bfloat16
    for state in (made, wanted):
        state["weight"] = state["weight"].view(torch.uint8)  # where no pattern is NaN
    assert same_bits(made, wanted)


def test_loading_names_what_is_wrong():
    layer, state = LinearNF4(64, 96), bits(LinearNF4(32, 96))
    with pytest.raises(
        RuntimeError, match=r"LinearNF4: weight must be \(96, 64\), got \(96, 32\)"
    ):
        layer.load_state_dict(state)
    state = bits(layer)
    del state["weight.absmax"]
    with pytest.raises(RuntimeError, match=r"nf4: weight\.absmax must be a tensor, got none"):
        layer.load_state_dict(state)
    state = bits(layer)
    del state["bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias"'):
        layer.load_state_dict(state)
    assert layer.load_state_dict(state, strict=False).missing_keys == ["bias"]
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight2"'):
        layer.load_state_dict({**bits(layer), "weight2": torch.ones(1)})


ERRORS = [
    (
        ValueError,
        "LinearNF4: features must be at least 1, got 0 and 4",
        lambda: LinearNF4(0, 4),
    ),
    (
        ValueError,
        "LinearNF4: quant_type must be nf4 or fp4, got 'int4'",
        lambda: LinearNF4(4, 4, quant_type="int4"),
    ),
    (ValueError, "nf4: block must be one of", lambda: LinearNF4(4, 4, blocksize=48)),
    (
        TypeError,
        "LinearNF4: linear must be nn.Linear or.*got GELU",
        lambda: LinearNF4.from_linear(nn.GELU()),
    ),
    (
        TypeError,
        "lora: w must be NF4Weight, got Tensor",
        lambda: F.nf4_linear(torch.ones(2, 4), torch.ones(3, 4)),
    ),
    (
        ValueError,
        r"lora: w must be \(n, k\), got \(64,\)",
        lambda: F.nf4_linear(torch.ones(2, 4), F.quantize_nf4(torch.ones(64))),
    ),
    (
        ValueError,
        r"LinearNF4: weight must be \(out_features, in_features\), got \(2, 3, 4\)",
        lambda: LinearNF4.of(F.quantize_nf4(torch.ones(2, 3, 4))),
    ),
    (
        ValueError,
        r"LinearNF4: weight must be \(4, 8\)",
        lambda: LinearNF4(8, 4).quantize(torch.ones(8, 4)),
    ),
]


@pytest.mark.parametrize(
    "kind, message, call", ERRORS, ids=[message for _, message, _ in ERRORS]
)
def test_errors(kind, message, call):
    with pytest.raises(kind, match=message):
        call()


def test_says_what_it_is():
    text = repr(LinearNF4(8, 4, bias=False, compute_dtype=torch.bfloat16))
    assert text == (
        "LinearNF4(in_features=8, out_features=4, bias=False, nf4, blocksize=64, double_quant=True, "
        "compute_dtype=torch.bfloat16)"
    )


def test_is_initialised_like_linear():
    torch.manual_seed(3)
    layer = LinearNF4(64, 96)
    torch.manual_seed(3)
    expected = nn.Linear(64, 96)
    assert same_bits(bits(layer), bits(LinearNF4.from_linear(expected)))


@pytest.mark.parametrize("compiler", ["aot_eager"])
def test_compiles_whole(compiler):
    torch._dynamo.reset()
    layer, x = LinearNF4.from_linear(linear()), torch.randn(70, 64)
    exact, same = (
        trained(dense(layer, torch.float64), x.double()),
        trained(dense(layer, torch.float32), x),
    )
    layer.compile(fullgraph=True, backend=compiler)
    assert error(trained(layer, x), exact) <= bound(same, exact)


def formula(layer, x, dtype):
    """The docstring of LoRALinear, in torch."""
    name, base = layer.adapter_name, dense(layer.base_layer, dtype).to(x.dtype)
    return base(x) + layer.scaling * layer.lora_B[name](layer.lora_A[name](x))


def adapted(module, x, call):
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = call(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]


@pytest.mark.parametrize("options", [{}, {"lora_bias": True, "use_rslora": True}], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_lora_over_4_bits(dtype, options):
    base = LinearNF4.from_linear(linear(dtype=dtype))
    model = LoRALinear(base, 4, lora_alpha=6, init_lora_weights=False, **options)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {
        torch.float32
    }  # as PEFT makes them
    x = torch.randn(80, 64, dtype=dtype)
    wide, narrow = copy.deepcopy(model).double(), copy.deepcopy(model).to(dtype)
    exact = adapted(wide, x.double(), lambda x: formula(wide, x, torch.float64))
    same = adapted(narrow, x, lambda x: formula(narrow, x, dtype))
    out = adapted(model, x, model)
    assert out[0].dtype == dtype and {g.dtype for g in out[2:]} == {torch.float32}
    assert error(out, exact) <= bound(same, exact)


def test_lora_keeps_the_compute_dtype():
    base, x = LinearNF4.from_linear(linear(), compute_dtype=torch.bfloat16), torch.randn(3, 64)
    y = LoRALinear(base, 4, lora_alpha=6)(x)
    assert y.dtype == torch.float32 and error(y, base(x).double()) <= bound(
        base(x), base(x).double()
    )


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "lora_bias": True, "bias": "all"}], ids=str
)
def test_lora_is_pefts_layer(options):
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lin"], r=4, **options)
    model = nn.Sequential()
    model.add_module("lin", LinearNF4.from_linear(linear()))
    ours = copy.deepcopy(model.lin)
    torch.manual_seed(7)
    theirs = peft.get_peft_model(model, config).base_model.model.lin
    torch.manual_seed(7)
    ours = LoRALinear.from_config(ours, config, "lin")
    assert same_bits(bits(ours), bits(theirs))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert one.dtype == other.dtype and one.requires_grad == other.requires_grad
    shared, x = LoRALinear.from_peft(theirs), torch.randn(3, 64)
    assert shared.base_layer is theirs.base_layer and torch.equal(shared(x), ours(x))


def test_peft_reads_it():
    peft = pytest.importorskip("peft")
    layer = LinearNF4.from_linear(linear())
    assert torch.equal(
        peft.utils.integrations.dequantize_module_weight(layer), layer.dequantize()
    )


SHARDED = """
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from contextlib import nullcontext
import peftops
from peftops.nn import LinearNF4, LoRALinear

def work(rank):
    with peftops.backend(sys.argv[2]) if len(sys.argv) > 2 else nullcontext():
        for double in (True, False):
            base = LinearNF4.from_linear(nn.Linear(64, 96, bias=False), double_quant=double)
            model = nn.Sequential(LoRALinear(base, 4, lora_alpha=6, init_lora_weights=False), LinearNF4(96, 33))
            x = torch.randn(80, 64)
            model(x).square().sum().backward()
            expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
            model.zero_grad()
            before = base.state_dict()
            for layer in (*model, model):
                fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
            assert base.weight.to_local().numel() < base.weight.numel()
            model(x).square().sum().backward()
            grads = [p.grad.full_tensor() for p in model.parameters() if p.requires_grad]
            assert all(map(torch.equal, grads, expected)), rank
            whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            assert all(torch.equal(whole[f"0.base_layer.{k}"], t) for k, t in before.items())
            after = base.state_dict()
            assert all(torch.equal(after[k].full_tensor() if k == "weight" else after[k], t) for k, t in before.items())
            narrow = LinearNF4.from_linear(nn.Linear(64, 96, bias=False), double_quant=double)
            wanted = narrow(x.bfloat16())
            fully_shard(narrow, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
            assert torch.equal(narrow(x), wanted)  # a policy of bf16 has cast no scale
"""


def test_fsdp2_shards_codes_and_scales(tmp_path):
    forced = list(peftops.backends.FORCED.values())
    assert ranks.run(SHARDED, tmp_path, *forced) == ""


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_loads_what_torch_distributed_makes_of_a_state_dict(strict, double):
    """Which adds this layer's own parameters, under their names, to a state dict; also to one of adapters alone."""
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(full_state_dict=True, strict=strict)
    one, two = (
        LoRALinear(LinearNF4.from_linear(linear(), 64, double), 4, lora_alpha=6)
        for _ in range(2)
    )
    two.base_layer.quantize(torch.randn(96, 64))
    state = dcp.get_model_state_dict(one, options=options)
    result = dcp.set_model_state_dict(two, dict(state), options=options)
    assert (
        same_bits(bits(one), bits(two))
        and not result.missing_keys
        and not result.unexpected_keys
    )
    adapters = {key: t + 1 for key, t in state.items() if "lora" in key}
    dcp.set_model_state_dict(two, dict(adapters), options=options)
    assert same_bits(bits(one) | adapters, bits(two))


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes")


def theirs(bnb, dtype, kind="nf4", double=True, block=64, storage=torch.uint8):
    source, made = (
        linear(128, dtype=dtype),
        bnb.nn.Linear4bit(128, 96),
    )  # its CPU kernel wants whole blocks in a row
    options = {
        "quant_type": kind,
        "compress_statistics": double,
        "blocksize": block,
        "quant_storage": storage,
    }
    made.weight, made.bias = (
        bnb.nn.Params4bit(source.weight.data, **options).to("cpu"),
        source.bias,
    )
    return made


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind, double, block", FORMATS)
def test_writes_the_file_that_bitsandbytes_writes(bnb, kind, double, block, dtype, storage):
    safetensors = pytest.importorskip("safetensors.torch")
    expected = theirs(bnb, dtype, kind, double, block, storage)
    state = expected.state_dict()
    file = safetensors.save(state)
    ours = LinearNF4.from_linear(linear(128, dtype=dtype), block, double, kind)
    ours.quant_storage = storage
    loaded = LinearNF4(128, 96, device="meta")
    loaded.load_state_dict(safetensors.load(file))
    for layer in (ours, loaded, LinearNF4.from_bnb(expected)):
        assert (
            list(layer.state_dict()) == list(state)
            and safetensors.save(layer.state_dict()) == file
        )
        back = bnb.functional.dequantize_4bit(expected.weight, expected.weight.quant_state)
        assert torch.equal(layer.dequantize(), back) and layer.dequantize().dtype == dtype
    x = torch.randn(5, 128, dtype=dtype)
    exact, same = trained(dense(ours, torch.float64), x.double()), trained(expected, x)
    assert error(trained(ours, x), exact) <= bound(same, exact)


def test_bitsandbytes_loads_what_it_writes(bnb):
    state = LinearNF4.from_linear(linear()).state_dict()
    stats = {
        key.removeprefix("weight."): t for key, t in state.items() if key.startswith("weight.")
    }
    weight = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
    back = bnb.functional.dequantize_4bit(weight, weight.quant_state)
    assert torch.equal(back, LinearNF4.from_linear(linear()).dequantize())


def test_refuses_what_bitsandbytes_has_not_quantized_or_has_repacked(bnb):
    with pytest.raises(ValueError, match="LinearNF4: linear must be quantized"):
        LinearNF4.from_bnb(bnb.nn.Linear4bit(64, 96))
    layer = theirs(bnb, torch.float32)
    weight, state = layer.weight, layer.weight.quant_state
    weight.data, weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        weight.data, state
    )
    with pytest.raises(
        ValueError, match="LinearNF4: linear must be as it was loaded, got one repacked"
    ):
        LinearNF4.from_bnb(layer)
