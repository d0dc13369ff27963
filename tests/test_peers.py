"""Peers of the bench: each is called as its package wants, and computes the same or is absent.

An absent one is named with the reason.
"""

import textwrap
from dataclasses import replace

import pytest
import torch
from peftops.bench import measure, peers
from peftops.bench.peers import BASE, OURS, Absent, Problem
from peftops.bench.worker import Remote

from peftops.cli import BadInput

pytest.importorskip("peft")
CPU = torch.device("cpu")
SMALL = Problem((70, 32, 48, 4), torch.bfloat16, CPU)
ONE = Problem((1, 32, 48, 4), torch.bfloat16, CPU)
SINGLE = Problem((70, 32, 48, 4), torch.float32, CPU)


def test_peers_compute_the_same():
    for problem in (SMALL, ONE, SINGLE):
        for label in peers.HERE:
            if "compile" in label or (problem is SINGLE and "narrow" in label):
                continue
            assert peers.contender(label, problem).error < peers.WRONG, label
    with pytest.raises(Absent, match="fp32 anyway"):
        peers.contender("PEFT, narrow adapters", SINGLE)


def test_a_peer_that_computes_something_else_is_not_measured(monkeypatch):
    monkeypatch.setitem(
        peers.BUILDERS, "torch", lambda t, w, a, b: (lambda x: x @ w.T, [])
    )
    absent = {}
    assert list(measure.build([BASE, "torch"], SMALL, absent)) == [BASE]
    assert "computes something else: its error is" in absent["torch"]


def test_a_peer_that_is_not_installed_is_named():
    with pytest.raises(Absent, match="is not installed"):
        peers.contender("lorafusion", SMALL)


def test_peers_are_named_alone_or_between_commas():
    assert peers.known(["PEFT, compiled", "torch,PEFT"]) == [
        "PEFT, compiled",
        "torch",
        "PEFT",
    ]
    assert all(
        peers.known([name]) == [name] for name in peers.HERE | peers.NF4 | peers.GPU
    )
    with pytest.raises(BadInput, match="got 'nobody'"):
        peers.known(["PEFT,nobody"])


# The part of each peer's package that is called, in plain torch under the package's names.
FAKES = {
    "unsloth": """
        class LoRA_W(torch.autograd.Function):
            @staticmethod
            def forward(ctx, X, W, W_quant, A, B, S):
                assert X.dim() == 3
                ctx.save_for_backward(X, W, A, B)
                return X @ W.T + S * (X @ A.T.to(X.dtype) @ B.T.to(X.dtype))
            @staticmethod
            def backward(ctx, dY):
                X, W, A, B = ctx.saved_tensors
                return dY @ W, None, None, A * 0, B * 0, None
        sys.modules["unsloth.kernels.fast_lora"] = module(LoRA_W=LoRA_W)
    """,
    "axolotl": """
        class LoRA_O(torch.autograd.Function):
            @staticmethod
            def forward(ctx, X, X_drop, W, bias, W_quant, A, B, s, lora_bias, magnitude):
                assert X.dim() == 3 and X_drop is bias is magnitude is None
                ctx.save_for_backward(W, A, B)
                return X @ W.T + s * (X @ A.T @ B.T)
            @staticmethod
            def backward(ctx, dY):
                W, A, B = ctx.saved_tensors
                return dY @ W, None, None, None, None, A * 0, B * 0, None, None, None
        sys.modules["axolotl.kernels.lora"] = module(LoRA_O=LoRA_O)
    """,
    "lorafusion": """
        def fused_linear_lora(
            x, linear_w, lora_a, lora_b, alpha, seed=None, dropout_p=0.0, linear_bias=None
        ):
            assert x.dim() == 3
            return x @ linear_w.T + alpha * (x @ lora_a.T @ lora_b.T)
        sys.modules["lorafusion.ops.lora_v1"] = module(fused_linear_lora=fused_linear_lora)
    """,
    "vllm": """
        class LoRAKernelMeta:
            @classmethod
            def make(cls, max_loras, max_num_tokens, device):
                return cls()
            def prepare_tensors(self, mapping):
                assert mapping.dtype == torch.int32
            def meta_args(self, token_nums, specialize_active_lora):
                return (token_nums,)
        def lora_shrink(inputs, weights, out, tokens, scaling):
            out.copy_(scaling * (inputs @ weights[0][0].T)[None])
        def lora_expand(inputs, weights, out, tokens, offset_start=0, add_inputs=False):
            out += (inputs[0] @ weights[0][0].float().T).to(out.dtype)
        sys.modules["vllm.lora.ops.triton_ops"] = module(
            LoRAKernelMeta=LoRAKernelMeta, lora_shrink=lora_shrink, lora_expand=lora_expand
        )
    """,
    "sglang": """
        from dataclasses import dataclass
        @dataclass
        class LoRABatchInfo:
            use_cuda_graph: bool
            bs: int
            num_segments: int
            seg_indptr: object
            weight_indices: object
            lora_ranks: object
            scalings: object
            max_len: int
            seg_lens: object
            permutation: object
        def a_fwd(x, weights, info, stack_num=1):
            return x @ weights[0].T
        def b_fwd(x, weights, info, base_output=None):
            return base_output.add_(x @ weights[0].T, alpha=info.scalings.item())
        sys.modules["sglang.srt.lora.utils"] = module(LoRABatchInfo=LoRABatchInfo)
        sys.modules["sglang.kernels.ops.lora.dense.sgemm_lora_a"] = module(sgemm_lora_a_fwd=a_fwd)
        sys.modules["sglang.kernels.ops.lora.dense.sgemm_lora_b"] = module(sgemm_lora_b_fwd=b_fwd)
    """,
    "flashinfer": """
        class SegmentGEMMWrapper:
            def __init__(self, buffer):
                pass
            def run(
                self, x, weights, batch_size, weight_column_major,
                out=None, seg_lens=None, seg_indptr=None,
            ):
                assert weight_column_major and seg_indptr.dtype == torch.int64
                return x @ weights[0].T
        sys.modules["flashinfer.gemm"] = module(SegmentGEMMWrapper=SegmentGEMMWrapper)
    """,
}
FAKE = """
import sys, types, torch
print("a banner that nobody asked for")
def module(**names):
    made = types.ModuleType("made")
    made.__dict__.update(names)
    return made
for name in {parents}:
    sys.modules.setdefault(name, module(__path__=[]))
"""


@pytest.mark.parametrize("label", FAKES)
def test_a_peer_of_its_own_process(label, tmp_path):
    """Calls each peer in a fake of its package, as none is installed; ignores what that prints."""
    parents = {name.rpartition(".")[0] for name in FAKES[label].split('"')[1::2]}
    parents |= {".".join(name.split(".")[:i]) for name in parents for i in range(2, 6)}
    (tmp_path / label).mkdir()
    code = FAKE.format(parents=sorted(parents - {label, ""})) + textwrap.dedent(
        FAKES[label]
    )
    (tmp_path / label / "__init__.py").write_text(code)
    serving = label in ("vllm", "sglang", "flashinfer")
    problem = ONE if serving else SMALL
    if label == "lorafusion":
        problem = Problem(SMALL.shape, SMALL.dtype, CPU, 0.1)
    remote = Remote(label, problem, tmp_path)
    try:
        if label == "lorafusion":
            assert remote.error is None
        else:
            assert remote.error < peers.WRONG
        for call in remote.calls:
            assert (
                remote.prepare(call, "eager") >= 1 and remote.sample(call, "eager") > 0
            )
        if serving:
            assert list(remote.calls) == ["forward"]
        else:
            assert list(remote.calls) == ["forward", "forward + backward"]
        with pytest.raises(Absent, match="KeyError"):
            remote.prepare("sideways", "eager")
    finally:
        remote.close()
    unfit = (
        ONE if label in ("unsloth", "axolotl") else SMALL
    )  # lorafusion needs dropout
    with pytest.raises(Absent, match=r"made for|needs dropout"):
        Remote(label, unfit, tmp_path)


def test_a_process_that_ends_is_absent(tmp_path):
    (tmp_path / "unsloth").mkdir()
    (tmp_path / "unsloth" / "__init__.py").write_text("import os; os._exit(3)")
    with pytest.raises(Absent, match="its process ended with 3"):
        Remote("unsloth", SMALL, tmp_path)


def test_another_tree_is_measured_with_the_benches_of_this_one(tmp_path):
    (tmp_path / "peftops").mkdir()
    (tmp_path / "peftops" / "__init__.py").write_text(
        "def patch(model): raise RuntimeError('the other tree')"
    )
    with pytest.raises(Absent, match="RuntimeError: the other tree"):
        Remote(OURS, SMALL, tmp_path)


# A peftops whose patch() raises a description of the model that it is given.
DESCRIBING = """
class nn:
    class LinearNF4:
        def from_linear(layer, double_quant):
            layer.base = "nf4, double" if double_quant else "nf4"
            return layer

def patch(model):
    layer, = model
    base = getattr(layer.base_layer, "base", "dense")
    raise RuntimeError(f"{base}; {type(layer.lora_variant['default'])}")
"""


@pytest.mark.parametrize("base", ["dense", "nf4", "nf4, double"])
def test_another_process_builds_the_same_problem(base, tmp_path):
    (tmp_path / "peftops").mkdir()
    (tmp_path / "peftops" / "__init__.py").write_text(DESCRIBING)
    with pytest.raises(Absent, match=f"{base}; .*DoraLinearVariant"):
        Remote(OURS, replace(SMALL, base=base, dora="peft"), tmp_path)
