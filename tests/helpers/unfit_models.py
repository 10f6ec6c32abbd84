"""Tiny models that a KV budget does not fit: attention with linear biases (Bloom) and a recurrent state (Mamba)."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from helpers.tiny_models import spm_tokens, write_tokens

N_EMBD, N_FF, N_LAYER, N_CTX = 64, 128, 2, 512


def write_bloom(path: Path) -> Path:
    writer = _writer(path, "bloom")
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-5)
    norms: tuple[str, ...] = ("token_embd_norm", "output_norm")
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(spm_tokens().texts), N_EMBD)}
    for layer in range(N_LAYER):
        block = f"blk.{layer}."
        norms += (block + "attn_norm", block + "ffn_norm")
        matrices = {"attn_qkv": (3 * N_EMBD, N_EMBD), "attn_output": (N_EMBD, N_EMBD), "ffn_up": (N_FF, N_EMBD),
                    "ffn_down": (N_EMBD, N_FF)}  # fmt: skip
        for name, shape in matrices.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (N_EMBD,), f"{name}.bias": (N_EMBD,)}
    return _write(writer, path, shapes)


def write_mamba(path: Path) -> Path:
    inner, state, conv, rank = 2 * N_EMBD, 8, 4, 4
    writer = _writer(path, "mamba")
    writer.add_head_count(0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_conv_kernel(conv)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(spm_tokens().texts), N_EMBD), "output_norm.weight": (N_EMBD,),
    }  # fmt: skip
    for layer in range(N_LAYER):
        parts = {
            "attn_norm.weight": (N_EMBD,), "ssm_in.weight": (2 * inner, N_EMBD), "ssm_conv1d.weight": (inner, conv),
            "ssm_conv1d.bias": (inner,), "ssm_x.weight": (rank + 2 * state, inner), "ssm_dt.weight": (inner, rank),
            "ssm_dt.bias": (inner,), "ssm_a": (inner, state), "ssm_d": (inner,), "ssm_out.weight": (N_EMBD, inner),
        }  # fmt: skip
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
    return _write(writer, path, shapes)


def _writer(path: Path, arch: str) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(N_LAYER)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    write_tokens(writer, spm_tokens())
    return writer


def _write(writer: gguf.GGUFWriter, path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = rng.normal(0, 0.1, shape)
        writer.add_tensor(name, (-np.exp(values) if name.endswith("ssm_a") else values).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
