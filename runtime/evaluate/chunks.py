"""Cuts a text into the chunks that llama.cpp's perplexity tool scores.

The rule (``tools/perplexity/perplexity.cpp``): the whole text is tokenized once, special tokens in it read as letters,
BOS in front if the model wants it; consecutive chunks of n_ctx tokens, the rest dropped; the first token of every
chunk is replaced by BOS if the model wants it; scored are the tokens n_ctx/2 + 1 to n_ctx - 1 of each chunk, so that
every one has at least half a chunk before it. One deviation: upstream refuses texts of fewer than two chunks, here
one is enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ziggurat.runtime.bindings import Vocab
from ziggurat.runtime.errors import InvalidRequestError


def read_text(path: Path) -> str:
    """Return a UTF-8 text file's content without its last line break, as llama.cpp reads it.

    Raises InvalidRequestError when the file cannot be read, is empty, or is not UTF-8. Characters of value 0 count as
    not UTF-8: English in UTF-16 without a mark is made of them, and would be measured as something else.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{path}: is not UTF-8 text (byte {data[error.start]:#04x} at {error.start}); convert it to UTF-8"
        ) from None
    if "\0" in text:
        where = len(text[: text.index("\0")].encode())
        raise InvalidRequestError(f"{path}: is not UTF-8 text (byte 0x00 at {where}); convert it to UTF-8")
    if not text.strip():
        raise InvalidRequestError(f"{path}: is empty: there is nothing to evaluate")
    return text[:-1] if text.endswith("\n") else text


@dataclass(frozen=True)
class Chunks:
    """A text's chunks: ``tokens`` of shape (chunks, n_ctx), int32, as in the text; ``bos`` replaces each first one."""

    tokens: NDArray[np.int32]
    bos: int | None
    text_tokens: int

    @property
    def n_chunks(self) -> int:
        """Number of chunks."""
        return int(self.tokens.shape[0])

    @property
    def n_ctx(self) -> int:
        """Tokens per chunk."""
        return int(self.tokens.shape[1])

    @property
    def first(self) -> int:
        """The first position of a chunk whose prediction is scored."""
        return self.n_ctx // 2

    @property
    def rows_per_chunk(self) -> int:
        """Scored predictions per chunk."""
        return self.n_ctx - 1 - self.first

    @property
    def n_scored(self) -> int:
        """Scored predictions in all."""
        return self.n_chunks * self.rows_per_chunk

    def inputs(self, chunk: int, start: int, end: int) -> list[int]:
        """Return what the model reads at positions [start, end) of a chunk."""
        tokens: list[int] = self.tokens[chunk, start:end].tolist()
        if start == 0 and self.bos is not None:
            tokens[0] = self.bos
        return tokens

    def targets(self, step: Step) -> NDArray[np.int32]:
        """Return the tokens that a step's logits predict, in the order of its rows."""
        start, end = self.scored(step)
        return self.tokens[step.chunk_start : step.chunk_end, start + 1 : end + 1].reshape(-1)

    def scored(self, step: Step) -> tuple[int, int]:
        """Return the positions [start, end) of a step whose logits are scored, possibly none."""
        start = max(step.start, self.first)
        return start, max(start, min(step.end, self.n_ctx - 1))

    def steps(self, n_batch: int) -> Iterator[Step]:
        """Yield what is decoded at once: several whole chunks, or a part of one that exceeds ``n_batch`` tokens."""
        at_once = max(1, n_batch // self.n_ctx)
        for chunk in range(0, self.n_chunks, at_once):
            last = min(chunk + at_once, self.n_chunks)
            for start in range(0, self.n_ctx, n_batch):
                yield Step(chunk, last, start, min(start + n_batch, self.n_ctx))


@dataclass(frozen=True)
class Step:
    """One decode call: positions [start, end) of each of the chunks [chunk_start, chunk_end)."""

    chunk_start: int
    chunk_end: int
    start: int
    end: int


def cut(vocab: Vocab, text: str, n_ctx: int, limit: int | None = None, *, source: str = "the text") -> Chunks:
    """Tokenize a text and cut it into chunks of ``n_ctx`` tokens, at most ``limit`` of them.

    Raises InvalidRequestError when it has fewer tokens than one chunk takes, TokenError when it cannot be tokenized.
    """
    if n_ctx < 4:
        raise InvalidRequestError(f"chunks of {n_ctx} tokens score nothing; take at least 4")
    tokens = vocab.tokenize(text, add_special=True, parse_special=False)
    count = len(tokens) // n_ctx
    if count == 0:
        raise InvalidRequestError(
            f"{source}: has {len(tokens)} tokens and one chunk takes {n_ctx}: give a longer text"
            + (f", or a --ctx of at most {len(tokens)}" if len(tokens) >= 4 else "")
        )
    count = min(count, limit or count)
    array = np.array(tokens[: count * n_ctx], np.int32).reshape(count, n_ctx)
    return Chunks(array, vocab.bos if vocab.adds_bos else None, len(tokens))
