"""What the planner knows of a model: its dimensions and where its bytes lie. Read from metadata, never from weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ziggurat.runtime.errors import UnsupportedError
from ziggurat.runtime.gguf_file import GGUFFile
from ziggurat.runtime.plan.kv import KVShape, kv_shape

_BLOCK = re.compile(r"^blk\.(\d+)\.")
_DENSE = re.compile(r"^blk\.\d+\.ffn_(up|down)\.weight$")


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's tensors, by where llama.cpp puts them.

    ``input`` is read from the host's memory whatever is offloaded. ``tied`` says that ``input`` is the output matrix as
    well: a GPU that computes the output then holds a copy of ``embedding`` bytes. ``exact`` is False for estimates.
    """

    input: int
    layers: tuple[int, ...]
    output: int
    embedding: int
    tied: bool
    exact: bool = True

    @property
    def total(self) -> int:
        """Bytes of all tensors, each counted once."""
        return self.input + sum(self.layers) + self.output


@dataclass(frozen=True)
class Outline:
    """A model as the planner sees it.

    ``n_ff`` is the width of the feed-forward part that one token passes: with experts, those used together. ``kv`` is
    None for models without attention. ``n_ctx_train`` is 0 where it is not known. ``adapters`` are the bytes of LoRA
    adapters that are loaded with the model.
    """

    path: Path
    architecture: str
    n_embd: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    kv: KVShape | None
    weights: Weights
    adapters: int = 0


def outline(model: GGUFFile) -> Outline:
    """Read the outline of a GGUF file.

    Raises ModelFileError for files that are no language model.
    """
    arch = model.architecture
    try:
        kv = kv_shape(model)
    except UnsupportedError:
        kv = None
    weights = _weights(model, model.integer(f"{arch}.block_count") or 0)
    return Outline(
        path=model.path,
        architecture=arch,
        n_embd=model.integer(f"{arch}.embedding_length") or 0,
        n_ff=_feed_forward(model, arch),
        n_vocab=_n_vocab(model, arch),
        n_ctx_train=model.integer(f"{arch}.context_length") or 0,
        kv=kv,
        weights=weights,
    )


def _weights(model: GGUFFile, n_blocks: int) -> Weights:
    layers = [0] * n_blocks
    first = output = embedding = 0
    tied = True
    for tensor in model.tensors:
        block = _BLOCK.match(tensor.name)
        if block is not None and int(block[1]) < n_blocks:
            layers[int(block[1])] += tensor.n_bytes
        elif tensor.name.startswith("output"):
            output += tensor.n_bytes
            tied = tied and tensor.name != "output.weight"
        else:
            first += tensor.n_bytes
            if tensor.name == "token_embd.weight":
                embedding = tensor.n_bytes
    return Weights(first, tuple(layers), output, embedding, tied)


def _feed_forward(model: GGUFFile, arch: str) -> int:
    widths = model.array(f"{arch}.feed_forward_length") or [model.integer(f"{arch}.feed_forward_length") or 0]
    dense = max((int(width) for width in widths), default=0)
    used = model.integer(f"{arch}.expert_used_count") or 0
    experts = used * (model.integer(f"{arch}.expert_feed_forward_length") or dense)
    if used and not any(_DENSE.match(tensor.name) for tensor in model.tensors):
        return experts
    return max(dense, experts)


def _n_vocab(model: GGUFFile, arch: str) -> int:
    tokens = model.fields.get("tokenizer.ggml.tokens")
    length: int = getattr(tokens, "length", 0)
    return length or model.integer(f"{arch}.vocab_size") or 0
