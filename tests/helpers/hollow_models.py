"""Writes GGUF models of any size in milliseconds: everything is there but the weights, whose place is a hole.

llama.cpp takes them wherever no weight is computed with: simulated loading and planning. The vocabulary is a number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

Tensor = tuple[str, tuple[int, ...], GGMLQuantizationType]


@dataclass(frozen=True)
class Dims:
    """The dimensions of a model; ``n_head_kv`` may have one entry per layer. ``type`` is that of all matrices."""

    arch: str = "llama"
    n_layer: int = 4
    n_embd: int = 512
    n_head: int = 8
    n_head_kv: int | tuple[int, ...] = 2
    head_dim: int = 64
    n_ff: int = 1408
    n_vocab: int = 4096
    n_expert: int = 0
    n_expert_used: int = 0
    sliding_window: int | None = None
    tied: bool = False
    type: str = "F16"


def write_model(path: Path, dims: Dims) -> Path:
    """Write a model that llama.cpp loads with ``no_alloc``, and return its path."""
    writer = gguf.GGUFWriter(path, dims.arch)
    writer.add_block_count(dims.n_layer)
    writer.add_context_length(131072)
    writer.add_embedding_length(dims.n_embd)
    writer.add_feed_forward_length(dims.n_ff)
    writer.add_head_count(dims.n_head)
    writer.add_head_count_kv(dims.n_head_kv if isinstance(dims.n_head_kv, int) else list(dims.n_head_kv))
    writer.add_key_length(dims.head_dim)
    writer.add_value_length(dims.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(dims.n_vocab)
    writer.add_tokenizer_model("none")
    if dims.n_expert:
        writer.add_expert_count(dims.n_expert)
        writer.add_expert_used_count(dims.n_expert_used)
        writer.add_expert_feed_forward_length(dims.n_ff)
    if dims.sliding_window is not None:
        writer.add_sliding_window(dims.sliding_window)
    end = 0
    for name, shape, kind in _tensors(dims):
        count = 1
        for extent in shape:
            count *= extent
        block, block_bytes = GGML_QUANT_SIZES[kind]
        size = count // block * block_bytes
        # the writer wants NumPy's order, and the shape in bytes for quantized types unless told the type
        writer.add_tensor_info(name, tuple(reversed(shape)), np.dtype(np.float32), size, raw_dtype=kind)
        end += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = -(-path.stat().st_size // 32) * 32
    with open(path, "r+b") as file:
        file.truncate(start + end)
    return path


def _tensors(dims: Dims) -> Iterator[Tensor]:
    matrix, f32 = GGMLQuantizationType[dims.type], GGMLQuantizationType.F32
    width = dims.n_head * dims.head_dim
    yield "token_embd.weight", (dims.n_embd, dims.n_vocab), matrix
    yield "output_norm.weight", (dims.n_embd,), f32
    if not dims.tied:
        yield "output.weight", (dims.n_embd, dims.n_vocab), matrix
    for layer in range(dims.n_layer):
        kv = (dims.n_head_kv if isinstance(dims.n_head_kv, int) else dims.n_head_kv[layer]) * dims.head_dim
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", (dims.n_embd,), f32
        yield block + "attn_q.weight", (dims.n_embd, width), matrix
        yield block + "attn_k.weight", (dims.n_embd, kv), matrix
        yield block + "attn_v.weight", (dims.n_embd, kv), matrix
        yield block + "attn_output.weight", (width, dims.n_embd), matrix
        if dims.arch in ("qwen3", "qwen3moe", "gemma3"):
            yield block + "attn_q_norm.weight", (dims.head_dim,), f32
            yield block + "attn_k_norm.weight", (dims.head_dim,), f32
        if dims.arch == "qwen2":
            yield block + "attn_q.bias", (width,), f32
            yield block + "attn_k.bias", (kv,), f32
            yield block + "attn_v.bias", (kv,), f32
        if dims.arch in ("gemma2", "gemma3"):
            yield block + "post_attention_norm.weight", (dims.n_embd,), f32
            yield block + "post_ffw_norm.weight", (dims.n_embd,), f32
        yield block + "ffn_norm.weight", (dims.n_embd,), f32
        if dims.n_expert:
            yield block + "ffn_gate_inp.weight", (dims.n_embd, dims.n_expert), f32
            yield block + "ffn_gate_exps.weight", (dims.n_embd, dims.n_ff, dims.n_expert), matrix
            yield block + "ffn_up_exps.weight", (dims.n_embd, dims.n_ff, dims.n_expert), matrix
            yield block + "ffn_down_exps.weight", (dims.n_ff, dims.n_embd, dims.n_expert), matrix
        else:
            yield block + "ffn_gate.weight", (dims.n_embd, dims.n_ff), matrix
            yield block + "ffn_up.weight", (dims.n_embd, dims.n_ff), matrix
            yield block + "ffn_down.weight", (dims.n_ff, dims.n_embd), matrix
