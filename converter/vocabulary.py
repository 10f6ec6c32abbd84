"""Mends what upstream's converter gets wrong about a vocabulary: SentencePiece unigram models on decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ziggurat.converter.errors import TokenizerError

UNIGRAM, BYTE = 1, 6  # sentencepiece_model.proto: TrainerSpec.ModelType, SentencePiece.Type


def mend_unigram(folder: Path, writer: Any) -> None:
    """Write a unigram vocabulary as llama.cpp's unigram model ("t5"), not as the BPE that upstream takes it for.

    Without this ids are wrong, and llama.cpp ends the process on the first character that no piece has.

    Args:
        folder: the checkpoint.
        writer: upstream's gguf writer, its vocabulary already added.

    Raises:
        TokenizerError: the vocabulary falls back to bytes, which llama.cpp's unigram model cannot.
    """
    kind = writer.kv_data[0].get("tokenizer.ggml.model")
    path = folder / "tokenizer.model"
    if kind is None or kind.value != "llama" or not path.is_file():
        return
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    if model.trainer_spec.model_type != UNIGRAM:
        return
    if any(piece.type == BYTE for piece in model.pieces):
        raise TokenizerError(
            f"{path} is a SentencePiece unigram model that falls back to bytes, which llama.cpp does not have: "
            "use a checkpoint with another tokenizer"
        )
    keys = ("model", "pre", "add_space_prefix", "remove_extra_whitespaces", "precompiled_charsmap")
    for key in keys:
        writer.kv_data[0].pop(f"tokenizer.ggml.{key}", None)
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(model.normalizer_spec.remove_extra_whitespaces)
    if model.normalizer_spec.precompiled_charsmap:
        writer.add_precompiled_charsmap(model.normalizer_spec.precompiled_charsmap)
