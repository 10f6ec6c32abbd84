"""Computes the logits of a text's chunks, several chunks as parallel sequences of one batch.

With a KV budget the logits are those of a text that goes on after an evicted prompt: a prompt's own logits, read
exactly, do not change by what is evicted at its end. So the first half of a chunk, of which nothing is scored, is read
as one prompt, and the other half token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from ziggurat.runtime.bindings import Context, ContextSettings, Model, kv
from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.evaluate.chunks import Chunks, Step
from ziggurat.runtime.evaluate.monitor import Monitor
from ziggurat.runtime.hardware import default_threads
from ziggurat.runtime.kv_policy import KVPolicy

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class DecodeSettings:
    """How evaluations compute: llama.cpp's defaults. Sizes in tokens; ``threads`` None takes the physical cores.

    ``kv`` bounds the rows that stay of a prompt, None keeps all. The memory of the logits is n_batch / 2 x n_vocab x 4
    bytes per model.
    """

    n_batch: int = 2048
    n_ubatch: int = 512
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attention: str = "auto"
    threads: int | None = None
    kv: KVPolicy | None = None

    def __post_init__(self) -> None:
        for name in ("n_batch", "n_ubatch"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def n_threads(self) -> int:
        """The threads to compute with."""
        return self.threads or default_threads()

    def context(self, n_ctx: int, n_batch: int, n_seq_max: int, kept: tuple[int, ...] | None = None) -> ContextSettings:
        """Return the settings of a context for ``n_seq_max`` sequences of ``n_ctx`` rows.

        ``kept`` are the rows that each layer keeps of a prompt, if there is a policy.
        """
        return ContextSettings(
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=self.n_ubatch,
            n_seq_max=n_seq_max,
            type_k=self.type_k,
            type_v=self.type_v,
            flash_attention=self.flash_attention,
            n_threads=self.n_threads,
            kv=self.kv.settings(kept) if self.kv is not None and kept is not None else None,
        )


class ChunkDecoder:
    """One model's context for the chunks of a text. Close it (or leave its ``with`` block) to free the cache."""

    def __init__(self, model: Model, chunks: Chunks, settings: DecodeSettings, monitor: Monitor) -> None:
        n_ctx = chunks.n_ctx
        at_once = max(1, min(settings.n_batch // n_ctx, chunks.n_chunks))
        whole = settings.n_batch >= n_ctx or settings.kv is not None
        self.n_batch = at_once * n_ctx if whole else settings.n_batch
        self._chunks = chunks
        kept = settings.kv.rows(kv.windows(model), n_ctx, chunks.first) if settings.kv is not None else None
        #: Rows that each layer keeps of a prompt, None for all.
        self.kept = kept
        self._context = Context(model, settings.context(n_ctx, self.n_batch, at_once, kept))
        self._batch = self._context.new_batch()
        monitor.watch(self._context)

    def decode(self, step: Step) -> Logits:
        """Compute a step; return its scored logits, shape (rows, n_vocab), chunk by chunk and position by position.

        The array is the library's own memory: valid until the next call. Steps come in the order of ``Chunks.steps``.
        Raises what ``Context.decode`` raises.
        """
        if self.kept is not None:
            return self._decode_after_prompts(step)
        batch, scored = self._batch, self._chunks.scored(step)
        if step.start == 0:
            self._context.clear()
        batch.clear()
        for sequence, chunk in enumerate(range(step.chunk_start, step.chunk_end)):
            offset = len(batch)
            batch.add(self._chunks.inputs(chunk, step.start, step.end), step.start, sequence, output_last=False)
            if scored[0] < scored[1]:
                batch.want(offset + scored[0] - step.start, offset + scored[1] - step.start)
        self._context.decode(batch)
        logits: Logits = self._context.output_logits()
        return logits

    def _decode_after_prompts(self, step: Step) -> Logits:
        """Read the unscored part of every chunk as a prompt, and the rest one token of each at a time."""
        chunks, first = self._chunks, self._chunks.first
        indices = range(step.chunk_start, step.chunk_end)
        self._context.clear()
        self._feed(indices, 0, first, outputs=False)
        logits = np.empty((len(indices), chunks.rows_per_chunk, self._context.model.vocab.n_tokens), np.float32)
        for row in range(chunks.rows_per_chunk):
            self._feed(indices, first + row, first + row + 1, outputs=True)
            logits[:, row] = self._context.output_logits()
        return logits.reshape(-1, logits.shape[2])

    def _feed(self, chunks: range, start: int, end: int, *, outputs: bool) -> None:
        self._batch.clear()
        for sequence, chunk in enumerate(chunks):
            self._batch.add(self._chunks.inputs(chunk, start, end), start, sequence, output_last=outputs)
        self._context.decode(self._batch)

    def close(self) -> None:
        """Free the context. Idempotent."""
        self._context.close()

    def __enter__(self) -> ChunkDecoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
