"""Builds GGUF models of a few hundred kilobytes, with random weights and real tokenizers, in a second.

The weights are seeded. Rows of control tokens in the output are zero, so that a generation never ends by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The shape of a tiny model; ``n_head`` and ``n_head_kv`` may have one entry per layer.

    Architectures: llama, qwen2, qwen3, phi3, granite, gemma2, gemma3, olmo2, gpt2; with experts (two used) llama,
    qwen3moe, gpt-oss.
    ``slides`` says which layers have the sliding window, where it is not the architecture's own pattern; ``softcap``
    bounds gemma2's attention scores.
    """

    arch: str = "llama"
    n_layer: int = 2
    n_embd: int = 64
    n_head: int | tuple[int, ...] = 4
    n_head_kv: int | tuple[int, ...] = 2
    head_dim: int = 16
    n_ff: int = 96
    n_ctx: int = 1024
    sliding_window: int | None = None
    slides: tuple[bool, ...] | None = None
    softcap: float | None = None
    n_expert: int = 0

    def heads(self, layer: int) -> tuple[int, int]:
        def pick(value: int | tuple[int, ...]) -> int:
            return value if isinstance(value, int) else value[layer]

        return pick(self.n_head), pick(self.n_head_kv)


@dataclass(frozen=True)
class Tokens:
    """A vocabulary: texts, scores and types by id."""

    kind: str
    texts: list[str]
    scores: list[float]
    types: list[int]
    bos: int | None
    eos: int
    merges: list[str] | None = None


def spm_tokens() -> Tokens:
    """A SentencePiece-style vocabulary with byte fallback: anything but ASCII letters is spelled in bytes."""
    texts = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256
    pieces = [
        "▁",
        *"abcdefghijklmnopqrstuvwxyz.,!?'",
        "th",
        "he",
        "an",
        "in",
        "▁t",
        "▁a",
        "▁th",
        "▁the",
        "▁an",
        "and",
        "▁and",
    ]
    scores = [0.0] * len(texts) + [-float(len(pieces) - rank) for rank in range(len(pieces))]
    return Tokens("llama", texts + pieces, scores, types + [NORMAL] * len(pieces), bos=1, eos=2)


def bpe_tokens(special: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")) -> Tokens:
    """A byte-level BPE vocabulary (GPT-2's alphabet) with a few merges and special tokens."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    merges = ["t h", "th e", "Ġ th", "Ġ a", "i n", "Ġ the"]
    texts = [alphabet[byte] for byte in range(256)] + [merge.replace(" ", "") for merge in merges]
    types = [NORMAL] * len(texts) + [CONTROL] * len(special)
    texts = texts + list(special)
    eos = texts.index("<|im_end|>") if "<|im_end|>" in special else len(texts) - 1
    return Tokens("gpt2", texts, [0.0] * len(texts), types, bos=None, eos=eos, merges=merges)


def write_model(
    path: Path,
    shape: Shape = Shape(),
    tokens: Tokens | None = None,
    *,
    chat_template: str | None = None,
    seed: int = 0,
) -> Path:
    """Write a model that llama.cpp loads, and return its path."""
    tokens = tokens or spm_tokens()
    writer = gguf.GGUFWriter(path, shape.arch)
    _write_metadata(writer, shape)
    write_tokens(writer, tokens)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for name, array in _tensors(shape, tokens, np.random.default_rng(seed)):
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    def listed(value: int | tuple[int, ...]) -> int | list[int]:
        return value if isinstance(value, int) else list(value)

    writer.add_name("tiny")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(listed(shape.n_head))
    writer.add_head_count_kv(listed(shape.n_head_kv))
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    if shape.arch == "gpt2":
        writer.add_layer_norm_eps(1e-5)
    if shape.sliding_window is not None:
        writer.add_sliding_window(shape.sliding_window)
    if shape.slides is not None:
        writer.add_sliding_window_pattern(list(shape.slides))
    if shape.softcap is not None:
        writer.add_attn_logit_softcapping(shape.softcap)
    if shape.arch == "gemma3":
        writer.add_rope_freq_base(1e6)  # of the layers that see everything
    if shape.n_expert:
        writer.add_expert_count(shape.n_expert)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(shape.n_ff)
    if shape.arch == "granite":
        writer.add_logit_scale(1.0)
        writer.add_attention_scale(0.2)  # another one than the root of the head's dimension gives


def write_tokens(writer: gguf.GGUFWriter, tokens: Tokens) -> None:
    writer.add_tokenizer_model(tokens.kind)
    writer.add_tokenizer_pre("gpt-2" if tokens.kind == "gpt2" else "default")
    writer.add_token_list(tokens.texts)
    writer.add_token_scores(tokens.scores)
    writer.add_token_types(tokens.types)
    if tokens.merges is not None:
        writer.add_token_merges(tokens.merges)
    if tokens.bos is not None:
        writer.add_bos_token_id(tokens.bos)
    writer.add_eos_token_id(tokens.eos)
    writer.add_add_bos_token(tokens.bos is not None)


def _tensors(shape: Shape, tokens: Tokens, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    def normal(*extents: int) -> np.ndarray:
        return rng.normal(0, extents[-1] ** -0.5, extents).astype(np.float32)

    def ones(extent: int) -> np.ndarray:
        return np.ones(extent, np.float32)

    output = rng.normal(0, 0.5, (len(tokens.texts), shape.n_embd)).astype(np.float32)
    output[[index for index, kind in enumerate(tokens.types) if kind in (CONTROL, UNKNOWN)]] = 0
    yield "token_embd.weight", rng.normal(0, 1, output.shape).astype(np.float32)
    yield "output_norm.weight", ones(shape.n_embd)
    if shape.arch == "gpt2":
        yield "output_norm.bias", normal(shape.n_embd)
        yield "position_embd.weight", normal(shape.n_ctx, shape.n_embd)
    if shape.arch != "gemma2":  # always tied
        yield "output.weight", output
    for layer in range(shape.n_layer):
        n_head, n_head_kv = shape.heads(layer)
        block = f"blk.{layer}."
        if shape.arch != "olmo2":
            yield block + "attn_norm.weight", ones(shape.n_embd)
        heads = {"q": n_head * shape.head_dim, "k": n_head_kv * shape.head_dim, "v": n_head_kv * shape.head_dim}
        if shape.arch in ("phi3", "gpt2"):
            yield block + "attn_qkv.weight", normal(sum(heads.values()), shape.n_embd)
        else:
            for part, extent in heads.items():
                yield f"{block}attn_{part}.weight", normal(extent, shape.n_embd)
                if shape.arch in ("qwen2", "gpt-oss"):
                    yield f"{block}attn_{part}.bias", rng.normal(0, 0.5, extent).astype(np.float32)
        yield block + "attn_output.weight", normal(shape.n_embd, n_head * shape.head_dim)
        if shape.arch in ("qwen3", "qwen3moe", "gemma3"):
            yield block + "attn_q_norm.weight", ones(shape.head_dim)
            yield block + "attn_k_norm.weight", ones(shape.head_dim)
        if shape.arch == "olmo2":  # over all heads
            yield block + "attn_q_norm.weight", ones(heads["q"])
            yield block + "attn_k_norm.weight", ones(heads["k"])
        if shape.arch == "gpt2":
            widths = {"attn_norm": shape.n_embd, "attn_qkv": sum(heads.values()), "ffn_up": shape.n_ff}
            for name, width in widths.items():
                yield f"{block}{name}.bias", normal(width)
            for name in ("attn_output", "ffn_norm", "ffn_down"):
                yield f"{block}{name}.bias", normal(shape.n_embd)
        if shape.arch in ("gemma2", "gemma3", "gpt-oss", "olmo2"):
            yield block + "post_attention_norm.weight", ones(shape.n_embd)
        if shape.arch in ("gemma2", "gemma3", "olmo2"):
            yield block + "post_ffw_norm.weight", ones(shape.n_embd)
        if shape.arch == "gpt-oss":
            # some of them weigh more than hundreds of rows together
            yield block + "attn_sinks.weight", np.where(np.arange(n_head) % 2, 8, 0).astype(np.float32)
            yield block + "attn_output.bias", normal(shape.n_embd)
        elif shape.arch != "olmo2":
            yield block + "ffn_norm.weight", ones(shape.n_embd)
        yield from _ffn(shape, block, normal)


def _ffn(shape: Shape, block: str, normal: Callable[..., np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    experts = (shape.n_expert,) if shape.n_expert else ()
    suffix = "_exps.weight" if experts else ".weight"
    if experts:
        yield block + "ffn_gate_inp.weight", 4 * normal(shape.n_expert, shape.n_embd)  # far from ties in the routing
    if shape.arch == "phi3":
        yield block + "ffn_up.weight", normal(2 * shape.n_ff, shape.n_embd)
    elif shape.arch == "gpt2":
        yield block + "ffn_up.weight", normal(shape.n_ff, shape.n_embd)
    else:
        yield block + "ffn_gate" + suffix, normal(*experts, shape.n_ff, shape.n_embd)
        yield block + "ffn_up" + suffix, normal(*experts, shape.n_ff, shape.n_embd)
    yield block + "ffn_down" + suffix, normal(*experts, shape.n_embd, shape.n_ff)
    if shape.arch == "gpt-oss":
        yield block + "ffn_gate_inp.bias", normal(shape.n_expert)
        for part, width in (("gate", shape.n_ff), ("up", shape.n_ff), ("down", shape.n_embd)):
            yield f"{block}ffn_{part}_exps.bias", normal(shape.n_expert, width)


def write_split_model(folder: Path) -> list[Path]:
    """Two parts of one model, with a tensor each: "t1" and "t2", float32 of shape [2, 32]."""
    paths = [folder / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for number, path in enumerate(paths, 1):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.count", 2)
        writer.add_tensor(f"t{number}", np.zeros((2, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths
