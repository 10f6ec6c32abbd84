"""The prompts that are being read: in turns, a piece of each, for as long as those that decode can wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from ziggurat.runtime.engine.contexts import Serving
from ziggurat.runtime.engine.counts import Counts
from ziggurat.runtime.engine.generation import Generation
from ziggurat.runtime.engine.prefill import ChunkReader, PromptReader, StepReader
from ziggurat.runtime.engine.rates import Rate
from ziggurat.runtime.engine.slots import Slots
from ziggurat.runtime.errors import DecodeAborted

# tokens that are read at once at least: of fewer attention takes as long on a CPU (llama.cpp tiles it from 64 on)
_LEAST_CHUNK = 64


class Reading:
    """Reads prompts into the sequences of one context, and chooses the first token after each.

    ``lanes`` are the requests whose prompts are read. ``samples_on_device``: see ``device_sampling.worthwhile``.
    """

    def __init__(
        self,
        serving: Serving,
        slots: Slots,
        counts: Counts,
        *,
        samples_on_device: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.lanes: deque[Generation] = deque()
        self.rate = Rate()
        self._serving, self._context = serving, serving.context
        self._slots, self._counts = slots, counts
        self._samples_on_device = samples_on_device
        self._clock = clock
        self._chunk_rate = Rate()
        self._patience = 0.0

    def discard(self, generation: Generation) -> None:
        """Read this prompt no more."""
        if generation in self.lanes:
            self.lanes.remove(generation)

    def read(self, patience: float, proceed: Callable[[], bool]) -> list[tuple[Generation, Exception | None]]:
        """Read for so many seconds, but one piece at least, while ``proceed``; 0: nobody waits, and one piece is read.

        Returns the requests that have ended with that, and the errors of those that failed.
        """
        self._patience = patience
        begun = now = self._clock()
        ended: list[tuple[Generation, Exception | None]] = []
        while self.lanes and proceed():
            before = now
            generation = self.lanes[0]
            self.lanes.rotate(-1)
            try:
                self._advance(generation)
            except DecodeAborted:
                self._context.abort.clear()
            except Exception as error:
                self.discard(generation)
                ended.append((generation, error))
            else:
                if generation.reason is not None:
                    ended.append((generation, None))
            now = self._clock()
            if now - begun + (now - before) > patience:
                break
        return ended

    def _advance(self, generation: Generation) -> None:
        """Read a piece of a prompt."""
        begun = self._clock()
        reader = generation.reader = generation.reader or self._reader(generation)
        before = reader.n_read if isinstance(reader, ChunkReader) else 0
        finished = reader.step()
        seconds = self._clock() - begun
        generation.read_seconds += seconds
        if isinstance(reader, ChunkReader):
            self._chunk_rate.record(reader.n_read - before, seconds)
        if finished:
            self._finish_part(generation, reader)

    def _reader(self, generation: Generation) -> PromptReader:
        slot, context = generation.slot, self._context
        tokens = generation.parts[0]
        kv = context.settings.kv
        if not context.kv_active or kv is None:
            return ChunkReader(context, self._serving.batch, slot.index, tokens, len(slot.tokens), self._chunk)
        shared = len(generation.parts) > 1  # nothing of that is evicted
        self._slots.set_budget(slot, kv.rows if shared else self._serving.rows(len(slot.tokens) + len(tokens)))
        return StepReader(context, slot.index, tokens)

    def _chunk(self) -> int:
        """Return how many tokens of a prompt to read at once: no more than those that decode can wait for."""
        if not self._patience:
            return self._context.n_ubatch
        return max(_LEAST_CHUNK, int(self._patience * self._chunk_rate.per_second))

    def _finish_part(self, generation: Generation, reader: PromptReader) -> None:
        """Take note of a part that is read; after the last one choose a token."""
        slot = generation.slot
        part = generation.parts.pop(0)
        generation.reader = None
        slot.tokens += part
        self._slots.measure(slot)
        self.rate.record(len(part), generation.read_seconds)
        generation.read_seconds = 0.0
        if generation.parts:
            self._slots.keep_apart(slot)
            return
        self.discard(generation)
        self._counts.prompt_tokens += len(generation.job.tokens)
        self._counts.reused_tokens += len(generation.job.tokens) - generation.n_unread
        generation.prompt_read(self._rows(slot.index, len(slot.tokens)))
        event = generation.choose(reader.output)
        if self._samples_on_device and generation.reason is None:
            generation.sample_on_device()
        if event is not None:
            generation.job.channel.push(event)

    def _rows(self, sequence: int, n_tokens: int) -> tuple[int, ...]:
        """Return the rows in use in each layer."""
        if self._context.kv_active:
            return self._context.kv_rows(sequence)
        return tuple(min(n_tokens, rows) for rows in self._serving.kv.rows_per_layer)
