"""Multiple choice by log-likelihood: the model answers with what it finds likeliest after the question.

As lm-evaluation-harness does it: the score of a choice is the sum of the log-probabilities of its tokens after the
prompt; besides, the mean per token (llama.cpp's score) and per byte of the choice (the harness takes characters). The
prompt that all choices share is computed once and its rows are given to the other sequences; several questions share
a batch. With a KV budget, which shares no rows, every choice reads the prompt itself and is then read token by token,
as a model that generates it would have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ziggurat.runtime.bindings import Context, Model, Vocab, kv
from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.evaluate.choices_file import Question
from ziggurat.runtime.evaluate.decoder import DecodeSettings, Logits
from ziggurat.runtime.evaluate.monitor import Monitor
from ziggurat.runtime.evaluate.scoring import accuracy, log_softmax

_MAX_BATCH = 512  # bounds the logits: up to this many rows of n_vocab at once
_MAX_SEQUENCES = 64
_MAX_ROWS = 16384  # KV rows of all sequences, unless one question needs more


@dataclass(frozen=True)
class Encoded:
    """A question's tokens: ``prefix`` is shared, ``endings`` follow it and are what is scored."""

    prefix: list[int]
    endings: list[list[int]]

    @property
    def rows(self) -> int:
        """KV rows of its longest sequence."""
        return len(self.prefix) + max(map(len, self.endings))


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of one sequence, and what to do with the logits after the last ``outputs`` of them.

    ``take`` gets the offset of the first token in the run and its logits, (tokens, n_vocab), piece by piece.
    """

    tokens: Sequence[int]
    position: int
    sequence: int
    outputs: int
    take: Callable[[int, Logits], None]


def encode(vocab: Vocab, question: Question, form: str) -> Encoded:
    """Tokenize prompt and choices. What all of them and the prompt alone begin with is the shared prefix.

    Raises InvalidRequestError when nothing stands before the choices.
    """
    prompt = vocab.tokenize(question.prompt(form), add_special=True, parse_special=False)
    whole = [
        vocab.tokenize(f"{question.prompt(form)} {choice}", add_special=True, parse_special=False)
        for choice in question.choices
    ]
    shared = 0
    for column in zip(prompt, *(tokens[:-1] for tokens in whole), strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    if not shared:
        raise InvalidRequestError("the prompt of a question has no tokens; put more into the prompt form")
    return Encoded(whole[0][:shared], [tokens[shared:] for tokens in whole])


def decode_runs(context: Context, runs: Sequence[Run], *, whole: bool = False) -> None:
    """Compute runs in as few batches as they fit into. Raises what ``Context.decode`` raises.

    ``whole``: a run that fits a batch is not cut, as prompts under a KV budget must not be.
    """
    batch = context.new_batch()
    pending: list[tuple[Run, int, int]] = []

    def flush() -> None:
        context.decode(batch)
        logits, row = context.output_logits(), 0
        for run, offset, count in pending:
            if count:
                run.take(offset, logits[row : row + count])
                row += count
        batch.clear()
        pending.clear()

    for run in runs:
        start = 0
        if whole and len(batch) and len(batch) + len(run.tokens) > batch.capacity:
            flush()
        while start < len(run.tokens):
            end = min(len(run.tokens), start + batch.capacity - len(batch))
            at = len(batch)
            batch.add(run.tokens[start:end], run.position + start, run.sequence, output_last=False)
            first = max(start, len(run.tokens) - run.outputs)
            if first < end:
                batch.want(at + first - start, at + end - start)
            pending.append((run, first, max(0, end - first)))
            start = end
            if len(batch) == batch.capacity:
                flush()
    if len(batch):
        flush()


def score_group(
    context: Context, group: Sequence[Encoded], kept: Sequence[tuple[int, ...]] | None = None
) -> list[list[float]]:
    """Return the log-likelihood of every ending of some questions, each choice in a sequence of its own.

    ``kept`` are the rows that each layer keeps of each question's prompt, None without a KV budget.
    """
    context.clear()
    scores = [[0.0] * len(item.endings) for item in group]
    prompts, endings, firsts = [], [], []
    sequence = 0
    for item, row in zip(group, scores, strict=True):
        firsts.append(sequence)
        prompts.append(Run(item.prefix, 0, sequence, 1, _First(item, row)))
        for choice, tokens in enumerate(item.endings):
            if len(tokens) > 1:
                take = _Rest(tokens, row, choice)
                endings.append(Run(tokens[:-1], len(item.prefix), sequence + choice, len(tokens) - 1, take))
        sequence += len(item.endings)
    if kept is None:
        decode_runs(context, prompts)
        for item, first in zip(group, firsts, strict=True):
            for choice in range(1, len(item.endings)):
                context.copy(first, first + choice)
        decode_runs(context, endings)
    else:
        _decode_after_prompts(context, group, kept, prompts, endings)
    return scores


def _decode_after_prompts(
    context: Context,
    group: Sequence[Encoded],
    kept: Sequence[tuple[int, ...]],
    prompts: Sequence[Run],
    endings: Sequence[Run],
) -> None:
    every = []
    for item, rows, prompt in zip(group, kept, prompts, strict=True):
        for choice in range(len(item.endings)):
            context.set_kv_budget(prompt.sequence + choice, rows)
            every.append(replace(prompt, sequence=prompt.sequence + choice, outputs=int(choice == 0)))
    decode_runs(context, every, whole=True)
    for step in range(max((len(run.tokens) for run in endings), default=0)):
        decode_runs(context, [_token(run, step) for run in endings if step < len(run.tokens)])


def _token(run: Run, step: int) -> Run:
    """Return one token of a run as a run."""
    take = run.take
    return Run(
        run.tokens[step : step + 1], run.position + step, run.sequence, 1, lambda _offset, logits: take(step, logits)
    )


@dataclass(frozen=True)
class _First:
    """Takes the logits after the prefix, which predict every ending's first token."""

    item: Encoded
    row: list[float]

    def __call__(self, _offset: int, logits: Logits) -> None:
        log_probs = log_softmax(logits)[0]
        for choice, tokens in enumerate(self.item.endings):
            self.row[choice] += float(log_probs[tokens[0]])


@dataclass(frozen=True)
class _Rest:
    """Takes the logits within an ending."""

    tokens: list[int]
    row: list[float]
    choice: int

    def __call__(self, offset: int, logits: Logits) -> None:
        targets = self.tokens[offset + 1 : offset + 1 + len(logits)]
        self.row[self.choice] += float(log_softmax(logits)[np.arange(len(targets)), targets].sum(dtype=np.float64))


@dataclass(frozen=True)
class ChoicesResult:
    """Per question: the log-likelihood of each choice, and the tokens each took."""

    questions: Sequence[Question]
    log_likelihoods: Sequence[Sequence[float]]
    n_tokens: Sequence[Sequence[int]]

    def picks(self) -> dict[str, list[int]]:
        """Return which choice is taken for each question, by sum, per token and per byte; the first of equals."""
        by: dict[str, list[int]] = {"accuracy": [], "accuracy_per_token": [], "accuracy_per_byte": []}
        for question, scores, counts in zip(self.questions, self.log_likelihoods, self.n_tokens, strict=True):
            sums = np.array(scores)
            sizes = np.array([len(choice.encode()) for choice in question.choices])
            by["accuracy"].append(int(sums.argmax()))
            by["accuracy_per_token"].append(int((sums / np.array(counts)).argmax()))
            by["accuracy_per_byte"].append(int((sums / sizes).argmax()))
        return by

    def as_json(self, *, items: bool = False) -> dict[str, Any]:
        """Return accuracies with standard errors; with ``items`` also every question's scores."""
        figures: dict[str, Any] = {"items": len(self.questions)}
        figures["chance"] = sum(1 / len(question.choices) for question in self.questions) / len(self.questions)
        picks = self.picks()
        for name, picked in picks.items():
            right = sum(pick == question.answer for pick, question in zip(picked, self.questions, strict=True))
            estimate = accuracy(right, len(self.questions))
            figures |= {name: estimate.value, f"{name}_se": estimate.error}
        if items:
            figures["by_item"] = [
                {
                    "question": question.text,
                    "answer": question.answer,
                    "picked": pick,
                    "log_likelihoods": list(scores),
                    "n_tokens": list(counts),
                }
                for question, pick, scores, counts in zip(
                    self.questions, picks["accuracy"], self.log_likelihoods, self.n_tokens, strict=True
                )
            ]
        return figures


def evaluate_choices(
    model: Model, questions: Sequence[Question], settings: DecodeSettings, monitor: Monitor, form: str
) -> ChoicesResult:
    """Score every choice of every question. Raises InvalidRequestError naming a question beyond the context."""
    items = [encode(model.vocab, question, form) for question in questions]
    n_ctx = max(item.rows for item in items)
    if n_ctx > model.n_ctx_train > 0:
        number = next(number for number, item in enumerate(items, 1) if item.rows > model.n_ctx_train)
        raise InvalidRequestError(
            f"question {number} takes {items[number - 1].rows} tokens, the model was trained for {model.n_ctx_train}"
        )
    most = max(len(item.endings) for item in items)
    n_seq = max(most, min(_MAX_SEQUENCES, _MAX_ROWS // n_ctx))
    policy = settings.kv
    kept = [policy.rows(kv.windows(model), n_ctx, len(item.prefix)) for item in items] if policy is not None else None
    largest = tuple(map(max, zip(*kept, strict=True))) if kept is not None else None
    scores: list[list[float]] = []
    with Context(model, settings.context(n_ctx, min(settings.n_batch, _MAX_BATCH), n_seq, largest)) as context:
        monitor.watch(context)
        for group in _groups(items, n_seq):
            monitor.report("questions", len(scores), len(items))
            done = len(scores)
            scores += score_group(context, group, kept[done : done + len(group)] if kept is not None else None)
        monitor.report("questions", len(items), len(items))
    return ChoicesResult(questions, scores, [[len(ending) for ending in item.endings] for item in items])


def _groups(items: Sequence[Encoded], n_seq: int) -> Iterator[list[Encoded]]:
    """Yield consecutive questions whose choices fit into ``n_seq`` sequences together."""
    group: list[Encoded] = []
    for item in items:
        if sum(len(one.endings) for one in group) + len(item.endings) > n_seq:
            yield group
            group = []
        group.append(item)
    if group:
        yield group
