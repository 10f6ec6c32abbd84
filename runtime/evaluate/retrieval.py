"""Asks a model for the facts that documents hide, and counts the answers that are right to the last digit."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ziggurat.runtime.bindings import Vocab
from ziggurat.runtime.engine import Engine, GenerationRequest, Message, TokenEvent
from ziggurat.runtime.engine.prompts import PromptEncoder
from ziggurat.runtime.errors import TemplateError
from ziggurat.runtime.evaluate.monitor import Monitor
from ziggurat.runtime.evaluate.needle import Needle
from ziggurat.runtime.evaluate.scoring import accuracy
from ziggurat.runtime.sampling import SamplingParams

_MARK = "ziggurat-document-5f3b8a"
_IN_FLIGHT = 8  # requests given to the engine at once; it batches them if it can


@dataclass(frozen=True)
class Trial:
    """A document and what the model answered."""

    needle: Needle
    answer: str
    correct: bool


def template_frame(vocab: Vocab, template: str | None) -> tuple[list[int], list[int]]:
    """Return the tokens that a chat template puts before and after the one message of a user.

    Raises TemplateError when there is no template, or one that does not show the message exactly once.
    """
    encoder = PromptEncoder(vocab, template)
    if template is None:
        raise TemplateError("the model has no chat template to ask questions with: use --raw")
    text = encoder.render(GenerationRequest(messages=(Message("user", _MARK),)))
    head, *tail = text.split(_MARK)
    if len(tail) != 1:
        raise TemplateError(f"the model's chat template shows the message {len(tail)} times; use --raw")
    return encoder.tokenize(head), vocab.tokenize(tail[0], add_special=False, parse_special=True)


def raw_frame(vocab: Vocab) -> tuple[list[int], list[int]]:
    """Return what stands before and after a prompt without a template: BOS if the model wants it."""
    return ([vocab.bos] if vocab.adds_bos and vocab.bos is not None else [], [])


def is_correct(needle: Needle, answer: str, tokens: Sequence[int]) -> bool:
    """Whether the first number of the answer is the value, digit by digit, or its tokens are the value's."""
    if needle.expected_tokens:
        return tuple(tokens[: len(needle.expected_tokens)]) == needle.expected_tokens
    number = re.search(r"\d+", answer)
    return number is not None and number.group() == needle.expected


def ask(engine: Engine, needles: Iterable[Needle], total: int, monitor: Monitor, answer_tokens: int) -> list[Trial]:
    """Ask every question greedily; raises what the engine raises. ``total`` is for the progress only."""
    trials: list[Trial] = []
    waiting: deque[tuple[Needle, Any]] = deque()

    def take() -> None:
        needle, stream = waiting.popleft()
        text, tokens = "", []
        with stream as events:
            for event in events:
                text += event.text
                if isinstance(event, TokenEvent):
                    tokens.append(event.token)
        trials.append(Trial(needle, text, is_correct(needle, text, tokens)))
        monitor.report("documents", len(trials), total)

    monitor.report("documents", 0, total)
    for needle in needles:
        request = GenerationRequest(
            tokens=needle.prompt,
            max_tokens=len(needle.expected_tokens) or answer_tokens,
            sampling=SamplingParams(temperature=0.0),
        )
        waiting.append((needle, engine.stream(request)))
        if len(waiting) == _IN_FLIGHT:
            take()
    while waiting:
        take()
    return trials


def results(trials: Sequence[Trial]) -> dict[str, Any]:
    """Return accuracies: over all trials, and a grid of length by depth for each number of facts."""
    right = sum(trial.correct for trial in trials)
    overall = accuracy(right, len(trials))
    return {
        "accuracy": overall.value,
        "accuracy_se": overall.error,
        "trials": len(trials),
        "grids": [_grid(facts, trials) for facts in sorted({trial.needle.facts for trial in trials})],
        "by_trial": [
            {
                "facts": trial.needle.facts,
                "length": trial.needle.length,
                "depth": trial.needle.depth,
                "actual_depth": trial.needle.actual_depth,
                "key": trial.needle.key,
                "expected": trial.needle.expected or list(trial.needle.expected_tokens),
                "answer": trial.answer,
                "correct": trial.correct,
            }
            for trial in trials
        ],
    }


def _grid(facts: int, trials: Sequence[Trial]) -> dict[str, Any]:
    some = [trial for trial in trials if trial.needle.facts == facts]
    lengths = sorted({trial.needle.length for trial in some})
    depths = sorted({trial.needle.depth for trial in some})

    def share(length: int | None, depth: float | None = None) -> float:
        cell = [
            trial.correct
            for trial in some
            if length in (None, trial.needle.length) and depth in (None, trial.needle.depth)
        ]
        return sum(cell) / len(cell)

    return {
        "facts": facts,
        "trials": len(some),
        "accuracy": share(None),
        "lengths": lengths,
        "depths": depths,
        "by_length": [share(length) for length in lengths],
        "by_cell": [[share(length, depth) for depth in depths] for length in lengths],
    }
