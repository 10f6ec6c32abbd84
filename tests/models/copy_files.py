"""Writes an exact-copy model as a Hugging Face folder or straight as GGUF.

Two ways, because they serve two kinds of test: the folder goes through the converter (pruning, scaling, quantizing a
model whose right answers are known); the GGUF needs numpy and gguf only, no torch, and no converter that works.

The vocabulary is SentencePiece-like with one character a word and no merges: <unk>, <s>, </s>, 256 bytes, printable
ASCII (with ▁ for the space), Hangul syllables, CJK ideographs. Any text tokenizes, ids and text map to each other
one to one, and any size up to 75 000 has text; beyond that ids are words of private-use characters.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from models.copy_construction import NORM_EPS, Array, CopyModel, tensors

UNKNOWN, BOS, EOS = 0, 1, 2
FIRST_WORD = 3 + 256
_TYPES = {"unknown": 2, "control": 3, "byte": 6, "normal": 1}


def _characters() -> Iterator[str]:
    yield "▁"
    blocks = [(0x21, 0x7F), (0xAC00, 0xD7A4), (0x4E00, 0xA000), (0x20000, 0x2A6E0), (0xF0000, 0xFFFFE)]
    yield from map(chr, itertools.chain.from_iterable(itertools.starmap(range, blocks)))


def vocabulary(size: int) -> list[tuple[str, int]]:
    """Return the pieces with their SentencePiece types, in the order of their ids."""
    pieces = [("<unk>", _TYPES["unknown"]), ("<s>", _TYPES["control"]), ("</s>", _TYPES["control"])]
    pieces += [(f"<0x{byte:02X}>", _TYPES["byte"]) for byte in range(256)]
    pieces += [(word, _TYPES["normal"]) for word in itertools.islice(_characters(), size - FIRST_WORD)]
    if len(pieces) != size:
        raise ValueError(f"the vocabulary has names for {len(pieces)} tokens, not for {size}")
    return pieces


def write_gguf(model: CopyModel, out: Path, dtype: Literal["f32", "f16"] = "f32") -> None:
    """Write the model as a GGUF file; norms stay F32, as llama.cpp's converter has it."""
    import gguf

    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_name("exact-copy")
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.n_layers)
    writer.add_feed_forward_length(model.ffn_size)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.n_kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_vocab_size(model.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == "f32" else gguf.LlamaFileType.MOSTLY_F16)
    pieces = vocabulary(model.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece for piece, _ in pieces])
    writer.add_token_scores([0.0] * len(pieces))
    writer.add_token_types([kind for _, kind in pieces])
    writer.add_unk_token_id(UNKNOWN)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    for name, weight in tensors(model):
        target = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.n_layers).get_name(name, (".weight",))
        if ".q_proj." in name or ".k_proj." in name:
            weight = _interleave(weight, model.head_dim)
        writer.add_tensor(target, weight.astype(np.float16 if dtype == "f16" and weight.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleave(weight: Array, head_dim: int) -> Array:
    """Move the pairs (i, i + d / 2) of transformers to (2i, 2i + 1), where llama.cpp's Llama has them."""
    rows, columns = weight.shape
    pairs = weight.reshape(rows // head_dim, 2, head_dim // 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def write_folder(model: CopyModel, folder: Path, dtype: Literal["f32", "bf16"] = "bf16") -> None:
    """Write config, one safetensors file and the tokenizer, as a Hugging Face repository has them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "vocab_size": model.vocab_size, "hidden_size": model.hidden_size, "rope_scaling": None,
        "intermediate_size": model.ffn_size, "num_hidden_layers": model.n_layers, "head_dim": model.head_dim,
        "num_attention_heads": model.n_heads, "num_key_value_heads": model.n_kv_heads, "rms_norm_eps": NORM_EPS,
        "max_position_embeddings": model.context, "rope_theta": model.rope_theta, "tie_word_embeddings": False,
        "bos_token_id": BOS, "eos_token_id": EOS, "torch_dtype": {"f32": "float32", "bf16": "bfloat16"}[dtype],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _write_safetensors(folder / "model.safetensors", model, dtype)
    _write_tokenizer(folder, vocabulary(model.vocab_size), model.context)


def _write_safetensors(path: Path, model: CopyModel, dtype: Literal["f32", "bf16"]) -> None:
    # by hand: numpy has no bf16, and the format is a header of offsets before the raw tensors
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, offset = [], 0
    for name, weight in tensors(model):
        stored: npt.NDArray[Any] = weight
        if dtype == "bf16":  # exact: the weights are bf16 values, their lower half is zero
            stored = (weight.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        blobs.append(stored.tobytes())
        span = [offset, offset + len(blobs[-1])]
        header[name] = {"dtype": dtype.upper(), "shape": list(weight.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *blobs]))


def _write_tokenizer(folder: Path, pieces: list[tuple[str, int]], context: int) -> None:
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    proto = sentencepiece_model_pb2.ModelProto()
    for text, kind in pieces:
        piece = proto.pieces.add()
        piece.piece, piece.score, piece.type = text, 0.0, kind
    spec = proto.trainer_spec
    spec.model_type, spec.vocab_size, spec.byte_fallback = spec.BPE, len(pieces), True
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = UNKNOWN, BOS, EOS, -1
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = proto.normalizer_spec.remove_extra_whitespaces = False
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())

    vocab = {text: i for i, (text, _) in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(pieces[i][0], normalized=False, special=True) for i in range(3)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "add_bos_token": True, "add_eos_token": False, "add_prefix_space": False, "legacy": False,
        "clean_up_tokenization_spaces": False, "model_max_length": context,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
