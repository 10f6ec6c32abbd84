"""A stand-in for the library: what a context holds and refuses, in plain Python, with faults and time by a script.

It keeps the true tokens of every sequence. What is sampled depends on them, and ``FakeContext.seen`` tells them, so
that rows lost, stale or of another sequence show. Sequences have rows per layer as with a KV budget (``used`` of
them, of which ``fixed`` were there at the last selection) or, without one, as the stock caches: ``plain``, ``window``
(sliding) and ``recurrent``. What nobody may ask of the library at all is noted in ``misuses``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

from ziggurat.runtime.bindings import Batch, KVSettings, Progress
from ziggurat.runtime.errors import ContextError, DecodeAborted, DecodeError, InvalidRequestError
from ziggurat.runtime.sampling import SamplingParams

END = 0
N_VOCAB = 60
#: A prompt with this token makes every decoding step fail that its sequence takes part in.
POISON = 59
MAX_STEP = 16
SLIDING = 24

Kind = Literal["budget", "plain", "window", "recurrent"]


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Abort:
    """The flag that ends a computation."""

    def __init__(self) -> None:
        self.is_set = False

    def set(self) -> None:
        self.is_set = True

    def clear(self) -> None:
        self.is_set = False


class FakeVocab:
    """Tokens are letters, but for the one that ends a text."""

    n_tokens = N_VOCAB

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return b"" if token == END else bytes([ord("A") + token])

    def is_eog(self, token: int) -> bool:
        return token == END

    def check(self, tokens: Sequence[int]) -> None:
        assert all(0 <= token < N_VOCAB for token in tokens)


def next_token(seen: Sequence[int], seed: int = 0, draw: int = 0) -> int:
    """What follows a text: a hash of all of it, or often only of its last two tokens, which repeats itself."""
    text = bytes(seen)
    whole = zlib.crc32(text + bytes([seed % 256, draw % 256 if seed else 0]))
    if whole % 3 == 0 or seed:
        return whole // 3 % (POISON - 1) if whole % 50 else END
    return 1 + zlib.crc32(text[-2:]) % 7


@dataclass
class Sequence_:
    """What the library has of one sequence."""

    budget: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    fixed: list[int] = field(default_factory=list)
    first: int = 0  # of a sliding window: rows before this position are gone
    reading: list[int] | None = None
    steps_done: int = 0


@dataclass(frozen=True)
class Fault:
    """What happens at the n-th call of a method (from 0, all calls of ``CALLS`` counted): an error, or an action."""

    at: int
    error: Exception | None = None
    action: Callable[[], None] | None = None
    seconds: float = 0.0


class FakeContext:
    """See ``bindings.Context``. ``seconds`` tells how long a computation of so many tokens takes."""

    def __init__(
        self,
        clock: Clock,
        *,
        kind: Kind = "budget",
        n_seq: int = 3,
        n_ctx: int = 256,
        n_ubatch: int = 16,
        n_batch: int = 64,
        rows: Sequence[int] = (40, 24),
        slack: int = 20,
        n_reading: int = 2,
        seconds: Callable[[int], float] = lambda n_tokens: 0.01,
    ) -> None:
        self.kind, self.clock, self.seconds = kind, clock, seconds
        self.n_layer = len(rows)
        self.capacity = tuple(count + slack for count in rows)
        kv = KVSettings(tuple(rows), window=8, slack=slack, n_reading=n_reading) if kind == "budget" else None
        self.settings = SimpleNamespace(n_seq_max=n_seq, n_ctx=n_ctx, kv=kv)
        self.model = SimpleNamespace(vocab=FakeVocab(), n_layer=self.n_layer, recurrent=kind == "recurrent")
        self.n_ubatch, self.n_batch, self.n_reading = n_ubatch, n_batch, n_reading
        self.kv_active = kind == "budget"
        self.abort = Abort()
        self.rows = tuple(rows)
        self.sequences = [self._empty() for _ in range(n_seq)]
        self.misuses: list[str] = []
        self.faults: dict[int, Fault] = {}
        self.fired: list[Fault] = []
        self.calls = 0
        self.decoded: list[tuple[float, tuple[int, ...]]] = []  # end and sequences of every decoding step
        self.prompts: list[tuple[int, ...]] = []  # sequences of every batch with tokens of prompts
        self._outputs: dict[int, list[int]] = {}

    def _empty(self) -> Sequence_:
        return Sequence_(self.rows, [], [0] * self.n_layer, [0] * self.n_layer)

    def new_batch(self) -> Batch:
        return Batch(self.n_batch, self.settings.n_seq_max)

    # the script

    def _call(self) -> Exception | None:
        """Count a call; return the error that it is to end with."""
        fault = self.faults.pop(self.calls, None)
        self.calls += 1
        if fault is None:
            return None
        self.fired.append(fault)
        self.clock.now += fault.seconds
        if fault.action is not None:
            fault.action()
        return fault.error

    def _misuse(self, what: str) -> None:
        self.misuses.append(what)
        raise AssertionError(what)

    # asking

    def seen(self, index: int) -> list[int]:
        """The tokens whose logits the last computation left at ``index``."""
        if index not in self._outputs:
            self._misuse(f"no logits at {index}")
        return self._outputs[index]

    def last_position(self, sequence: int) -> int:
        return len(self.sequences[sequence].tokens) - 1

    def kv_rows(self, sequence: int) -> tuple[int, ...]:
        error = self._call()
        if error is not None and not isinstance(error, DecodeError):
            raise error
        return tuple(self.sequences[sequence].used) if self.kv_active else ()

    def kv_capacity(self) -> tuple[int, ...]:
        return self.capacity if self.kv_active else ()

    def removable_from(self, sequence: int) -> int:
        held = self.sequences[sequence]
        end = len(held.tokens)
        if self.kind == "plain" or not end:
            return 0
        if self.kind == "recurrent" or held.reading is not None:
            return end
        if self.kind == "window":
            return 0 if held.first <= 0 else min(end, held.first + SLIDING)
        return end - min(end, *(used - fixed for used, fixed in zip(held.used, held.fixed, strict=True)))

    # changing

    def remove(self, sequence: int, start: int = 0, end: int = -1) -> bool:
        assert end == -1
        held = self.sequences[sequence]
        if start == 0:
            budget = held.budget
            self.sequences[sequence] = self._empty()
            self.sequences[sequence].budget = budget
            return True
        if start >= len(held.tokens):
            return True
        if self.kind == "window" and start < self.removable_from(sequence):
            self._misuse(f"rows before {start} of sequence {sequence} are gone")
        if start < self.removable_from(sequence):
            return False
        count = len(held.tokens) - start
        held.used = [used - count for used in held.used]
        del held.tokens[start:]
        return True

    def copy(self, source: int, target: int, end: int = -1) -> None:
        error = self._call()
        if error is not None and not isinstance(error, DecodeError):
            raise error
        taken, other = self.sequences[source], self.sequences[target]
        end = len(taken.tokens) if end < 0 else end
        if taken.reading is not None or other.reading is not None:
            raise ContextError("a prompt is being read")
        if end < self.removable_from(source):
            if not self.kv_active:
                self._misuse(f"sequence {source} cannot be copied up to {end}")
            raise ContextError("before the last selection")
        cut = len(taken.tokens) - end
        used = [count - cut for count in taken.used]
        copied = Sequence_(taken.budget, taken.tokens[:end], used, list(taken.fixed), taken.first)
        self.sequences[target] = copied

    def set_kv_budget(self, sequence: int, rows: Sequence[int]) -> None:
        slack = self.settings.kv.slack
        if any(count + slack > most for count, most in zip(rows, self.capacity, strict=True)):
            raise InvalidRequestError("the budget does not fit what was allocated")
        self.sequences[sequence].budget = tuple(rows)

    def _select(self, held: Sequence_) -> None:
        for layer, most in enumerate(held.budget):
            if held.used[layer] > most:
                held.used[layer] = held.fixed[layer] = most

    # computing

    def decode(self, batch: Batch) -> None:
        error = self._call()
        entries = list(zip(batch.tokens, batch._positions, batch._sequences, strict=False))
        self._check(entries)
        if error is not None and not isinstance(error, DecodeError):
            raise error
        self._outputs = {}
        self.clock.now += self.seconds(len(entries))
        sequences = tuple(dict.fromkeys(sequence for _, _, sequence in entries))
        steps = {s: [token for token, _, other in entries if other == s] for s in sequences}
        if error is None and self.abort.is_set:
            error = DecodeAborted("aborted", 2)
        decoding = all(len(tokens) <= MAX_STEP and self.sequences[s].tokens for s, tokens in steps.items())
        if error is None and decoding and batch.outputs and self._poisoned(steps):
            error = DecodeError("poisoned", -3)
        if error is not None:
            self._partly(entries, steps)
            raise error
        for place, (token, _, sequence) in enumerate(entries):
            self._append(sequence, [token])
            if place in batch.outputs:
                self._outputs[place] = list(self.sequences[sequence].tokens)
        if decoding:
            self.decoded.append((self.clock.now, sequences))
        else:
            self.prompts.append(sequences)

    def _poisoned(self, steps: dict[int, list[int]]) -> bool:
        return any(POISON in self.sequences[sequence].tokens for sequence in steps)

    def _check(self, entries: Sequence[tuple[int, int, int]]) -> None:
        following: dict[int, int] = {}
        counts: dict[int, int] = {}
        for _, position, sequence in entries:
            held = self.sequences[sequence]
            if held.reading is not None:
                self._misuse(f"sequence {sequence} is being read and cannot decode")
            if position != following.get(sequence, len(held.tokens)):
                self._misuse(f"position {position} of sequence {sequence} does not follow")
            following[sequence] = position + 1
            counts[sequence] = counts.get(sequence, 0) + 1
        for sequence, count in counts.items():
            held = self.sequences[sequence]
            if not self.kv_active:
                if following[sequence] > self.settings.n_ctx:
                    self._misuse(f"sequence {sequence} is beyond the context")
                continue
            if not held.tokens and count <= min(held.budget):
                continue  # a prompt that is written in place
            if count > MAX_STEP or not held.tokens:
                self._misuse(f"{count} tokens of sequence {sequence} are a prompt")
            if any(used + count > most for used, most in zip(held.used, self.capacity, strict=True)):
                self._select(held)

    def _append(self, sequence: int, tokens: Sequence[int]) -> None:
        held = self.sequences[sequence]
        held.tokens += tokens
        held.used = [used + len(tokens) for used in held.used]
        if self.kind == "window":
            held.first = max(held.first, len(held.tokens) - SLIDING - self.n_ubatch)

    def _partly(self, entries: Sequence[tuple[int, int, int]], steps: dict[int, list[int]]) -> None:
        """A computation that failed has done some ubatches, with a budget some of the sequences."""
        if self.kv_active:
            for sequence, tokens in steps.items():
                if (self.calls + sequence) % 2:
                    self._append(sequence, tokens)
        else:
            for token, _, sequence in entries[: self.calls % (len(entries) // self.n_ubatch + 1) * self.n_ubatch]:
                self._append(sequence, [token])

    # prompts in steps

    def prompt_begin(self, sequence: int, tokens: Sequence[int]) -> None:
        held = self.sequences[sequence]
        lanes = [other for other in self.sequences if other.reading is not None]
        if held.reading is not None or len(lanes) >= self.n_reading:
            self._misuse(f"no lane to read sequence {sequence} in")
        if not tokens or len(held.tokens) + len(tokens) > self.settings.n_ctx:
            self._misuse(f"a prompt of {len(tokens)} tokens after {len(held.tokens)}")
        held.reading, held.steps_done = list(tokens), 0

    def prompt_step(self, sequence: int, max_steps: int) -> Progress:
        error = self._call()
        assert max_steps == 1
        held = self.sequences[sequence]
        if held.reading is None:
            self._misuse(f"no prompt is being read for sequence {sequence}")
            raise AssertionError
        self._outputs = {}
        tokens = held.reading
        self.clock.now += self.seconds(min(len(tokens), self.n_ubatch))
        if error is None and self.abort.is_set:
            error = DecodeAborted("aborted", 2)
        if error is not None:
            if isinstance(error, DecodeError):
                held.reading = None
            raise error
        held.steps_done += 1
        steps = self.n_layer * -(-len(tokens) // self.n_ubatch)
        if held.steps_done == steps:
            held.reading = None
            self._append(sequence, tokens)
            self._select(held)
            self._outputs = {-1: list(held.tokens)}
        return Progress(held.steps_done, steps, len(tokens), held.reading is None)

    def prompt_cancel(self, sequence: int) -> bool:
        held = self.sequences[sequence]
        read, held.reading = held.reading, None
        return read is not None


class FakeSampler:
    """Draws the next token, and remembers where the tokens before it were not those that it was told or drew."""

    def __init__(self, seed: int | None = None, fails_at: int | None = None) -> None:
        self.params = SamplingParams(temperature=0) if seed is None else SamplingParams(seed=seed)
        self.seed, self.fails_at = seed or 0, fails_at
        self.expected: list[int] = []
        self.draws = 0
        self.closed = 0
        self.wrong: list[str] = []

    def prime(self, tokens: Sequence[int]) -> None:
        self.expected = list(tokens)

    def sample(self, context: Any, index: int) -> int:
        if self.closed:
            self.wrong.append("sampled after its end")
        seen = context.seen(index)
        if seen != self.expected:
            self.wrong.append(f"{len(seen)} tokens were seen instead of {len(self.expected)}, or others")
        if self.draws == self.fails_at:
            raise RuntimeError("the sampler is scripted to fail")
        token = next_token(seen, self.seed, self.draws)
        self.draws += 1
        self.expected.append(token)
        return token

    def close(self) -> None:
        self.closed += 1
