"""LoRA adapters for the tiny models, and the same models with an adapter's change added to their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

#: Weights of a block that the adapters change, and experts' where there are any.
PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")

Pairs = dict[str, tuple[np.ndarray, np.ndarray]]


def weights_of(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a model in F32, by name, as NumPy shapes: (out, in), experts in front."""
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}


def random_pairs(model: Path, *, rank: int = 4, parts: Sequence[str] = PARTS, seed: int = 1) -> Pairs:
    """A and B, (rank, in) and (out, rank) with experts in front, for weights of these parts in every block.

    ``output`` and ``token_embd`` may be among the parts; the embedding's are the other way round, as in the library.
    """
    rng, pairs = np.random.default_rng(seed), Pairs()
    for name, weight in weights_of(model).items():
        part = name.split(".")[-2].removesuffix("_exps")
        if part not in parts or not name.endswith(".weight"):
            continue
        *experts, n_out, n_in = weight.shape
        a = rng.normal(0, n_in**-0.5, (*experts, rank, n_in)).astype(np.float32)
        b = rng.normal(0, 0.5, (*experts, n_out, rank)).astype(np.float32)
        # each row of the embedding is B times that token's row of A
        pairs[name] = (b, np.swapaxes(a, -1, -2).copy()) if part == "token_embd" else (a, b)
    return pairs


def write_adapter(
    path: Path,
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    alpha: float | None = 8.0,
    arch: str = "llama",
    kind: str = "adapter",
    method: str = "lora",
    extra: Callable[[gguf.GGUFWriter], Any] = lambda _: None,
) -> Path:
    """Write an adapter as llama.cpp's converter does, and return its path."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(kind)
    writer.add_string("adapter.type", method)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, (a, b) in pairs.items():
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def merge(path: Path, model: Path, changes: Sequence[tuple[Pairs, float]]) -> Path:
    """Write the model with ``factor * B A`` of each change added to its weights, in F32, and return its path.

    The file is a copy whose tensors' bytes are replaced, so that nothing else is different.
    """
    path.write_bytes(model.read_bytes())
    reader = gguf.GGUFReader(path, "r+")
    for tensor in reader.tensors:
        for pairs, factor in changes:
            if tensor.name not in pairs:
                continue
            a, b = (matrix.astype(np.float64) for matrix in pairs[tensor.name])
            change = a @ np.swapaxes(b, -1, -2) if tensor.name == "token_embd.weight" else b @ a
            tensor.data[:] = tensor.data + factor * change
    reader.data.flush()
    return path
