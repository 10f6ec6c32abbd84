"""One generation as resumable steps: read the prompt piece by piece, then one token a step.

The engine decides when a step runs; nothing here knows of threads or queues, so a scheduler of many sequences can
interleave these steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ziggurat.runtime.bindings import Batch, Context, Progress
from ziggurat.runtime.engine.protocol import FinishReason, GenerationRequest, GenerationStats, TokenEvent
from ziggurat.runtime.engine.text import TextAssembler
from ziggurat.runtime.logprobs import token_logprobs
from ziggurat.runtime.sampler import Sampler

Clock = Callable[[], float]


@dataclass(frozen=True)
class KVFigures:
    """The KV cache of a context: bytes as ``GenerationStats`` has them, and the rows each layer allocated.

    ``endless``: layers that are full select again, so that a generation is not bounded by the context.
    """

    bytes: int
    peak: int
    full: int
    rows_per_layer: tuple[int, ...]
    endless: bool = False


class Generation:
    """The state of one sequence, from its first prompt token to its last generated one.

    ``step`` does one piece of work and returns the token it made, if any; ``reason`` is set when it is done.
    ``sampler`` is the request's own, made here if it is not given; ``finish`` closes it.
    """

    def __init__(
        self,
        request: GenerationRequest,
        tokens: Sequence[int],
        context: Context,
        *,
        sequence: int = 0,
        kv: KVFigures,
        submitted: float,
        sampler: Sampler | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.request = request
        self.reason: FinishReason | None = None
        self.n_generated = 0
        self._tokens = tokens
        self._context = context
        self._vocab = context.model.vocab
        self._sequence = sequence
        self._kv = kv
        self._clock = clock
        self._submitted = submitted
        self._sampler = sampler or Sampler(request.sampling, self._vocab, context.settings.n_ctx)
        self._sampler.prime(tokens)
        self._text = TextAssembler(request.stop)
        self._n_read = 0
        self._progress: Progress | None = None
        self._pending: int | None = None  # sampled, not yet decoded
        self._started = self._prompt_done = self._last = clock()
        self._first_token = 0.0
        self._decode_steps = 0
        self._prompt_rows: tuple[int, ...] = ()

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self._tokens)

    @property
    def prompt_progress(self) -> float:
        """The part of the prompt's computation that is done, 0.0 to 1.0."""
        if self._progress is not None:
            return self._progress.fraction
        return self._n_read / self.n_prompt

    def step(self, batch: Batch) -> TokenEvent | None:
        """Read a piece of the prompt, or make one token; ``batch`` is emptied and used.

        A piece is a batch, or with a KV budget one step of ``Context.prompt_step``. Raises what ``Context.decode``
        raises; the sequence's rows are then the caller's to remove.
        """
        batch.clear()
        if self._n_read < self.n_prompt:
            if self._n_read == 0 and self._progress is None:
                self._started = self._clock()
            return self._read_step() if self._context.kv_active else self._read_chunk(batch)
        assert self._pending is not None
        index = batch.add((self._pending,), self.n_prompt + self.n_generated - 1, self._sequence, output_last=True)
        self._context.decode(batch)
        self._decode_steps += 1
        return self._choose(index)

    def _read_step(self) -> TokenEvent | None:
        if self._progress is None:
            self._context.prompt_begin(self._sequence, self._tokens)
        self._progress = self._context.prompt_step(self._sequence, 1)
        if not self._progress.finished:
            return None
        self._n_read = self.n_prompt
        self._prompt_rows = self._rows(self._n_read)
        return self._choose(-1)

    def _read_chunk(self, batch: Batch) -> TokenEvent | None:
        chunk = self._tokens[self._n_read : self._n_read + batch.capacity]
        last = self._n_read + len(chunk) == self.n_prompt
        index = batch.add(chunk, self._n_read, self._sequence, output_last=last)
        self._context.decode(batch)
        self._n_read += len(chunk)
        self._prompt_rows = self._rows(self._n_read)
        return self._choose(index) if last else None

    def _choose(self, index: int) -> TokenEvent | None:
        token = self._sampler.sample(self._context, index)
        self._last = self._clock()
        if not self._first_token:
            self._first_token = self._prompt_done = self._last
        if token is None or self._vocab.is_eog(token):
            self.reason = "stop"
            return None
        self.n_generated += 1
        self._pending = token
        text = self._text.feed(self._vocab.piece(token))
        if self._text.stopped:
            self.reason = "stop"
        elif self._is_full():
            self.reason = "length"
        wanted = self.request.logprobs
        if wanted is None:
            return TokenEvent(token, text)
        logits = self._context.logits(index)
        return TokenEvent(token, text, token_logprobs(logits, token, wanted, self._vocab))

    def _is_full(self) -> bool:
        limit = self.request.max_tokens
        if self.n_generated == limit or self._kv.endless:
            return self.n_generated == limit
        # the pending token needs a row of its own before another can be chosen
        return self.n_prompt + self.n_generated > self._context.settings.n_ctx

    def _rows(self, n_tokens: int) -> tuple[int, ...]:
        """Return the rows in use in each layer after ``n_tokens`` tokens."""
        if self._context.kv_active:
            return self._context.kv_rows(self._sequence)
        return tuple(min(n_tokens, rows) for rows in self._kv.rows_per_layer)

    def _evicted(self) -> int:
        seen = self._n_read + self._decode_steps
        return sum(seen - rows for rows in self._rows(seen)) if self._context.kv_active else 0

    def cancel(self) -> None:
        """End it; idempotent, and without effect when it has ended by itself."""
        if self.reason is None:
            self.reason = "cancelled"

    def finish(self) -> str:
        """Return the text still held back, and free the sampler."""
        self._sampler.close()
        return self._text.finish()

    def stats(self) -> GenerationStats:
        """Return the figures so far."""
        read = self._prompt_done - self._started if self._first_token else self._clock() - self._started
        return GenerationStats(
            prompt_tokens=self.n_prompt,
            generated_tokens=self.n_generated,
            prompt_seconds=read,
            decode_seconds=self._last - self._prompt_done if self._first_token else 0.0,
            decode_steps=self._decode_steps,
            time_to_first_token_s=self._first_token - self._submitted if self._first_token else 0.0,
            kv_bytes=self._kv.bytes,
            kv_bytes_peak=self._kv.peak,
            kv_bytes_full=self._kv.full,
            kv_rows_per_layer=self._prompt_rows or self._rows(self._n_read),
            evicted_rows=self._evicted(),
            n_ctx=self._context.settings.n_ctx,
            seed=self._sampler.params.seed if self._sampler.params.random else None,
        )
