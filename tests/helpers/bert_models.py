"""A tiny BERT with random weights, as transformers has it and as a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

CLS, SEP = 2, 3
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# words begin with the mark of a space, pieces within a word with nothing
_WORDS = ["▁the", "▁man", "▁hat", "▁and", "▁a", "▁b", "▁c", "s", "t", "e", "▁.", "▁,"]
N_VOCAB, N_CTX = len(_SPECIAL) + len(_WORDS), 48

_NAMES = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}
_BLOCK = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def write_bert(path: Path, pooling: gguf.PoolingType | None, *, n_layer: int = 2) -> Any:
    """Write the file and return the model of transformers that it was made of, in F32, ready to be called."""
    import torch
    import transformers

    config = transformers.BertConfig(
        vocab_size=N_VOCAB,
        hidden_size=64,
        num_hidden_layers=n_layer,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=N_CTX,
        hidden_act="gelu_new",  # the form that the library computes
    )
    torch.manual_seed(3)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            offset = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            weight.copy_(offset + torch.randn(weight.shape) * (0.2 if weight.dim() == 1 else weight.shape[-1] ** -0.5))
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(64)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_token_type_count(2)
    if pooling is not None:
        writer.add_pooling_type(pooling)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(_SPECIAL + _WORDS)
    writer.add_token_types([3] * len(_SPECIAL) + [1] * len(_WORDS))
    for kind, token in (("pad", 0), ("unk", 1), ("bos", CLS), ("sep", SEP), ("mask", 4)):
        getattr(writer, f"add_{kind}_token_id")(token)
    for name, weight in model.state_dict().items():
        writer.add_tensor(_name(name), weight.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in _NAMES:
        return f"{_NAMES[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{_BLOCK[part]}.{kind}"


def states(model: Any, tokens: list[int]) -> Any:
    """The last hidden states, float32 (tokens, 64)."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens])).last_hidden_state[0].numpy()
