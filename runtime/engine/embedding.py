"""Embeddings: a vector for each text, computed a batch at a time so that generations go on in between.

The vector is what the library's pooling makes of the last hidden states, as the model's file says or as it was asked
for. Where the file says nothing there is no right one: like llama.cpp's server we do not choose then. The tokens of a
text that are pooled have to be computed at once; only where the last token's state is all that counts, and tokens see
only those before them, longer texts are read in parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ziggurat.runtime.bindings import POOLINGS, Context, ContextSettings, Model, embedding
from ziggurat.runtime.engine.protocol import Embeddings
from ziggurat.runtime.errors import InvalidRequestError, PromptTooLongError, UnsupportedError

# texts of one batch at most
_SEQUENCES = 16


def embedding_settings(settings: ContextSettings, pooling: str | None) -> ContextSettings:
    """Return the settings of the context in which an engine with these makes embeddings; ``pooling``: as Embedder's.

    Rows are for one text as long as the context, and shared by several that are shorter. Raises UnsupportedError for
    poolings that make no embeddings and InvalidRequestError for unknown ones.
    """
    _check_pooling(pooling or "model")
    n_ubatch = min(settings.n_ubatch, settings.n_batch)
    return dataclasses.replace(
        settings,
        n_batch=n_ubatch,
        n_ubatch=n_ubatch,
        n_seq_max=min(_SEQUENCES, n_ubatch),
        # a text's rows are needed no longer than its vector
        swa_full=True,
        kv=None,
        pooling=pooling or "model",
    )


class Embedder:
    """Makes the embeddings of texts with a context of its own. For one thread; the model closes what is left.

    ``settings`` are an engine's; ``pooling`` is mean, cls or last, None for what the model's file says. ``size`` is the
    vectors', ``limit`` the most tokens of a text. ``context.abort`` interrupts a step.

    Raises UnsupportedError for models that make no embeddings, and by name for poolings that make none: rank and none.
    """

    def __init__(self, model: Model, settings: ContextSettings, pooling: str | None = None) -> None:
        if model.has_encoder:
            raise UnsupportedError("a model with an encoder like T5's makes no embeddings here")
        self.context = Context(model, embedding_settings(settings, pooling))
        try:
            self.pooling = embedding.pooling(self.context)
            _check_pooling(self.pooling)
        except BaseException:
            self.context.close()
            raise
        self.size = model.n_embd_out
        self.in_parts = self.context.causal and self.pooling == "last"
        self._batch = self.context.new_batch()
        self._trained = model.n_ctx_train
        # positions beyond what it was trained for have no embedding in models that learnt them
        n_ctx = min(settings.n_ctx, self._trained or settings.n_ctx)
        self.limit = n_ctx if self.in_parts else min(n_ctx, self.context.n_ubatch)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, with what the model wants before and after them. From any thread.

        Raises TokenError.
        """
        return self.context.model.vocab.tokenize(text, add_special=True, parse_special=True)

    def check(self, texts: Sequence[Sequence[int]]) -> None:
        """Raise what is wrong with texts: TokenError, PromptTooLongError, InvalidRequestError. From any thread."""
        if not texts:
            raise InvalidRequestError("there are no texts to embed")
        for index, tokens in enumerate(texts):
            if not tokens:
                raise InvalidRequestError(f"text {index} has no tokens, and there is nothing to embed")
            self.context.model.vocab.check(tokens)
            if len(tokens) > self.limit:
                raise self._too_long(len(tokens))

    def _too_long(self, n_tokens: int) -> InvalidRequestError:
        if self.in_parts or self.limit < self.context.n_ubatch:
            return PromptTooLongError(n_tokens, self.limit, self._trained)
        return UnsupportedError(
            f"the text has {n_tokens} tokens and {self.limit} are computed at once, as {self.pooling} pooling needs it:"
            f" raise --ubatch to at least {n_tokens}"
        )

    def start(self, texts: Sequence[Sequence[int]]) -> EmbeddingJob:
        """Make ready to embed texts, given as tokens; nothing is computed yet. Raises what ``check`` raises.

        One job at a time: what another has begun and not finished it begins again.
        """
        self.check(texts)
        return EmbeddingJob(self, texts)

    def compute(self, parts: Sequence[tuple[Sequence[int], int]]) -> list[Any]:
        """Compute sequences at once, each some tokens and the position of their first, and return their vectors.

        The rows are forgotten before, unless it is one sequence that goes on. Raises what ``Context.decode`` raises.
        """
        if self.context.keeps_rows and not (len(parts) == 1 and parts[0][1]):
            self.context.clear()
        self._batch.clear()
        for sequence, (tokens, position) in enumerate(parts):
            self._batch.add(tokens, position, sequence, output_last=False)
        self._batch.want(0, len(self._batch))
        self.context.decode(self._batch)
        return [embedding.vector(self.context, sequence) for sequence in range(len(parts))]

    @property
    def at_once(self) -> tuple[int, int]:
        """Tokens and texts that a batch takes."""
        return min(self.context.n_ubatch, self.context.n_ctx_allocated), self.context.settings.n_seq_max

    def close(self) -> None:
        """Free the context. Idempotent."""
        self.context.close()


class EmbeddingJob:
    """Texts on their way to vectors. ``step`` until it returns True, then ``result``; or let go of it."""

    def __init__(self, embedder: Embedder, texts: Sequence[Sequence[int]]) -> None:
        self._embedder = embedder
        self._texts = texts
        self._vectors: list[Any] = []
        self._n_read = 0  # tokens of a long text that were read in parts
        self.prompt_tokens = sum(map(len, texts))

    def step(self) -> bool:
        """Compute one batch, of no more tokens than are computed at once; True when all texts are done.

        Raises what ``Context.decode`` raises: after DecodeAborted the next step computes the same text again.
        """
        n_tokens, n_texts = self._embedder.at_once
        done = len(self._vectors)
        if done < len(self._texts) and len(self._texts[done]) > n_tokens:
            self._read_part(self._texts[done], n_tokens)
        elif done < len(self._texts):
            parts: list[tuple[Sequence[int], int]] = []
            for tokens in self._texts[done : done + n_texts]:
                n_tokens -= len(tokens)
                if n_tokens < 0:
                    break
                parts.append((tokens, 0))
            self._vectors += self._embedder.compute(parts)
        return len(self._vectors) == len(self._texts)

    def _read_part(self, tokens: Sequence[int], n_tokens: int) -> None:
        start = self._n_read
        self._n_read = 0  # unless this goes well
        (vector,) = self._embedder.compute([(tokens[start : start + n_tokens], start)])
        if start + n_tokens < len(tokens):
            self._n_read = start + n_tokens
        else:
            self._vectors.append(vector)

    def result(self) -> Embeddings:
        """Return the vectors, each of length 1 (or 0, where all its values are 0)."""
        import numpy as np

        vectors = np.stack(self._vectors)
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        return Embeddings((vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32), self.prompt_tokens)


def _check_pooling(pooling: str) -> None:
    choose = f"choose one of {', '.join(name for name in POOLINGS if name != 'model')}"
    if pooling == "none":
        raise UnsupportedError(f"the model's pooling is none, a vector for each token and none for a text: {choose}")
    if pooling == "rank":
        raise UnsupportedError(f"the model's pooling is rank, which scores texts and makes no embeddings: {choose}")
    if pooling not in POOLINGS:
        raise InvalidRequestError(f"pooling {pooling} is unknown: {choose}")
