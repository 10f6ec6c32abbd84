"""Small tokenizers, trained on the spot, whose files look like those of the real families.

`write_tokenizer(kind, folder)` leaves in the folder what a Hugging Face repository of that family has. A kind differs
from its original in the vocabulary only: normalizer, split, special tokens, post-processor and flags are the family's.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from helpers import templates
from helpers.corpus import TRAINING

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{TAIL}"
QWEN2_SPLIT = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{TAIL}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)

Files = dict[str, bytes]


@dataclass(frozen=True)
class Kind:
    """One family of tokenizers: how to make its files, and what a test has to know about it."""

    make: Callable[[], Files]
    pre: str | None = None  # tokenizer.ggml.pre, where the vocabulary is a byte-level one
    model: str = "gpt2"  # tokenizer.ggml.model
    template: str | None = None
    cuts_marks: bool = False  # llama.cpp's pattern cuts before combining marks, the original does not
    # hard texts that the tokenizers library splits otherwise than SentencePiece, the original, and llama.cpp do
    as_sentencepiece: frozenset[str] = field(default_factory=frozenset)
    beyond_llama_cpp: frozenset[str] = field(default_factory=frozenset)  # hard texts that llama.cpp splits otherwise


@functools.cache
def _files(name: str) -> Files:
    return KINDS[name].make()


def write_tokenizer(name: str, folder: Path) -> None:
    """Write the files of tokenizer kind `name` into `folder`."""
    for file, content in _files(name).items():
        (folder / file).write_bytes(content)


def tokenizer_size(name: str) -> int:
    """Number of ids the tokenizer can give: vocabulary and added tokens."""
    return Tokenizer.from_buffer(_files(name)["tokenizer.json"]).get_vocab_size(with_added_tokens=True)


def special_ids(name: str) -> dict[str, int | None]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id` for the model's config."""
    tokenizer = Tokenizer.from_buffer(_files(name)["tokenizer.json"])
    config = json.loads(_files(name)["tokenizer_config.json"])
    ids = {}
    for key in ("bos", "eos", "pad"):
        token = config.get(f"{key}_token")
        ids[f"{key}_token_id"] = None if token is None else tokenizer.token_to_id(token)
    return ids


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode()


def _added_tokens_decoder(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        str(i): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for i, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }


def _special(*tokens: str) -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False) for token in tokens]


def _plain(*tokens: str) -> list[AddedToken]:
    return [AddedToken(token, special=False, normalized=False) for token in tokens]


def _bos_first(tokenizer: Tokenizer, bos: str) -> processors.PostProcessor:
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


# Byte-level BPE


def _byte_level(
    splits: list[pre_tokenizers.PreTokenizer],
    added: list[AddedToken],
    config: dict[str, Any],
    *,
    normalizer: normalizers.Normalizer | None = None,
    use_regex: bool = False,
    ignore_merges: bool = False,
    bos: str | None = None,
    specials_first: bool = False,
    separate_files: bool = False,
) -> Files:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, last]) if splits else last
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=760,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[token.content for token in added if token.special] if specials_first else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    if ignore_merges:
        # A token no merge leads to, found only because merges are ignored for whole words: " Ziggurat" has one such.
        vocab["ĠZiggurat"] = len(vocab)
    tokenizer.model = models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([token for token in added if not token.special])
    tokenizer.add_special_tokens([token for token in added if token.special])
    byte_level = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = processors.Sequence([byte_level, _bos_first(tokenizer, bos)]) if bos else byte_level
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json({**config, "added_tokens_decoder": _added_tokens_decoder(tokenizer)}),
    }
    if separate_files:
        files["vocab.json"] = _json(vocab)
        files["merges.txt"] = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]).encode() + b"\n"
    return files


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _llama3() -> Files:
    return _byte_level(
        [_split(LLAMA3_SPLIT)],
        _special(
            "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
            "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>",
        ),
        {
            "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>",
            "clean_up_tokenization_spaces": True, "model_max_length": 131072,
            "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": templates.LLAMA3,
        },
        ignore_merges=True,
        bos="<|begin_of_text|>",
    )  # fmt: skip


def _qwen(*plain: str) -> Files:
    return _byte_level(
        [_split(QWEN2_SPLIT)],
        [*_special("<|endoftext|>", "<|im_start|>", "<|im_end|>"), *_plain(*plain)],
        {
            "add_prefix_space": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False, "errors": "replace", "model_max_length": 131072,
            "tokenizer_class": "Qwen2Tokenizer", "unk_token": None, "chat_template": templates.CHATML,
        },
        normalizer=normalizers.NFC(),
        separate_files=True,
    )  # fmt: skip


def _gpt2() -> Files:
    return _byte_level(
        [],
        _special("<|endoftext|>"),
        {
            "add_prefix_space": False, "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>", "model_max_length": 1024, "tokenizer_class": "GPT2Tokenizer",
        },
        use_regex=True,
        separate_files=True,
    )  # fmt: skip


def _tekken() -> Files:
    return _byte_level(
        [_split(TEKKEN_SPLIT)],
        _special("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
        {
            "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True,
            "add_eos_token": False, "add_prefix_space": False, "clean_up_tokenization_spaces": False,
            "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": templates.MISTRAL,
        },
        ignore_merges=True,
        bos="<s>",
        specials_first=True,
    )  # fmt: skip


def _smollm() -> Files:
    return _byte_level(
        [pre_tokenizers.Digits(individual_digits=True)],
        _special("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        {
            "add_prefix_space": False, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>", "clean_up_tokenization_spaces": False,
            "tokenizer_class": "GPT2Tokenizer", "chat_template": templates.CHATML,
        },
        use_regex=True,
        specials_first=True,
    )  # fmt: skip


def _deepseek_v3() -> Files:
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    return _byte_level(
        [_split(pattern) for pattern in DEEPSEEK_V3_SPLITS],
        _special(bos, eos, "<｜▁pad▁｜>"),
        {
            "bos_token": bos, "eos_token": eos, "pad_token": eos, "unk_token": None, "add_bos_token": True,
            "add_eos_token": False, "clean_up_tokenization_spaces": False, "tokenizer_class": "LlamaTokenizerFast",
        },
        bos=bos,
        specials_first=True,
    )  # fmt: skip


# SentencePiece


def _train_sentencepiece(**options: Any) -> sentencepiece_model_pb2.ModelProto:
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TRAINING for line in text.split("\n") if line]),
        model_writer=buffer,
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
        character_coverage=0.995,
        **options,
    )
    return sentencepiece_model_pb2.ModelProto.FromString(buffer.getvalue())


def _bpe_of(proto: sentencepiece_model_pb2.ModelProto) -> models.BPE:
    """The same vocabulary for the tokenizers library: merges follow from the pieces, best score first."""
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    merges = []
    for text, score in normal.items():
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        merges += [(-score, pair) for pair in pairs if pair[0] in normal and pair[1] in normal]
    merges.sort(key=lambda item: (item[0], vocab[item[1][0]], vocab[item[1][1]]))
    # Runs of spaces that SentencePiece matches whole (Gemma): doublings first, so that the longest run comes out first.
    runs = [p.piece for p in proto.pieces if p.type == p.USER_DEFINED and set(p.piece) == {"▁"}]
    pairs = [("▁" * left, "▁" * (len(run) - left)) for run in runs for left in range(len(run) - 1, 0, -1)]
    pairs.sort(key=lambda pair: (len(pair[0]) != len(pair[1]), len(pair[0]) + len(pair[1])))
    return models.BPE(
        vocab=vocab,
        merges=pairs + [pair for _, pair in merges if set(pair[0] + pair[1]) != {"▁"} or not runs],
        unk_token=next(p.piece for p in proto.pieces if p.type == p.UNKNOWN),
        fuse_unk=True,
        byte_fallback=True,
    )


def _sentencepiece_files(
    proto: sentencepiece_model_pb2.ModelProto,
    *,
    config: dict[str, Any],
    added: list[AddedToken],
    normalizer: normalizers.Normalizer | None,
    pre_tokenizer: pre_tokenizers.PreTokenizer | None,
    strip_first: bool,
    bos: str,
) -> Files:
    tokenizer = Tokenizer(_bpe_of(proto))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip_first else steps)
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    tokenizer.post_processor = _bos_first(tokenizer, bos)
    return {
        "tokenizer.model": proto.SerializeToString(),
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json({**config, "added_tokens_decoder": _added_tokens_decoder(tokenizer)}),
    }


_LLAMA2_TRAINING: dict[str, Any] = {
    "model_type": "bpe",
    "vocab_size": 900,
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "add_dummy_prefix": True,
}


def _spaces_to_blocks(*, prepend: bool) -> normalizers.Normalizer:
    replace = normalizers.Replace(" ", "▁")
    return normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace


def _llama2() -> Files:
    return _sentencepiece_files(
        _train_sentencepiece(**_LLAMA2_TRAINING),
        config={
            "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "pad_token": None,
            "unk_token": "<unk>", "clean_up_tokenization_spaces": False, "legacy": False,
            "tokenizer_class": "LlamaTokenizer", "chat_template": templates.MISTRAL,
        },
        added=_special("<unk>", "<s>", "</s>"),
        normalizer=_spaces_to_blocks(prepend=True),
        pre_tokenizer=None,
        strip_first=True,
        bos="<s>",
    )  # fmt: skip


def _mistral() -> Files:
    control = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"]
    return _sentencepiece_files(
        _train_sentencepiece(**_LLAMA2_TRAINING, control_symbols=control),
        config={
            "add_bos_token": True, "add_eos_token": False, "add_prefix_space": True, "bos_token": "<s>",
            "eos_token": "</s>", "pad_token": None, "unk_token": "<unk>", "clean_up_tokenization_spaces": False,
            "legacy": False, "tokenizer_class": "LlamaTokenizer", "chat_template": templates.MISTRAL,
        },
        added=_special("<unk>", "<s>", "</s>", *control),
        normalizer=None,
        pre_tokenizer=pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False),
        strip_first=True,
        bos="<s>",
    )  # fmt: skip


def _phi3() -> Files:
    # Phi-3 is Llama 2's vocabulary with tokens added behind it; some of them eat the white space to their right.
    tail = ["<|system|>", "<|user|>", "<|end|>"]
    added = _special("<|endoftext|>", "<|assistant|>", "<|placeholder1|>")
    added += [AddedToken(token, special=True, normalized=False, rstrip=True) for token in tail]
    files = _sentencepiece_files(
        _train_sentencepiece(**_LLAMA2_TRAINING),
        config={
            "add_bos_token": False, "add_eos_token": False, "bos_token": "<s>", "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False,
            "legacy": False, "tokenizer_class": "LlamaTokenizer", "chat_template": templates.PHI3,
        },
        added=[*_special("<unk>", "<s>", "</s>"), *added],
        normalizer=_spaces_to_blocks(prepend=True),
        pre_tokenizer=None,
        strip_first=True,
        bos="<s>",
    )  # fmt: skip
    tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    files["tokenizer.json"] = tokenizer.to_str(pretty=True).encode()
    files["added_tokens.json"] = _json({token.content: tokenizer.token_to_id(token.content) for token in added})
    return files


def _gemma(*, separate_template: bool) -> Files:
    turns = ["<start_of_turn>", "<end_of_turn>"]
    runs = ["\n" * n for n in range(1, 5)] + ["▁" * n for n in range(2, 9)] + ["<table>", "</table>"]
    proto = _train_sentencepiece(
        **{**_LLAMA2_TRAINING, "add_dummy_prefix": False},
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        user_defined_symbols=[*turns, *runs],
    )  # fmt: skip
    files = _sentencepiece_files(
        proto,
        config={
            "add_bos_token": True, "add_eos_token": False, "bos_token": "<bos>", "eos_token": "<eos>",
            "pad_token": "<pad>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False,
            "spaces_between_special_tokens": False, "tokenizer_class": "GemmaTokenizer",
            **({} if separate_template else {"chat_template": templates.GEMMA}),
        },
        added=[*_special("<pad>", "<eos>", "<bos>", "<unk>", *turns), *_plain(*runs)],
        normalizer=_spaces_to_blocks(prepend=False),
        pre_tokenizer=pre_tokenizers.Split(" ", behavior="merged_with_previous"),
        strip_first=False,
        bos="<bos>",
    )  # fmt: skip
    if separate_template:
        files["chat_template.jinja"] = templates.GEMMA.encode()
    return files


def _t5() -> Files:
    proto = _train_sentencepiece(
        model_type="unigram",
        vocab_size=700,
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.add_special_tokens(_special("<pad>", "</s>", "<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    config = {
        "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 0,
        "clean_up_tokenization_spaces": False, "tokenizer_class": "T5Tokenizer",
    }  # fmt: skip
    return {
        "spiece.model": proto.SerializeToString(),
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json({**config, "added_tokens_decoder": _added_tokens_decoder(tokenizer)}),
    }


def _unigram(*, byte_fallback: bool) -> Files:
    """A decoder's SentencePiece unigram vocabulary, as some Japanese Llamas have."""
    options = {**_LLAMA2_TRAINING, "model_type": "unigram", "byte_fallback": byte_fallback}
    proto = _train_sentencepiece(**options)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    tokenizer.normalizer = _spaces_to_blocks(prepend=True)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(_special("<unk>", "<s>", "</s>"))
    tokenizer.post_processor = _bos_first(tokenizer, "<s>")
    config = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "pad_token": None,
        "unk_token": "<unk>", "clean_up_tokenization_spaces": False, "legacy": False,
        "tokenizer_class": "LlamaTokenizer",
    }  # fmt: skip
    return {
        "tokenizer.model": proto.SerializeToString(),
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json({**config, "added_tokens_decoder": _added_tokens_decoder(tokenizer)}),
    }


KINDS: dict[str, Kind] = {
    "llama3": Kind(_llama3, pre="llama-bpe", template=templates.LLAMA3),
    "qwen2": Kind(_qwen, pre="qwen2", template=templates.CHATML),
    "qwen3": Kind(
        lambda: _qwen("<think>", "</think>", "<tool_call>", "</tool_call>"), pre="qwen2", template=templates.CHATML
    ),
    "gpt2": Kind(_gpt2, pre="gpt-2"),
    "tekken": Kind(_tekken, pre="tekken", template=templates.MISTRAL, cuts_marks=True),
    "smollm": Kind(_smollm, pre="smollm", template=templates.CHATML),
    "deepseek_v3": Kind(_deepseek_v3, pre="deepseek-v3"),
    "llama2": Kind(_llama2, model="llama", template=templates.MISTRAL),
    "mistral": Kind(
        _mistral,
        model="llama",
        template=templates.MISTRAL,
        # Metaspace prepends its block only where there is none yet
        as_sentencepiece=frozenset({"leading_space", "leading_spaces", "only_spaces", "space"}),
    ),
    "phi3": Kind(_phi3, model="llama", template=templates.PHI3),
    "gemma": Kind(lambda: _gemma(separate_template=False), model="llama", template=templates.GEMMA),
    "gemma3": Kind(lambda: _gemma(separate_template=True), model="llama", template=templates.GEMMA),
    "t5": Kind(_t5, model="t5"),
    "unigram": Kind(
        lambda: _unigram(byte_fallback=False), model="t5", beyond_llama_cpp=frozenset({"space", "only_spaces"})
    ),
    # llama.cpp's unigram has no byte fallback and its SentencePiece BPE is no unigram: nothing in a GGUF says this
    "unigram_bytes": Kind(lambda: _unigram(byte_fallback=True), model="none"),
}
