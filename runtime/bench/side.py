"""One context under test: filled to its depth, timed while it reads and generates, and put back."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ziggurat.runtime import plan
from ziggurat.runtime.bench.axes import Place, Setting, Work
from ziggurat.runtime.bench.filling import BASE, multiplied
from ziggurat.runtime.bindings import Context, KVSettings, Model, can_measure, kv, kv_state, measure
from ziggurat.runtime.errors import ContextError

# states of one sequence by what they depend on
States = dict[tuple[str, str, KVSettings | None, int], bytes]
_WARM = 2


@dataclass(frozen=True)
class Allocated:
    """KV bytes of all sequences, as allocated: after prompts, and with what reading them takes; rows by layer."""

    kv_bytes: int
    kv_bytes_reading: int
    rows_per_layer: tuple[int, ...]


@dataclass
class Side:
    """A context with sequences of ``place.depth`` tokens, or with as many rows as such sequences would have.

    With a KV budget as many tokens are read as the layers keep, which fills them all; without one, rows are multiplied
    (``filling``). ``filled`` says what was done. Raises what contexts raise. Close it when done.
    """

    model: Model
    shape: plan.KVShape | None
    setting: Setting
    place: Place
    work: Work
    states: States
    filled: str = "empty"
    _start: int = 0
    _state: bytes | None = None
    _next: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.context = Context(self.model, self.setting.context(self._layers(), self.place, self.work))
        self._batch = self.context.new_batch()
        self._random = random.Random(0)

    def _layers(self) -> int | tuple[int, ...]:
        """The layers as policies count them; a stock library, which has no budgets, need not know their windows."""
        return self.model.n_layer if self.setting.policy is None else kv.windows(self.model)

    def close(self) -> None:
        """Free the context."""
        self.context.close()

    def fill(self) -> None:
        """Bring every sequence to the depth, and compute some tokens to warm up."""
        if self.place.depth:
            state = self._filled_state()
            for sequence in range(self.place.streams):
                kv_state.restore(self.context, sequence, state)
            self._start = self.context.last_position(0) + 1
            plain = not self.context.kv_active and self.shape is not None and not any(self.shape.window)
            # the end of plain rows can be cut off; selected ones do not come back, and neither does a window's past
            self._state = None if plain and not self.model.recurrent else state
        self._next = [self._start] * self.place.streams
        self.generate(_WARM)
        self.reset()

    def reset(self) -> None:
        """Put every sequence back to the depth."""
        for sequence in range(self.place.streams):
            if self._next[sequence] == self._start:
                continue
            if self._state is not None:
                kv_state.restore(self.context, sequence, self._state)
            else:
                self.context.remove(sequence, self._start)
            self._next[sequence] = self._start

    @property
    def endless(self) -> bool:
        """Whether it goes on where it was: behind a depth of which a budget keeps a part, which is a steady state."""
        layout = self.context.kv_layout()
        return self.place.depth > 0 and layout is not None and layout.stage_rows > 0

    def prompt(self) -> float:
        """Read a prompt into every sequence, one after the other; return seconds for all."""
        self.reset()
        texts = [self._tokens(self.work.n_prompt) for _ in range(self.place.streams)]
        begun = time.perf_counter()
        for sequence, tokens in enumerate(texts):
            self._read(sequence, tokens)
        return time.perf_counter() - begun

    def generate(self, n_tokens: int) -> float:
        """Compute so many tokens of every sequence, one of each at a time; return seconds for all."""
        if not self.endless:
            self.reset()
        steps = [self._tokens(self.place.streams) for _ in range(n_tokens)]
        begun = time.perf_counter()
        for tokens in steps:
            self._batch.clear()
            for sequence, token in enumerate(tokens):
                self._batch.add([token], self._next[sequence], sequence, output_last=True)
            self.context.decode(self._batch)
            self.context.output_logits()  # waits for devices that compute on their own
            self._next = [position + 1 for position in self._next]
        return time.perf_counter() - begun

    def allocated(self) -> Allocated:
        """Say what its cache takes: by the library, or by arithmetic with a stock one."""
        layout = self.context.kv_layout()
        if layout is not None:
            return Allocated(layout.kept_bytes, layout.total_bytes, self.context.kv_capacity())
        if self.shape is None:
            return Allocated(0, 0, ())
        settings = self.context.settings
        rows = plan.rows_per_layer(self.shape, settings.n_ctx, n_ubatch=self.context.n_ubatch)
        if can_measure():
            size = sum(buffer.context for buffer in measure(self.context))
        else:
            size = plan.kv_bytes(
                self.shape,
                settings.n_ctx,
                type_k=settings.type_k,
                type_v=settings.type_v,
                n_seq=settings.n_seq_max,
                n_ubatch=self.context.n_ubatch,
            )
        return Allocated(size, size, rows)

    def _filled_state(self) -> bytes:
        depth, settings = self.place.depth, self.context.settings
        if self.context.kv_active:
            assert settings.kv is not None
            # more rows than a layer keeps are not needed for it to be full
            count = depth if self.work.read_depth else min(depth, max(settings.kv.rows) + 1)
            self.filled = "read" if count == depth else "rows"
            return self._read_state(count)
        if not self.work.read_depth and depth > BASE:
            base = self._read_state(BASE)
            state = multiplied(base, depth, self.model.n_layer, self.place.streams)
            if state is not None:
                self.filled = "multiplied"
                return state
        self.filled = "read"
        return self._read_state(depth)

    def _read_state(self, count: int) -> bytes:
        """Return the state of one sequence that has read so many tokens; what others have read is taken if it fits."""
        settings = self.context.settings
        key = (settings.type_k, settings.type_v, settings.kv, count)
        known = self.states.get(key)
        if known is not None and (self.context.kv_active or count == BASE):
            try:
                if self.context.kv_active:  # without a budget it is multiplied before it is restored
                    kv_state.restore(self.context, 0, known)
                return known
            except ContextError:  # of a context that differs in more than the key
                pass
        self._read(0, self._tokens(count), start=0)
        state = kv_state.save(self.context, 0)
        self.context.remove(0)
        if self.context.kv_active or count == BASE:  # a long one is not worth its memory
            self.states[key] = state
        return state

    def _read(self, sequence: int, tokens: Sequence[int], start: int | None = None) -> None:
        position = self._next[sequence] if start is None else start
        size = self._batch.capacity
        for offset in range(0, len(tokens), size):
            part = tokens[offset : offset + size]
            self._batch.clear()
            self._batch.add(part, position + offset, sequence, output_last=offset + size >= len(tokens))
            self.context.decode(self._batch)
        self.context.output_logits()
        if start is None:
            self._next[sequence] += len(tokens)

    def _tokens(self, count: int) -> list[int]:
        return self._random.choices(range(self.model.vocab.n_tokens), k=count)
