from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.samplers import softmax
from ziggurat.runtime.bindings import Candidates, Context, ContextSettings, Model, SamplerChain
from ziggurat.runtime.engine.ngram import NgramDrafter
from ziggurat.runtime.engine.reuse import common_prefix
from ziggurat.runtime.engine.speculation import (
    MAX_DRAFT,
    Drafter,
    Reader,
    Speculation,
    Wanted,
    verified,
)

Propose = Callable[[Sequence[int], int], list[int]]


@given(st.lists(st.integers(0, 1), max_size=700), st.integers(0, 700), st.booleans())
def test_common_prefix(tokens: list[int], at: int, changed: bool) -> None:
    other = list(tokens)
    if changed and at < len(other):
        other[at] = 2
    expected = at if changed and at < len(tokens) else len(tokens)
    assert common_prefix(tokens, tuple(other)) == expected
    assert common_prefix(tokens, other, expected // 2) == expected
    assert common_prefix(tokens[: expected // 2], other) == expected // 2


@pytest.mark.parametrize(
    ("drafted", "expected"),
    [
        ([], [1]),
        ([1, 2, 3], [1, 2, 3, 4]),
        ([1, 2, 9], [1, 2, 3]),
        ([9, 2, 3], [1]),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
    ],
)
def test_verified_ends_at_the_first_other_token(drafted: list[int], expected: list[int]) -> None:
    chosen = iter([1, 2, 3, 4, 5, None])
    calls: list[int] = []

    def sample(index: int) -> int | None:
        calls.append(index)
        return next(chosen)

    assert list(verified(drafted, sample)) == expected
    assert calls == list(range(len(expected) + (len(drafted) == 5)))  # at the end of the last it was told None


def test_whoever_stops_has_drawn_no_more() -> None:
    calls: list[int] = []

    def sample(index: int) -> int:
        calls.append(index)
        return 7

    for token in verified([7, 7, 7], sample):
        assert token == 7
        if len(calls) == 2:
            break
    assert calls == [0, 1]


# --- the distribution

VOCABULARY, LENGTH = 8, 30_000
LOGITS = np.random.default_rng(3).normal(0, 1.2, (VOCABULARY, VOCABULARY)).astype(np.float32)  # by the token before

DRAFTERS: dict[str, Propose] = {
    "none": lambda tokens, k: [],
    "good": lambda tokens, k: follow(tokens[-1], k, lambda row: int(row.argmax())),
    "adversarial": lambda tokens, k: follow(tokens[-1], k, lambda row: int(row.argmin())),
    "bad": lambda tokens, k: [(len(tokens) * 5 + index) % VOCABULARY for index in range(k)],
    "lookup": lambda tokens, k: NgramDrafter().draft([Wanted(0, tokens[-60:], k)])[0],
}


def follow(token: int, count: int, choose: Callable[[np.ndarray], int]) -> list[int]:
    out = []
    for _ in range(count):
        token = choose(LOGITS[token])
        out.append(token)
    return out


def generate(propose: Propose, seed: int, length: int, accept: Callable[..., list[int]] | None = None) -> list[int]:
    """Tokens of the fake model, drawn by the library's sampler."""
    chain = SamplerChain().temperature(0.8).dist(seed)
    candidates = Candidates(VOCABULARY)
    tokens = [0]
    while len(tokens) < length:
        drafts = propose(tokens, 1 + len(tokens) % 5)
        inputs = [tokens[-1], *drafts]

        def sample(index: int, inputs: list[int] = inputs) -> int:
            candidates.load(LOGITS[inputs[index]], ())
            return candidates.choose(chain)

        tokens += list(verified(drafts, sample)) if accept is None else accept(drafts, sample)
    chain.close()
    return tokens[:length]


def deviation(tokens: list[int]) -> float:
    """Chi-square of what followed each token, against what the model says; 56 degrees of freedom."""
    counts = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    expected = np.stack([softmax(row / 0.8) for row in LOGITS]) * counts.sum(axis=1, keepdims=True)
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("name", DRAFTERS)
def test_sampled_text_is_distributed_as_the_model_says(name: str) -> None:
    tokens = generate(DRAFTERS[name], 11, LENGTH)
    assert deviation(tokens) < 125  # beyond it with a probability of 4e-7
    assert tokens == generate(DRAFTERS["none"], 11, LENGTH)


def test_the_statistic_sees_a_wrong_rule() -> None:
    def lenient(drafts: list[int], sample: Callable[[int], int]) -> list[int]:
        """Draws twice for a drafted token and is content if it comes once."""
        out: list[int] = []
        for index, draft in enumerate(drafts):
            chosen = [sample(index), sample(index)]
            out.append(draft if draft in chosen else chosen[0])
            if out[-1] != draft:
                return out
        return [*out, sample(len(drafts))]

    assert deviation(generate(DRAFTERS["good"], 11, LENGTH, lenient)) > 500


# --- with the library

PROMPT = [1, *range(260, 280), *range(260, 270)]


def decode(model: Model, propose: Propose, count: int, chain: SamplerChain) -> list[int]:
    tokens = list(PROMPT)
    with Context(model, ContextSettings(n_ctx=512, n_threads=1)) as context:
        batch = context.new_batch()
        batch.add(tokens[:-1], 0, 0, output_last=False)
        context.decode(batch)
        while len(tokens) < len(PROMPT) + count:
            drafts = propose(tokens, MAX_DRAFT)
            start = len(tokens) - 1
            batch.clear()
            batch.add([tokens[-1], *drafts], start, 0, output_last=True)
            batch.want(0, len(batch))
            context.decode(batch)
            new = list(verified(drafts, lambda index: chain.sample(context, index)))
            tokens += new
            if len(new) <= len(drafts):
                assert context.remove(0, start + len(new))
    chain.close()
    return tokens[len(PROMPT) :][:count]


@pytest.mark.parametrize("seed", [None, 5])
def test_the_librarys_text_is_what_it_is_without_drafts(spm_model: Model, seed: int | None) -> None:
    def chain() -> SamplerChain:
        return SamplerChain().greedy() if seed is None else SamplerChain().temperature(0.9).dist(seed)

    alone = decode(spm_model, lambda tokens, k: [], 60, chain())
    known = [*PROMPT, *alone]
    lookup = NgramDrafter()
    assert len(set(alone)) > 3
    for propose in (
        lambda tokens, k: known[len(tokens) : len(tokens) + k],
        lambda tokens, k: [(token + 1) % 290 for token in known[len(tokens) : len(tokens) + k]],
        lambda tokens, k: [*known[len(tokens) : len(tokens) + 2], 5, 6],
        lambda tokens, k: lookup.draft([Wanted(0, tokens, k)])[0],
    ):
        assert decode(spm_model, propose, 60, chain()) == alone


# --- what the scheduler asks


class Scripted:
    """Drafts the tokens it was given, and takes a step of the clock for each."""

    def __init__(self, clock: list[float], tokens: Sequence[int] = (7, 8, 9), seconds: float = 0.0) -> None:
        self.tokens, self.seconds, self.clock = list(tokens), seconds, clock
        self.asked: list[list[Wanted]] = []
        self.to_read = 0
        self.forgotten: list[int] = []
        self.closed = False

    def draft(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        self.asked.append(list(wanted))
        drafts = [self.tokens[: each.limit] for each in wanted]
        self.clock[0] += self.seconds * max(map(len, drafts))
        return drafts

    def reader(self, slot: int, tokens: Sequence[int]) -> Reader | None:
        return self if self.to_read else None

    def step(self) -> bool:
        self.to_read -= 1
        self.clock[0] += 1.0
        return not self.to_read

    def cancel(self) -> None: ...

    @property
    def progress(self) -> float:
        return 0.0

    def forget(self, slot: int) -> None:
        self.forgotten.append(slot)

    def close(self) -> None:
        self.closed = True


def speculation(*drafters: Drafter, clock: list[float] | None = None, limit: int = MAX_DRAFT) -> Speculation:
    now = clock or [0.0]
    made = Speculation(drafters, limit, clock=lambda: now[0])
    for size, seconds in ((32, 2.0), (16, 1.5), (2, 1.0), (1, 1.0)):
        made.costs.record(size, seconds)
    return made


def test_good_drafts_are_asked_for_and_bad_ones_are_not() -> None:
    clock = [0.0]
    good, bad = Scripted(clock), Scripted(clock)
    for drafter, accepts in ((good, True), (bad, False)):
        made = speculation(drafter, clock=clock)
        for _ in range(40):
            draft = made.propose([Wanted(2, [1, 2], 3)])[0]
            made.record({2: (len(draft), len(draft) if accepts else 0)}, 1 + len(draft), 1.0 + 0.2 * len(draft))
    assert len(good.asked) == 40
    assert 1 <= len(bad.asked) < 15


def test_limits_are_kept() -> None:
    drafter = Scripted([0.0], range(40))
    made = speculation(drafter, limit=3)
    for _ in range(30):
        drafts = made.propose([Wanted(0, [1], 15), Wanted(1, [1], 2)])
        made.record({0: (len(drafts[0]),) * 2, 1: (len(drafts[1]),) * 2}, 7, 1.0)
    assert list(map(len, drafts)) == [3, 2]
    assert speculation(drafter, limit=99).limit == MAX_DRAFT


def test_the_second_drafter_gets_what_the_first_does_not_know() -> None:
    clock = [0.0]
    first, second = Scripted(clock, ()), Scripted(clock)
    made = speculation(first, second, clock=clock)
    for _ in range(20):
        first.tokens = [1] if first.tokens == [] else []
        draft = made.propose([Wanted(0, [1, 2], 3)])[0]
        made.record({0: (len(draft), len(draft))}, 1 + len(draft), 1.0)
        assert draft[:1] == (first.tokens or [7])
    assert len(second.asked) == 10


def test_what_is_missing_is_read_a_piece_a_step_before_drafts_are_asked_for() -> None:
    clock = [0.0]
    drafter = Scripted(clock)
    drafter.to_read = 3
    made = speculation(drafter, clock=clock)
    for left in (2, 1, 0):
        assert made.propose([Wanted(0, [1, 2], 3)]) == [[]]
        assert drafter.to_read == left
        made.record({0: (0, 0)}, 1, 1.0)
    assert made.propose([Wanted(0, [1, 2], 3)])[0]


def test_a_dear_drafter_is_left_alone() -> None:
    clock = [0.0]
    drafter = Scripted(clock, seconds=5.0)
    made = speculation(drafter, clock=clock)
    for _ in range(1000):
        draft = made.propose([Wanted(0, [1, 2], 3)])[0]
        made.record({0: (len(draft), len(draft))}, 1 + len(draft), 1.0)
    first = 5.0 * len(drafter.tokens)
    assert clock[0] <= first + 0.02 * 1000 + 5.0 * 3


def test_a_failing_drafter_is_logged_and_left(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Scripted):
        def draft(self, wanted: Sequence[Wanted]) -> list[list[int]]:
            self.asked.append(list(wanted))
            raise ValueError("a bug")

    failing, other = Failing([0.0]), Scripted([0.0])
    made = speculation(failing, other)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert made.propose([Wanted(0, [1, 2], 3)])[0] == [7, 8, 9]
            made.record({0: (3, 3)}, 4, 1.0)
    assert len(failing.asked) == 1
    assert "Failing failed and is not used any more" in caplog.text
    made.forget(0)
    assert (failing.forgotten, other.forgotten) == ([], [0])
    made.close()
    assert failing.closed and other.closed


def test_a_new_request_begins_anew() -> None:
    drafter = Scripted([0.0])
    made = speculation(drafter)
    while made.propose([Wanted(0, [1, 2], 3)])[0]:
        made.record({0: (3, 0)}, 4, 1.2)
    made.begin(0)
    assert made.propose([Wanted(0, [1, 2], 3)])[0]
