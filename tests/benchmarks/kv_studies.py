"""Two ways of choosing KV rows that the library does not have, on the reference model in NumPy and F64.

*by heads*: the rows of a layer are shared out among its KV heads by score instead of each head keeping as many (AdaKV,
arXiv 2407.11550; each keeps at least a fifth of an even share, as in the authors' code). Here evicted rows are masked;
to free them, heads would need numbers of rows of their own. *zip*: the score is the most attention that a row is paid
while the model reads the document once more after it (KVzip, arXiv 2505.23416), which knows no question and costs a
second, longer reading. Documents, questions and what is right are those of kv_policies.py, and so are window, sinks and
shares, all of equal rows per layer. The question is *seen* when rows are chosen, or it is *unseen* and comes after
that, and stays whole.

Prints a table in Markdown; --json FILE appends the result to that file's list.

usage: convert tests/reference_model ref.gguf --type f16
       python tests/benchmarks/kv_studies.py ref.gguf [--trials 2] [--length 1024] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kv_policies import question_start, table
from kv_retrieval import ANSWER_TOKENS, DEPTHS, SINKS
from results import append

from helpers.kv_library import Budget
from helpers.kv_reference import Array, ReferenceSequence, Weights, _attend, _pooled
from ziggurat.runtime.bindings import Model
from ziggurat.runtime.budget import POOL, POOL_TYPE, WINDOW
from ziggurat.runtime.evaluate.filler import TEXT
from ziggurat.runtime.evaluate.needle import Needle, TextNeedles, Wording, grid
from ziggurat.runtime.evaluate.retrieval import is_correct, template_frame

SCORES = ("snapkv", "keydiff", "zip")
FLOOR = 0.2  # of an even share that each head keeps
NEVER = 2**30  # a position that no query sees
ALL = 1 << 16


def scores_of(sequence: ReferenceSequence, score: str, paid: list[Array] | None) -> list[Array]:
    """(KV heads, rows before the window) of each layer."""
    if score == "zip":
        assert paid is not None
        return [_pooled(layer[:, :-WINDOW], POOL, POOL_TYPE) for layer in paid]
    pool = POOL if score == "snapkv" else 1
    sequence.budget = Budget((), WINDOW, SINKS, pool, POOL_TYPE, score=score)
    found = [sequence.scores(layer) for layer in range(len(sequence.layers))]
    sequence.budget = Budget((), ALL)
    return found


def keep(sequence: ReferenceSequence, scores: list[Array], rows: int, *, by_head: bool) -> None:
    """Mask all but so many rows of each KV head, or on average of a layer's."""
    for cache, score in zip(sequence.layers, scores, strict=True):
        heads, n = cache.positions.shape
        chosen = np.zeros((heads, n), bool)
        chosen[:, :SINKS] = chosen[:, n - WINDOW :] = True
        between, count = score[:, SINKS:].copy(), rows - SINKS - WINDOW
        least = int(FLOOR * count) if by_head else count
        best = np.argsort(-between, 1)[:, :least]
        np.put_along_axis(chosen, best + SINKS, True, 1)
        if by_head:
            np.put_along_axis(between, best, -np.inf, 1)
            rest = np.argsort(-between, None)[: heads * (count - least)]
            chosen[rest // between.shape[1], rest % between.shape[1] + SINKS] = True
        assert chosen.sum() == heads * rows
        cache.positions = np.where(chosen, cache.positions, NEVER).astype(np.int32)


def paid_again(sequence: ReferenceSequence) -> list[Array]:
    """The most attention paid to each row while what was read is read again, (KV heads, rows) by layer."""
    again, n = deepcopy(sequence, {id(sequence.w): sequence.w}), sequence.n
    again.states(sequence.seen)  # type: ignore[attr-defined]
    positions = np.arange(n, 2 * n, dtype=np.int32)
    found = []
    for cache in again.layers:
        weights: npt.NDArray[np.float64] = _attend(cache.queries[:, -n:], cache, positions, sequence.w.scale)[:, :, :n]
        found.append(weights.max(1).reshape(len(cache.keys), -1, n).max(1))
    return found


def read(weights: Weights, tokens: tuple[int, ...]) -> ReferenceSequence:
    sequence = ReferenceSequence(weights, Budget((), ALL))
    sequence.seen = tokens  # type: ignore[attr-defined]
    sequence.last = sequence.read(tokens)[-1]  # type: ignore[attr-defined]
    return sequence


def answer(model: Model, sequence: ReferenceSequence, question: tuple[int, ...]) -> str:
    """What follows greedily, after a question or at once."""
    logits = sequence.read(question)[-1] if question else sequence.last  # type: ignore[attr-defined]
    said: list[int] = []
    while len(said) < ANSWER_TOKENS and not model.vocab.is_eog(token := int(logits.argmax())):
        said.append(token)
        logits = sequence.read([token])[-1]
    return model.vocab.detokenize(said)


def try_all(model: Model, weights: Weights, needle: Needle, at: int, options: argparse.Namespace) -> dict[Any, bool]:
    """Whether each way answers right: by (name, share, seen or unseen)."""
    right: dict[Any, bool] = {}
    shares = [float(share) for share in options.shares.split(",")]
    for kind, text in (("seen", needle.prompt), ("unseen", needle.prompt[:at])):
        whole = read(weights, text)
        question = needle.prompt[len(text) :]
        paid = paid_again(whole) if kind == "unseen" else None
        right["full", 1.0, kind] = is_correct(needle, answer(model, _copy(whole), question), ())
        for score in SCORES:
            if score == "zip" and paid is None:
                continue
            scores = scores_of(whole, score, paid)
            for share in shares:
                for name, by_head in ((score, False), (f"{score} by heads", True)):
                    sequence = _copy(whole)
                    keep(sequence, scores, max(round(share * len(needle.prompt)), WINDOW + SINKS), by_head=by_head)
                    right[name, share, kind] = is_correct(needle, answer(model, sequence, question), ())
    return right


def _copy(sequence: ReferenceSequence) -> ReferenceSequence:
    return deepcopy(sequence, {id(sequence.w): sequence.w})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--length", type=int, default=1024, help="prompt and answer, in tokens (default: %(default)s)")
    parser.add_argument("--shares", default="0.05,0.12,0.25", help="of the prompt's tokens")
    parser.add_argument("--trials", type=int, default=2, help=f"documents at each of the depths {DEPTHS}")
    parser.add_argument("--facts", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="append the result to this file's list")
    options = parser.parse_args()
    weights = Weights(options.model)
    counts: dict[tuple[str, float], dict[str, Any]] = {}
    with Model(options.model) as model:
        frame = template_frame(model.vocab, model.chat_template)
        writer = TextNeedles(model.vocab, TEXT, frame, Wording(), answer_tokens=ANSWER_TOKENS)
        for needle in grid(writer, [options.length], DEPTHS, [options.facts], options.trials, options.seed):
            found = try_all(model, weights, needle, question_start(model, needle, frame[1]), options)
            for (name, share, kind), is_right in found.items():
                cell = {"policy": name, "share": share, "seen": None, "unseen": None, "trials": 0, "perplexity": None}
                cell = counts.setdefault((name, share), cell)
                cell[kind] = (cell[kind] or 0) + is_right
                cell["trials"] += kind == "unseen"
            print({" ".join(map(str, key)): value for key, value in found.items()}, file=sys.stderr, flush=True)
    result = {
        "benchmark": "kv_studies", "model": options.model.name, "length": options.length, "facts": options.facts,
        "seed": options.seed, "window": WINDOW, "sinks": SINKS, "cells": list(counts.values()),
    }  # fmt: skip
    print(table(result))
    if options.json:
        append(options.json, result)


if __name__ == "__main__":
    main()
