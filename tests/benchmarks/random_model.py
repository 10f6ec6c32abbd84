"""Writes a random Llama checkpoint of any size without holding it in memory: for speed and memory, not for meaning.

usage: python tests/benchmarks/random_model.py FOLDER [--shape 1b] [--layers 16]
"""

from __future__ import annotations

import argparse
import io
import json
import struct
from pathlib import Path

import numpy as np

SHAPES = {
    # hidden, feed-forward, heads, KV heads, vocabulary, layers: those of Llama-3.2-1B and of a 0.3B Llama
    "1b": (2048, 8192, 32, 8, 128256, 16),
    "0.3b": (1024, 4096, 16, 4, 32000, 24),
}


def write_model(folder: Path, shape: str = "1b", layers: int | None = None, seed: int = 0) -> None:
    """Write config, SentencePiece tokenizer and one bf16 safetensors file of Gaussian weights."""
    hidden, ffn, heads, kv_heads, vocab, default_layers = SHAPES[shape]
    layers = layers or default_layers
    head = hidden // heads
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        p = f"model.layers.{i}."
        tensors |= {
            p + "input_layernorm.weight": (hidden,),
            p + "post_attention_layernorm.weight": (hidden,),
            p + "self_attn.q_proj.weight": (heads * head, hidden),
            p + "self_attn.k_proj.weight": (kv_heads * head, hidden),
            p + "self_attn.v_proj.weight": (kv_heads * head, hidden),
            p + "self_attn.o_proj.weight": (hidden, heads * head),
            p + "mlp.gate_proj.weight": (ffn, hidden),
            p + "mlp.up_proj.weight": (ffn, hidden),
            p + "mlp.down_proj.weight": (hidden, ffn),
        }
    _write_safetensors(folder / "model.safetensors", tensors, seed)
    _write_tokenizer(folder)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head,
        "vocab_size": vocab, "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _write_safetensors(path: Path, tensors: dict[str, tuple[int, ...]], seed: int) -> None:
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for shape in tensors.values():
            left = int(np.prod(shape))
            while left:
                n = min(left, 1 << 24)
                values = rng.standard_normal(n, np.float32) * np.float32(0.02)
                f.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                left -= n


def _write_tokenizer(folder: Path) -> None:
    """SentencePiece, since upstream's converter knows byte-level tokenizers only by the hash of their vocabulary."""
    import sentencepiece

    text = ["the quick brown fox jumps over the lazy dog", "a model of random weights says nothing at all"] * 50
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=320, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int)
    options = parser.parse_args()
    write_model(options.folder, options.shape, options.layers)
