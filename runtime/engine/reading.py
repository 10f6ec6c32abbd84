"""The prompts that are being read: in turns, a piece of each, for as long as those that decode can wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from ziggurat.runtime.engine.contexts import Serving
from ziggurat.runtime.engine.counts import Counts
from ziggurat.runtime.engine.generation import Generation
from ziggurat.runtime.engine.prefill import ChunkReader, PromptReader, StepReader
from ziggurat.runtime.engine.rates import Rate
from ziggurat.runtime.engine.slots import Slots
from ziggurat.runtime.errors import DecodeAborted, EngineError

# tokens that are read at once at least: of fewer attention takes as long on a CPU (llama.cpp tiles it from 64 on)
_LEAST_CHUNK = 64

Ended = tuple[Generation, Exception | None]
Piece = tuple[Generation, ChunkReader, int]


class Reading:
    """Reads prompts into the sequences of one context, and chooses the first token after each.

    ``lanes`` are the requests whose prompts are read. ``fork`` is told when one is, and returns other requests with the
    same prompt, on copies of its sequence. ``samples_on_device``: see ``device_sampling.worthwhile``.
    """

    def __init__(
        self,
        serving: Serving,
        slots: Slots,
        counts: Counts,
        *,
        samples_on_device: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        fork: Callable[[Generation], Sequence[Generation]] = lambda _read: (),
    ) -> None:
        self.lanes: deque[Generation] = deque()
        self.rate = Rate()
        self._serving, self._context = serving, serving.context
        self._batch = serving.batch
        self._slots, self._counts = slots, counts
        self._samples_on_device = samples_on_device
        self._fork = fork
        self._clock = clock
        self._chunk_rate = Rate()
        self._patience = 0.0

    def in_one_piece(self, n_held: int, n_tokens: int) -> bool:
        """Whether so many tokens after ``n_held`` that a sequence holds are read at once, and beside other prompts.

        Then they wait for none. With a budget these are the first ones of a sequence, nothing of which is evicted: what
        the library writes in place, and can take back.
        """
        if n_tokens > self._piece:
            return False
        return not self._context.kv_active or (not n_held and self._serving.keeps_all(n_tokens))

    def discard(self, generation: Generation) -> None:
        """Read this prompt no more."""
        if generation in self.lanes:
            self.lanes.remove(generation)

    def read(self, patience: float, proceed: Callable[[], bool]) -> list[Ended]:
        """Read for so many seconds, but one piece at least, while ``proceed``; 0: nobody waits, and one piece is read.

        Returns the requests that have ended with that, and the errors of those that failed.
        """
        self._patience = patience
        begun = now = self._clock()
        ended: list[Ended] = []
        while self.lanes and proceed():
            before = now
            ended += self._next_piece()
            now = self._clock()
            if now - begun + (now - before) > patience:
                break
        return ended

    def _next_piece(self) -> list[Ended]:
        """Read a piece of the prompt whose turn it is, and beside it those that have no more left than there is room.

        Several prompts in one batch take no longer than one after the other, and those that decode wait once for all.
        """
        first = self.lanes[0]
        self.lanes.rotate(-1)
        reader = self._reader(first)
        if isinstance(reader, StepReader):
            return self._step(first, reader)
        room = self._chunk()
        n_first = reader.n_left if self._context.kv_active else min(reader.n_left, room)
        pieces = [(first, reader, n_first)]
        room -= n_first
        for other in list(self.lanes)[:-1]:
            beside = self._reader(other)
            if isinstance(beside, ChunkReader) and beside.n_left <= room:
                pieces.append((other, beside, beside.n_left))
                room -= beside.n_left
                self.lanes.remove(other)
                self.lanes.append(other)
        # the library computes together only those that stand in the order of their sequences
        pieces.sort(key=lambda piece: piece[0].slot.index)
        return self._chunks(pieces)

    def _step(self, generation: Generation, reader: StepReader) -> list[Ended]:
        begun = self._clock()
        try:
            finished = reader.step()
        except DecodeAborted:
            self._context.abort.clear()
            return []
        except Exception as error:
            return self._failed(generation, error)
        generation.read_seconds += self._clock() - begun
        return self._finish([generation]) if finished else []

    def _chunks(self, pieces: Sequence[Piece]) -> list[Ended]:
        """Read so many tokens of each in one batch.

        When the library fails on it each is tried alone, and only those that fail then are lost; after an abort nothing
        has happened.
        """
        begun = self._clock()
        try:
            self._batch.clear()
            for _, reader, n_tokens in pieces:
                reader.add(self._batch, n_tokens)
            self._context.decode(self._batch)
        except Exception as error:
            return self._recover(pieces, error)
        seconds, total = self._clock() - begun, sum(n_tokens for *_, n_tokens in pieces)
        self._chunk_rate.record(total, seconds)
        finished = []
        for generation, reader, n_tokens in pieces:
            generation.read_seconds += seconds * n_tokens / total
            if reader.computed(n_tokens):
                finished.append(generation)
        return self._finish(finished)

    def _recover(self, pieces: Sequence[Piece], error: Exception) -> list[Ended]:
        aborted = isinstance(error, DecodeAborted)
        if aborted:
            self._context.abort.clear()
        ended: list[Ended] = []
        alone: list[Piece] = []
        for piece in pieces:
            if not piece[1].restore():
                ended += self._failed(piece[0], _no_way_back(error) if aborted else error)
            elif not aborted and len(pieces) == 1:
                ended += self._failed(piece[0], error)
            elif not aborted:
                alone.append(piece)
        for piece in alone:
            ended += self._chunks([piece])
        return ended

    def _failed(self, generation: Generation, error: Exception) -> list[Ended]:
        self.discard(generation)
        return [(generation, error)]

    def _reader(self, generation: Generation) -> PromptReader:
        if generation.reader is None:
            generation.reader = self._new_reader(generation)
        return generation.reader

    def _new_reader(self, generation: Generation) -> PromptReader:
        slot, context = generation.slot, self._context
        tokens = generation.parts[0]
        kv = context.settings.kv
        if not context.kv_active or kv is None:
            return ChunkReader(context, slot.index, tokens, len(slot.tokens))
        shared = len(generation.parts) > 1  # nothing of that is evicted
        self._slots.set_budget(slot, kv.rows if shared else self._serving.rows(len(slot.tokens) + len(tokens)))
        if self.in_one_piece(len(slot.tokens), len(tokens)):
            return ChunkReader(context, slot.index, tokens, 0)
        return StepReader(context, slot.index, tokens)

    @property
    def _piece(self) -> int:
        """Tokens that are computed at once."""
        return min(self._context.n_ubatch, self._batch.capacity)

    def _chunk(self) -> int:
        """Return how many tokens to read at once: no more than those that decode can wait for."""
        if not self._patience:
            return self._piece
        return min(self._piece, max(_LEAST_CHUNK, int(self._patience * self._chunk_rate.per_second)))

    def _finish(self, generations: Sequence[Generation]) -> list[Ended]:
        """Take note of parts that are read; after the last one of a prompt choose a token."""
        ended: list[Ended] = []
        for generation in generations:
            reader = generation.reader
            assert reader is not None
            try:
                self._finish_part(generation)
            except Exception as error:
                ended += self._failed(generation, error)
                continue
            if not generation.parts:
                for other in (generation, *self._fork(generation)):
                    ended += self._choose(other, reader.output)
        return ended

    def _finish_part(self, generation: Generation) -> None:
        slot = generation.slot
        part = generation.parts.pop(0)
        generation.reader = None
        slot.tokens += part
        self._slots.measure(slot)
        self.rate.record(len(part), generation.read_seconds)
        generation.read_seconds = 0.0
        if generation.parts:
            self._slots.keep_apart(slot)
        else:
            self.discard(generation)
            generation.prompt_read(self._rows(slot.index, len(slot.tokens)))

    def _choose(self, generation: Generation, index: int) -> list[Ended]:
        """Choose the first token from the logits at ``index``."""
        self._counts.prompt_tokens += len(generation.job.tokens)
        self._counts.reused_tokens += len(generation.job.tokens) - generation.n_unread
        try:
            event = generation.choose(index)
            if event is not None:
                generation.job.channel.push(event)
            if self._samples_on_device and generation.reason is None:
                generation.sample_on_device()
        except Exception as error:
            return [(generation, error)]
        return [(generation, None)] if generation.reason is not None else []

    def _rows(self, sequence: int, n_tokens: int) -> tuple[int, ...]:
        """Return the rows in use in each layer."""
        if self._context.kv_active:
            return self._context.kv_rows(sequence)
        return tuple(min(n_tokens, rows) for rows in self._serving.kv.rows_per_layer)


def _no_way_back(error: Exception) -> EngineError:
    lost = EngineError("the reading of a prompt was interrupted, and this model cannot go back")
    lost.__cause__ = error
    return lost
