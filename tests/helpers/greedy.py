"""Generations compared within the tolerance for batches of other shapes: equal until two tokens are as good as tied."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ziggurat.runtime.engine import Event, FinishEvent, TokenEvent

#: The two best logits may be this close before rounding decides.
TIE = 1e-3


@dataclass(frozen=True)
class Answer:
    """The tokens of a request that asked for two log-probabilities or more, where the first tie is, and its end."""

    tokens: list[int]
    tie: int
    end: FinishEvent


def answer(events: Iterable[Event]) -> Answer:
    """Collect a generation."""
    tokens: list[int] = []
    tie: int | None = None
    for event in events:
        if isinstance(event, FinishEvent):
            return Answer(tokens, len(tokens) if tie is None else tie, event)
        assert isinstance(event, TokenEvent) and event.logprobs is not None
        first, second, *_ = event.logprobs.top
        if tie is None and first.logprob - second.logprob < TIE:
            tie = len(tokens)
        tokens.append(event.token)
    raise AssertionError("the generation has no end")


def agree(found: Answer, wanted: Answer) -> bool:
    """Whether both are the same as far as they have to be."""
    upto = min(found.tie, wanted.tie)
    whole = upto < len(wanted.tokens) or len(found.tokens) == len(wanted.tokens)
    return whole and found.tokens[:upto] == wanted.tokens[:upto]


def shared(answers: Sequence[Answer]) -> int:
    """Return how many tokens of these are compared at all: a test should look that it is many."""
    return sum(each.tie for each in answers)
