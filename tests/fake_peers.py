"""Fakes of the packages that the bench has as peers: what it calls, in plain torch.

They take the arguments that the packages take, and compute by the metadata that they are given.
"""

import textwrap

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
        def products(inputs, weights, indices):
            assert indices.shape == inputs.shape[:1] and indices.dtype == torch.int64
            return torch.einsum('bi, boi -> bo', inputs.float(), weights[indices].float())
        def bgmv_shrink(
            inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling=1.0
        ):
            h = products(inputs, lora_b_weights, lora_indices_tensor)
            output_tensor[:, : h.shape[1]] = scaling * h
        def bgmv_expand_slice(
            inputs, lora_b_weights, output_tensor, lora_indices_tensor, slice_offset, slice_size,
            add_inputs=True,
        ):
            assert add_inputs
            y = products(inputs, lora_b_weights, lora_indices_tensor)
            output_tensor[:, slice_offset : slice_offset + slice_size] += y
        sys.modules["vllm.lora.ops.torch_ops"] = module(
            bgmv_shrink=bgmv_shrink, bgmv_expand_slice=bgmv_expand_slice
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
        def segments(x, weights, info):
            assert x.is_contiguous() and weights.is_contiguous()
            assert x.dim() == 2 and weights.dim() == 3 and not info.use_cuda_graph
            assert info.weight_indices.shape == (info.num_segments,)
            assert info.seg_indptr.shape == (info.num_segments + 1,)
            assert {t.dtype for t in (
                info.permutation, info.seg_indptr, info.weight_indices, info.lora_ranks
            )} == {torch.int32}
            for segment in range(info.num_segments):
                start, end = info.seg_indptr[segment : segment + 2]
                assert 0 < end - start <= info.max_len and info.max_len >= 16
                adapter = info.weight_indices[segment]
                rank = info.lora_ranks[adapter]
                yield info.permutation[start:end], adapter, rank
        def chunked_sgmv_lora_shrink_forward(x, weights, batch_info, num_slices):
            assert num_slices == 1
            h = x.new_full((len(x), weights.shape[1]), float('nan'))
            for rows, adapter, rank in segments(x, weights, batch_info):
                assert weights[adapter, rank - 1].any() and not weights[adapter, rank:].any()
                h[rows, :rank] = x[rows] @ weights[adapter, :rank].T
            return h
        def chunked_sgmv_lora_expand_forward(
            x, weights, batch_info, slice_offsets, max_slice_size, base_output
        ):
            assert slice_offsets.tolist() == [0, max_slice_size] == [0, weights.shape[1]]
            for rows, adapter, rank in segments(x, weights, batch_info):
                part = x[rows, :rank] @ weights[adapter, :, :rank].T
                base_output[rows] += batch_info.scalings[adapter].to(x.dtype) * part
            return base_output
        sys.modules["sglang.srt.lora.utils"] = module(LoRABatchInfo=LoRABatchInfo)
        sys.modules["sglang.kernels.ops.lora.dense.chunked_sgmv_shrink"] = module(
            chunked_sgmv_lora_shrink_forward=chunked_sgmv_lora_shrink_forward
        )
        sys.modules["sglang.kernels.ops.lora.dense.chunked_sgmv_expand"] = module(
            chunked_sgmv_lora_expand_forward=chunked_sgmv_lora_expand_forward
        )
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
# What vLLM has for GPUs, and where SGLang had its kernels before.
OTHERS = {
    "vllm": """
        class LoRAKernelMeta:
            @staticmethod
            def make(max_loras, max_num_tokens, device, captured_lora_counts=None):
                meta = LoRAKernelMeta()
                meta.max_loras = max_loras
                return meta
            def prepare_tensors(self, token_lora_mapping):
                assert token_lora_mapping.dtype == torch.int32
                self.mapping = token_lora_mapping
                assert 0 <= self.mapping.min() and self.mapping.max() < self.max_loras
            def meta_args(self, token_nums, specialize_active_lora):
                return self.mapping[:token_nums], *range(6)
        def lora_shrink(
            inputs, lora_a_weights, output_tensor, token_lora_mapping,
            token_indices_sorted_by_lora_ids, num_tokens_per_lora, lora_token_start_loc,
            lora_ids, no_lora_flag_cpu, num_active_loras, scaling,
        ):
            (weights,) = lora_a_weights
            assert inputs.dtype == weights.dtype and inputs.dtype.itemsize == 2
            assert output_tensor.dtype == torch.float32
            weights = weights[token_lora_mapping].float()
            h = torch.einsum('bi, boi -> bo', inputs.float(), weights)
            output_tensor.copy_(scaling * h[None])
        def lora_expand(
            inputs, lora_b_weights, output_tensor, token_lora_mapping,
            token_indices_sorted_by_lora_ids, num_tokens_per_lora, lora_token_start_loc,
            lora_ids, no_lora_flag_cpu, num_active_loras, offset_start=0, add_inputs=False,
        ):
            assert offset_start == 0 and add_inputs
            weights = lora_b_weights[0][token_lora_mapping].float()
            output_tensor += torch.einsum('bi, boi -> bo', inputs[0], weights)
        sys.modules["vllm.lora.ops.triton_ops"] = module(
            LoRAKernelMeta=LoRAKernelMeta, lora_shrink=lora_shrink, lora_expand=lora_expand
        )
    """,
    "sglang": FAKES["sglang"].split('sys.modules["sglang.kernels')[0]
    + """
        sys.modules["sglang.srt.lora.triton_ops"] = module(
            chunked_sgmv_lora_shrink_forward=chunked_sgmv_lora_shrink_forward,
            chunked_sgmv_lora_expand_forward=chunked_sgmv_lora_expand_forward,
        )
    """,
}
# LoRAFusion's kernels for several adapters, in plain torch.
LORAFUSION = """
        def prepare_multi_lora_batch_info(
            seq_len_list, lora_idx_list, lora_rank_list, dropout_p_list, alpha_list,
            block_size_m, output_dtype=torch.bfloat16, micro_batch_info=None, *,
            allow_empty_micro_batch_info=False,
        ):
            info = types.SimpleNamespace(**locals())
            counts = [-(-length // block_size_m) for length in seq_len_list]
            info.padded_seq_len_list = [count * block_size_m for count in counts]
            rows = []
            for i, count in enumerate(counts):
                left = seq_len_list[i]
                for block in range(count):
                    valid = min(block_size_m, left - block * block_size_m)
                    rows.append((lora_rank_list[i], valid, sum(counts[:i]), alpha_list[i]))
            info.block_to_lookup_table = torch.tensor([row[:3] for row in rows])
            info.block_to_dropout_p = torch.zeros(len(rows))
            info.block_to_alpha = torch.tensor([row[3] for row in rows], dtype=output_dtype)
            info.enable_dropout = any(dropout_p_list)
            info.same_dropout_p_value = dropout_p_list[0]
            info.max_r = max(lora_rank_list)
            return info
        def fused_linear_multi_lora(
            padded_x, linear_w, *, lora_a_list, lora_b_list, seq_len_list,
            padded_seq_len_list, block_to_lookup_table, block_to_dropout_p, block_to_alpha,
            enable_dropout, same_dropout_p_value, max_r, linear_bias=None,
        ):
            assert padded_x.dim() == 3 and padded_x.shape[0] == 1 and not enable_dropout
            assert len(lora_a_list) == len(lora_b_list) <= 4
            lora_a_list += [None] * (4 - len(lora_a_list))
            lora_b_list += [None] * (4 - len(lora_b_list))
            assert padded_x.dtype == block_to_alpha.dtype
            x = padded_x[0].split(BLOCK)
            owners = []
            for i, length in enumerate(padded_seq_len_list):
                owners += [i] * (length // BLOCK)
            parts = []
            for rows, i, (rank, valid, start), alpha in zip(
                x, owners, block_to_lookup_table.tolist(), block_to_alpha, strict=True
            ):
                a, b = lora_a_list[i], lora_b_list[i]
                assert len(rows) == valid and start == owners.index(i)
                assert a.shape[0] == b.shape[1] == rank <= max_r
                assert a.is_contiguous() and b.is_contiguous()
                parts.append(rows @ linear_w.T + alpha * (rows @ a.T @ b.T))
            return torch.cat(parts)[None]
        BLOCK = 8
        def get_lora_kernel_config(kernel_name):
            assert kernel_name == 'fused_multi_lora_block_size_m'
            return BLOCK
        sys.modules["lorafusion.ops.multi_lora"] = module(
            prepare_multi_lora_batch_info=prepare_multi_lora_batch_info,
            fused_linear_multi_lora=fused_linear_multi_lora,
        )
        sys.modules["lorafusion.ops.triton_ops.config"] = module(
            get_lora_kernel_config=get_lora_kernel_config
        )
"""
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


def package(folder, label, code):
    """Writes a fake of a package."""
    parents = {name.rpartition(".")[0] for name in code.split('"')[1::2]}
    parents |= {".".join(name.split(".")[:i]) for name in parents for i in range(2, 6)}
    (folder / label).mkdir()
    text = FAKE.format(parents=sorted(parents - {label, ""})) + textwrap.dedent(code)
    (folder / label / "__init__.py").write_text(text)
