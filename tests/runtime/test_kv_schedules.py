"""Random schedules of everything a context with a budget can be asked, against a model of it in Python.

The model knows how many rows every layer must hold, which of them may be rolled back and what must be refused; the
reference (helpers.kv_reference) knows which rows, and the logits. Allocations and computations fail and are aborted
anywhere: each sequence is then as before or as after. Rows of types with few bits, which make logits and scores coarse,
are followed by their bytes: wherever a row goes, it stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from helpers.kv_library import Aborted, Budget, BudgetModel, Ints, Part, Refused
from helpers.kv_models import Models, tokens
from helpers.kv_reference import RING_SPARE, SETTLED, ReferenceSequence, Weights
from helpers.kv_rows import Bytes, layers_in
from helpers.stock import nmse

Result = TypeVar("Result")
FAILED = -2  # what a selection returns then
N_CTX, N_SEQ, N_READING = 256, 3, 2
BUDGET = Budget((40, 60, 14), window=4, sinks=2, slack=8, n_reading=N_READING)
OWN = [None, (10, 20, 14), (40, 6, 6)]
SEQUENCES = st.integers(0, N_SEQ - 1)
LENGTHS = st.sampled_from([1, 1, 1, 1, 2, 3, 9, 14, 15, 33, 61, 150])
TYPES = st.tuples(*[st.sampled_from(["f16", "bf16", "q8_0", "q4_0"])] * 2)
FAULTS = st.none() | st.tuples(st.sampled_from(["fail", "abort"]), st.integers(0, 30))


@dataclass
class Expected:
    """One sequence: its tokens seen, and for each layer its rows and how many of them the last selection left.

    A layer that slides has the rows of a ring, ``capacity``, that no later ones have taken the place of.
    """

    reference: ReferenceSequence
    capacity: tuple[int, ...]
    used: list[int] = field(default_factory=lambda: [0] * 3)
    fixed: list[int] = field(default_factory=lambda: [0] * 3)
    rows: tuple[int, ...] = BUDGET.rows
    stored: list[dict[tuple[int, int], Bytes]] = field(default_factory=lambda: [{}, {}, {}])
    """The bytes of each row by KV head and position, K and V one after the other."""

    @property
    def tail(self) -> int:
        """How many of the last tokens can be rolled back."""
        return min(map(self._tail, range(3)))

    def _tail(self, layer: int) -> int:
        window, used = self.windows[layer], self.used[layer]
        if window and used < self.reference.n:
            return used - (window - 1)  # what is left has a whole window before it
        return used - self.fixed[layer]

    @property
    def windows(self) -> list[int]:
        return self.reference.w.windows

    @property
    def bounded(self) -> list[int]:
        """The layers that have a budget."""
        return [layer for layer in range(3) if not self.windows[layer]]

    @property
    def most(self) -> int:
        return max(self.used[layer] for layer in self.bounded)

    def overflows(self, n: int) -> bool:
        return any(self.used[layer] + n > self.rows[layer] for layer in self.bounded)

    def select(self) -> int:
        """Bring all layers down to their budgets; return how many were above."""
        above = [layer for layer in self.bounded if self.used[layer] > self.rows[layer]]
        for layer in above:
            self.used[layer] = self.fixed[layer] = self.rows[layer]
        return len(above)

    def copy(self) -> Expected:
        weights = self.reference.w
        return deepcopy(self, {id(weights): weights})

    @property
    def empty(self) -> bool:
        return self.reference.n == 0

    def add(self, n: int) -> None:
        self.used = [min(used + n, most) for used, most in zip(self.used, self.capacity, strict=True)]

    def failed(self, rows: tuple[int, ...], n: int) -> None:
        """A step that failed may have written over rows of a ring, but for a window."""
        for layer in set(range(3)) - set(self.bounded):
            whole = rows[layer] == self.reference.n or rows[layer] >= self.windows[layer] - 1
            assert whole and self.used[layer] - n <= rows[layer] <= self.used[layer]
            self.used[layer] = rows[layer]


@dataclass
class Reading:
    """A prompt that is being read in steps, with the rows that it will be brought down to."""

    part: Part
    rows: tuple[int, ...]


class Schedule(RuleBasedStateMachine):
    """Operations on three sequences of one context."""

    path: Path
    weights: Weights
    prefill: str
    score: str
    options: dict[str, object]
    limit = 1e-6  # of the error of logits
    few_bits = False

    @initialize(step_tokens=st.sampled_from([RING_SPARE, 5, 1]), types=TYPES)
    def start(self, step_tokens: int, types: tuple[str, str]) -> None:
        self.model, self.types = BudgetModel(self.path), types
        self.budget = replace(BUDGET, prefill=self.prefill, score=self.score)
        typed: dict[str, object] = {"types": types, "flash": True} if self.few_bits else {}
        self.context = self.model.context(N_CTX, self.budget, n_seq=N_SEQ, abort=self._abort, **typed, **self.options)
        self.capacity = self.context.capacity()
        self.sequences = [self._empty() for _ in range(N_SEQ)]
        self.count, self.nodes_left = 0, -1
        self.set_step(step_tokens)
        self.saved: list[tuple[bytes, Expected]] = []
        self.readings: dict[int, Reading] = {}

    def _abort(self) -> bool:
        self.nodes_left -= 1
        return self.nodes_left == 0

    def _try(self, call: Callable[[], Result], fault: tuple[str, int] | None) -> Result | None:
        """The result of a call, or nothing if a fault ended it: an allocation, a computation, or one node of it."""
        kind, n = fault or ("none", 0)
        self.context.fail_at(n if kind == "fail" else -1)
        self.nodes_left = 1 + 20 * n if kind == "abort" else -1
        try:
            return call()
        except (RuntimeError, Aborted):
            assert fault
            return None
        finally:
            self.context.fail_at(-1)
            self.nodes_left = -1

    def _empty(self, rows: tuple[int, ...] = BUDGET.rows) -> Expected:
        return Expected(ReferenceSequence(self.weights, self.budget), self.capacity, rows=rows)

    def teardown(self) -> None:
        if hasattr(self, "context"):
            self.context.close()
            self.model.__exit__(None, None, None)

    def _tokens(self, n: int) -> list[int]:
        self.count += 1
        return tokens(n, self.count)

    def _room(self, sequence: Expected) -> int:
        return min(self.capacity[layer] - sequence.used[layer] for layer in sequence.bounded)

    def _is_step(self, sequence: Expected, n: int) -> bool:
        return n == 1 or (n <= self.step_tokens and not sequence.empty)

    def _may_select(self, sequence: Expected, n: int) -> bool:
        """Above its budget; and it waits for queries as long as it has room."""
        return sequence.overflows(0) and (not self._blind(sequence) or self._room(sequence) < n)

    def _blind(self, sequence: Expected) -> bool:
        """All queries to select by were rolled back."""
        return self.score in ("snapkv", "tova") and not sequence.reference.layers[0].queries.size

    def _settle(self, sequence: Expected, n: int) -> bool:
        """Sums of attention take up what was kept before there is no place for the queries of n tokens."""
        full = len(sequence.reference.layers[0].paid) + n > SETTLED + RING_SPARE
        if full:
            sequence.reference.settle(RING_SPARE)
        return full

    def _due(self, parts: Iterable[tuple[int, int]]) -> set[int]:
        """Of sequences that take a step together, those that select first: as late as their room lets them, singly."""
        steps = [(i, n) for i, n in parts if self._is_step(self.sequences[i], n)]
        rooms = sorted(
            (self._room(self.sequences[i]) // n, i) for i, n in steps if self._may_select(self.sequences[i], n)
        )
        if not any(room <= turn for turn, (room, _) in enumerate(rooms)):
            return set()
        count = max(turn // (room + 1) + 1 for turn, (room, _) in enumerate(rooms))
        return {index for _, index in rooms[:count]}

    def _refused(self, sequence: Expected, n: int) -> bool:
        return not self._is_step(sequence, n) and sequence.overflows(n) and sequence.most + n > N_CTX

    def _follow(self, index: int, new: int) -> None:
        """The reference keeps what the context kept, if it may; the last `new` rows came after the selection."""
        sequence = self.sequences[index]
        kept: list[Ints] = [positions[:, : positions.shape[1] - new] for positions in self.context.kept(index)]
        reference = sequence.reference
        reference.budget = replace(self.budget, rows=sequence.rows)
        for layer, positions in enumerate(kept if not self.few_bits else ()):
            reference.swaps(layer, positions, 1e-4)
        reference.select(kept)

    def _is_prompt(self, sequence: Expected, n: int) -> bool:
        """Whether tokens of a batch are read into a copy of their sequence."""
        if self._is_step(sequence, n):
            return False
        kept = self.score != "keydiff" and not sequence.empty
        return sequence.overflows(n) or (n > RING_SPARE and (kept or self.score == "h2o"))

    @rule(
        parts=st.lists(st.tuples(SEQUENCES, LENGTHS), min_size=1, max_size=N_SEQ, unique_by=lambda part: part[0]),
        fault=FAULTS,
    )
    def decode(self, parts: list[tuple[int, int]], fault: tuple[str, int] | None) -> None:
        batch = [Part(index, self._tokens(n)) for index, n in parts]
        full = len(self.readings) == N_READING and any(self._is_prompt(self.sequences[i], n) for i, n in parts)
        if full or any(i in self.readings or self._refused(self.sequences[i], n) for i, n in parts):
            with pytest.raises(Refused):
                self.context.decode(*batch)
            return
        due = self._due(parts)
        prompts = {i for i, n in parts if self._is_prompt(self.sequences[i], n)}
        sizes = {i: len(self.context.saved(i)) for i, _ in parts if i not in self.readings}
        logits = self._try(lambda: self.context.decode(*batch), fault)
        for i, n in parts:
            # a state has fewer queries when some were summed up, which is no fault's to take back
            if i not in due and i not in prompts and (logits or len(self.context.saved(i)) < sizes[i]):
                self._settle(self.sequences[i], n)
        for part, got in zip(batch, logits or [None] * len(batch), strict=True):
            sequence = self.sequences[part.sequence]
            if self.context.last(part.sequence) != sequence.reference.n - 1:
                selects = not self._is_step(sequence, len(part.tokens)) and sequence.overflows(len(part.tokens))
                staged = part.sequence in prompts
                self._account(
                    part, None if got is None else got[0], due=part.sequence in due, selects=selects, staged=staged
                )
            else:
                assert logits is None
                sequence.failed(self.context.rows(part.sequence), len(part.tokens))
                if part.sequence in due and self.context.rows(part.sequence) != tuple(sequence.used):
                    sequence.select()  # which came before what failed
                    self._follow(part.sequence, 0)

    def _account(self, part: Part, got: np.ndarray | None, *, due: bool, selects: bool, staged: bool = False) -> None:
        sequence, n = self.sequences[part.sequence], len(part.tokens)
        if due:
            sequence.select()
            sequence.add(n)
            self._follow(part.sequence, n)
            wanted = sequence.reference.read(part.tokens)
        else:
            sequence.add(n)
            wanted = sequence.reference.read(part.tokens)
            if selects:
                sequence.select()
                self._follow(part.sequence, 0)
            elif staged:
                sequence.reference.settle()
        assert got is None or nmse(got, wanted[-1].astype(np.float32)) < self.limit

    @rule(index=SEQUENCES, n=LENGTHS)
    def begin(self, index: int, n: int) -> None:
        """Make ready to read a prompt in steps."""
        sequence, text = self.sequences[index], self._tokens(n)
        no_place = sequence.overflows(n) and sequence.most + n > N_CTX
        if index in self.readings or len(self.readings) == N_READING or no_place:
            with pytest.raises(Refused):
                self.context.begin(text, index)
            return
        self.context.begin(text, index)
        self.readings[index] = Reading(Part(index, text), sequence.rows)

    @precondition(lambda self: self.readings)
    @rule(which=st.integers(0, N_READING - 1), steps=st.sampled_from([1, 1, 2, 7, 50]), fault=FAULTS)
    def step(self, which: int, steps: int, fault: tuple[str, int] | None) -> None:
        index = sorted(self.readings)[which % len(self.readings)]
        progress = self._try(lambda: self.context.step(index, steps), fault)
        if progress is None:
            del self.readings[index]
        elif progress.finished:
            self._finish(index)

    @precondition(lambda self: self.readings)
    @rule(which=st.integers(0, N_READING - 1))
    def finish(self, which: int) -> None:
        index = sorted(self.readings)[which % len(self.readings)]
        assert self.context.step(index, 10_000).finished
        self._finish(index)

    def _finish(self, index: int) -> None:
        """The prompt has been read: with the budget that the sequence had when it began."""
        reading, sequence = self.readings.pop(index), self.sequences[index]
        rows, sequence.rows = sequence.rows, reading.rows
        # a single token takes a place beyond the budget, if there is one
        n = len(reading.part.tokens)
        selects = not self._room(sequence) if n == 1 else sequence.overflows(n)
        full = len(sequence.reference.layers[0].paid) == SETTLED + RING_SPARE
        staged = n > 1 or selects or full
        selects |= full and sequence.overflows(n)
        self._account(reading.part, self.context._logits([-1])[0], due=False, selects=selects, staged=staged)
        sequence.rows = rows

    @precondition(lambda self: self.readings)
    @rule(index=SEQUENCES)
    def cancel(self, index: int) -> None:
        assert self.context.cancel(index) == (index in self.readings)
        self.readings.pop(index, None)

    @precondition(lambda self: self.readings)
    @rule(which=st.integers(0, N_READING - 1))
    def asked_while_reading(self, which: int) -> None:
        """Everything but questions, and removal as a whole, is refused."""
        index = sorted(self.readings)[which % len(self.readings)]
        for call in (
            lambda: self.context.decode(Part(index, [5])),
            lambda: self.context.copy(index, (index + 1) % N_SEQ),
            lambda: self.context.copy((index + 1) % N_SEQ, index),
            lambda: self.context.saved(index),
            lambda: self.context.saved(),
        ):
            with pytest.raises(Refused):
                call()
        assert self.context.select(index) == -1

    @rule(n=st.integers(1, RING_SPARE) | st.just(RING_SPARE))
    def set_step(self, n: int) -> None:
        assert self.context.set_step(n) == 0
        self.step_tokens = n

    @rule(
        index=SEQUENCES,
        n=st.integers(100, 260),
        drafted=st.integers(0, RING_SPARE - 1),
        wrong=st.sampled_from([0, 0, 1, 4]),
    )
    def generate(self, index: int, n: int, drafted: int, wrong: int) -> None:
        """Steps of tokens and wrong drafts after them; far enough for a selection now and then."""
        sequence, generated = self.sequences[index], self._tokens(n)
        if index in self.readings:
            return
        while generated:
            size = 1 if sequence.empty else min(1 + drafted, self.step_tokens)
            right = min(size - min(wrong, size - 1), len(generated))
            some = generated[:right] + generated[: size - right]
            generated = generated[right:]
            if self._room(sequence) < len(some):
                self._account(Part(index, some), self.context.read(some, index)[0], due=True, selects=False)
            else:
                sequence.add(len(some))
                self._settle(sequence, len(some))
                logits = self.context.read(some, index, every=True)
                assert nmse(logits, sequence.reference.read(some).astype(np.float32)) < self.limit
            drafts = len(some) - right
            if drafts:
                assert self.context.remove(index, sequence.reference.n - drafts)
                sequence.add(-drafts)
                sequence.reference.forget(drafts)

    @rule(index=SEQUENCES, off=st.sampled_from([-40, -1, 1, 7]), n=st.sampled_from([1, 5]))
    def wrong_position(self, index: int, off: int, n: int) -> None:
        start = self.sequences[index].reference.n + off
        if start >= 0:
            with pytest.raises((Refused, RuntimeError)):
                self.context.decode(Part(index, self._tokens(n), start))

    @rule(index=SEQUENCES, count=st.integers(1, 60))
    def rollback(self, index: int, count: int) -> None:
        sequence = self.sequences[index]
        n = sequence.reference.n
        if count >= n:
            return
        possible = count <= sequence.tail and index not in self.readings
        assert self.context.remove(index, n - count) == possible
        if possible:
            sequence.add(-count)
            sequence.reference.forget(count)

    @rule(index=SEQUENCES, everything=st.sampled_from([False, False, False, True]))
    def remove(self, index: int, everything: bool) -> None:
        if everything:
            self.context.clear()
        else:
            assert self.context.remove(index)
        for each in range(N_SEQ) if everything else [index]:
            self.readings.pop(each, None)
            self.sequences[each] = self._empty(self.sequences[each].rows)

    @rule(index=SEQUENCES, fault=FAULTS)
    def select(self, index: int, fault: tuple[str, int] | None) -> None:
        sequence = self.sequences[index]
        if index in self.readings:
            return
        if sequence.overflows(0) and self._blind(sequence):
            assert self.context.select(index) == -1
            assert "queries" in self.context.refusal
            return
        got = self._try(lambda: self.context.select(index), fault)
        if got == FAILED:
            assert fault
            return
        above = sequence.select()
        assert got == above
        if above:
            self._follow(index, 0)

    @rule(index=SEQUENCES, rows=st.sampled_from(OWN))
    def set_budget(self, index: int, rows: tuple[int, ...] | None) -> None:
        assert self.context.set_budget(index, rows) == 0
        self.sequences[index].rows = rows or BUDGET.rows

    @rule(index=SEQUENCES, step=st.integers(1, N_SEQ - 1), cut=st.sampled_from([0, 0, 1, 5, 40]))
    def copy(self, index: int, step: int, cut: int) -> None:
        """The other sequence takes the place of its own; without some of the last tokens where they can be removed."""
        source, target = self.sequences[index], (index + step) % N_SEQ
        if cut > source.reference.n or {index, target} & set(self.readings):
            return
        if cut > source.tail:
            with pytest.raises(Refused):
                self.context.copy(index, target, 0, source.reference.n - cut)
            return
        self.context.copy(index, target, 0, source.reference.n - cut)
        self.sequences[target] = branch = source.copy()
        if cut:
            branch.add(-cut)
            branch.reference.forget(cut)

    @rule(index=SEQUENCES)
    def save(self, index: int) -> None:
        if index not in self.readings:
            self.saved.append((self.context.saved(index), self.sequences[index].copy()))

    @precondition(lambda self: self.saved)
    @rule(index=SEQUENCES, which=st.integers(0, 1 << 10))
    def restore(self, index: int, which: int) -> None:
        state, sequence = self.saved[which % len(self.saved)]
        if index in self.readings:
            with pytest.raises(Refused):
                self.context.restore(state, index)
            return
        self.context.restore(state, index)
        self.sequences[index] = sequence.copy()

    @invariant()
    def agrees(self) -> None:
        for index, sequence in enumerate(getattr(self, "sequences", [])):
            assert self.context.last(index) == sequence.reference.n - 1
            assert self.context.rows(index) == tuple(sequence.used)
            assert self.context.removable_from(index) == sequence.reference.n - (
                0 if index in self.readings else sequence.tail
            )
            for layer, (kept, cache) in enumerate(
                zip(self.context.kept(index), sequence.reference.layers, strict=True)
            ):
                first = cache.positions.shape[1] - sequence.used[layer]
                assert first == 0 or sequence.windows[layer]
                assert np.array_equal(kept.ravel(), cache.positions[:, first:].ravel())
            if self.few_bits and index not in self.readings:
                self._follow_bytes(index, sequence)

    def _follow_bytes(self, index: int, sequence: Expected) -> None:
        found = layers_in(self.context, self.weights, BUDGET, self.types, index)
        for layer, (rows, positions) in enumerate(zip(found, self.context.kept(index), strict=True)):
            now = {
                (head, position): np.concatenate([rows.keys[head][row], rows.values[head][row]])
                for head, line in enumerate(positions.tolist())
                for row, position in enumerate(line)
            }
            for place in now.keys() & sequence.stored[layer].keys():
                assert np.array_equal(now[place], sequence.stored[layer][place]), f"layer {layer}, {place}"
            sequence.stored[layer] = now


def run(schedule: type[Schedule], examples: int) -> None:
    run_state_machine_as_test(
        schedule,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize(
    ("shape", "ubatch", "prefill", "score"),
    [
        ("gqa", 16, "exact", "snapkv"),
        ("gqa", 256, "exact", "snapkv"),
        ("uneven", 16, "lane", "snapkv"),
        ("gqa", 16, "exact", "h2o"),
        ("uneven", 16, "lane", "h2o"),
        ("gqa", 16, "exact", "tova"),
        ("gqa", 16, "exact", "keydiff"),
        ("sliding", 16, "exact", "snapkv"),
        ("sliding_short", 256, "lane", "snapkv"),
        ("sliding", 16, "exact", "h2o"),
    ],
)
def test_random_schedules(shape: str, ubatch: int, prefill: str, score: str, kv_files: Models) -> None:
    """Read layer by layer, and in the lane; without and with a layer that slides."""

    class OfThisModel(Schedule):
        pass

    OfThisModel.path, OfThisModel.weights = kv_files[shape], Weights(kv_files[shape])
    OfThisModel.prefill, OfThisModel.score, OfThisModel.options = prefill, score, {"ubatch": ubatch}
    run(OfThisModel, 12)


@pytest.mark.parametrize("prefill", ["exact", "lane"])
def test_random_schedules_of_every_type(prefill: str, kv_files: Models) -> None:
    """K and V apart, heads of 32 (an odd number of 16-bit words in q8_0 and q4_0), another number in each layer."""

    class OfTypes(Schedule):
        few_bits, limit, score = True, 0.3, "snapkv"

    OfTypes.path, OfTypes.weights = kv_files["uneven_32"], Weights(kv_files["uneven_32"])
    OfTypes.prefill, OfTypes.options = prefill, {"ubatch": 16}
    run(OfTypes, 4)
