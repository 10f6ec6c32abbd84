"""What each way of choosing KV rows keeps of the reference model's abilities, at equal numbers of rows.

Retrieval: documents of the same length hide six facts and end with a question about one; an answer is right if its
first number is the value. The question is *seen* when the prompt is one piece, so that rows are chosen after it was
read, and *unseen* when the document is read first, brought down to its budget, and the question comes as the next turn.
Perplexity: of 256 tokens that follow 1024 of held-out stories, which are brought down to their budget before. Budgets
are a share of the document's tokens (or of the 1024), the mean over the layers; every policy has the same window and
sinks, and so the same bytes of K and V; what else it keeps to score by is in ``kept_bytes``.

A policy is ``score``, or ``score/variant``: ``pooled`` scores are the maximum over 13 positions, as snapkv's are, and
``plain`` ones are not pooled; ``half`` gives half the rows to the latest tokens, as H2O's paper does; ``chunked``
selects after every ubatch of 256 tokens. Prints a table in Markdown; --json FILE appends the result to that file's
list, --table FILE prints the tables of such a file.

usage: convert tests/reference_model ref.gguf --type f16
       python tests/benchmarks/kv_policies.py ref.gguf --texts DIR [--trials 2] [--policies h2o,h2o/half] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kv_retrieval import ANSWER_TOKENS, DEPTHS, SINKS
from results import append

from helpers.kv_library import Budget, BudgetContext
from ziggurat.runtime.bindings import Model
from ziggurat.runtime.budget import POOL, POOL_TYPE, WINDOW, allocate, pool_of
from ziggurat.runtime.evaluate.filler import TEXT
from ziggurat.runtime.evaluate.needle import Needle, TextNeedles, Wording, grid
from ziggurat.runtime.evaluate.retrieval import is_correct, template_frame

POLICIES = ("pyramid", "snapkv", "h2o", "tova", "keydiff", "streaming", "random")
SCORES = {"pyramid": "snapkv", "streaming": "recent"}
VARIANTS = ("pooled", "plain", "half", "chunked")
READ, SCORED = 1024, 256
CHUNK = 256


def budget_of(policy: str, share: float, n_tokens: int, n_layer: int) -> Budget:
    """The rows of each layer for a share of the tokens, summed over the layers without loss."""
    name, _, variant = policy.partition("/")
    if variant and variant not in VARIANTS:
        raise SystemExit(f"there is no variant {variant!r}; take one of {', '.join(VARIANTS)}")
    score = SCORES.get(name, name)
    mean = max(round(share * n_tokens), WINDOW + SINKS)
    window = max(WINDOW, mean // 2) if variant == "half" else WINDOW
    schedule = "pyramid" if name == "pyramid" else "uniform"
    rows = allocate(mean * n_layer, n_layer, schedule=schedule, window=window, sinks=SINKS, prompt_tokens=n_tokens)
    pool = {"pooled": POOL, "plain": 1}.get(variant, pool_of(score))
    prefill = "chunked" if variant == "chunked" else "exact"
    return Budget(tuple(rows), window, SINKS, pool, POOL_TYPE, slack=64, score=score, prefill=prefill)


def opened(model: Model, n_ctx: int, budget: Budget | None, threads: int) -> BudgetContext:
    chunked = budget is not None and budget.prefill == "chunked"
    return BudgetContext(
        model.handle, model.vocab.n_tokens, n_ctx, budget, flash=True, types=("f16", "f16"), batch=n_ctx,
        ubatch=CHUNK if chunked else 512, threads=threads,
    )  # fmt: skip


def answer(model: Model, context: BudgetContext, parts: Sequence[Sequence[int]]) -> str:
    """What the model says greedily after these turns."""
    context.clear()
    said: list[int] = []
    for part in parts:
        logits = context.read(part)
    while len(said) < ANSWER_TOKENS:
        token = int(logits[0].argmax())
        if model.vocab.is_eog(token):
            break
        said.append(token)
        logits = context.read([token])
    return model.vocab.detokenize(said)


def question_start(model: Model, needle: Needle, tail: Sequence[int]) -> int:
    """Where the question begins in a prompt that ends with it."""
    asked = model.vocab.tokenize("\n\n" + Wording().ask(needle.key), add_special=False, parse_special=False)
    end = (*asked, *tail)
    assert needle.prompt[-len(end) :] == end
    return len(needle.prompt) - len(end)


def retrieval(model: Model, options: argparse.Namespace, policy: str, share: float) -> dict[str, Any]:
    """Right answers of one policy and share, the question seen and unseen."""
    frame = template_frame(model.vocab, model.chat_template)
    writer = TextNeedles(model.vocab, TEXT, frame, Wording(), answer_tokens=ANSWER_TOKENS)
    needles = list(grid(writer, [options.length], DEPTHS, [options.facts], options.trials, options.seed))
    n_prompt = len(needles[0].prompt)
    budget = None if policy == "full" else budget_of(policy, share, n_prompt, model.n_layer)
    right = {"seen": 0, "unseen": 0}
    with opened(model, options.length, budget, options.threads) as context:
        layout = context.layout()
        for needle in needles:
            at = question_start(model, needle, frame[1])
            for kind, parts in (("seen", [needle.prompt]), ("unseen", [needle.prompt[:at], needle.prompt[at:]])):
                right[kind] += is_correct(needle, answer(model, context, parts), ())
    names = ("rows_bytes", "position_bytes", "query_bytes", "sum_bytes")
    kept = None if layout is None else {name: getattr(layout, name) for name in names}
    rows = None if budget is None else budget.rows
    return {"seen": right["seen"], "unseen": right["unseen"], "trials": len(needles), "rows": rows, "kept_bytes": kept}


def perplexity(model: Model, options: argparse.Namespace, policy: str, share: float, tokens: Sequence[int]) -> float:
    """Of what follows each prompt, given the rows that were kept of it."""
    budget = None if policy == "full" else budget_of(policy, share, READ, model.n_layer)
    nll = 0.0
    with opened(model, READ + SCORED, budget, options.threads) as context:
        for chunk in range(options.chunks):
            text = tokens[chunk * (READ + SCORED) : (chunk + 1) * (READ + SCORED)]
            context.clear()
            logits = np.concatenate([context.read(text[:READ]), context.read(text[READ:], every=True)[:-1]])
            logits = logits.astype(np.float64)
            top = logits.max(-1)
            log_sum = top + np.log(np.exp(logits - top[:, None]).sum(-1))
            nll += float((log_sum - logits[np.arange(SCORED), text[READ:]]).sum())
    return math.exp(nll / SCORED / options.chunks)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One cell after the other."""
    shares = [float(share) for share in options.shares.split(",")]
    with Model(options.model) as model:
        tokens = story_tokens(model, options) if options.texts else None
        cells = [("full", 1.0), *((policy, share) for share in shares for policy in options.policies.split(","))]
        for policy, share in cells:
            begun = time.monotonic()
            cell = {"policy": policy, "share": share, **retrieval(model, options, policy, share)}
            cell["perplexity"] = perplexity(model, options, policy, share, tokens) if tokens else None
            print({**cell, "seconds": round(time.monotonic() - begun)}, file=sys.stderr, flush=True)
            yield cell


def story_tokens(model: Model, options: argparse.Namespace) -> list[int]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reference_model"))
    from data import STORIES, read_text

    text = read_text(options.texts, STORIES[1], held_out=True)[: 8 * options.chunks * (READ + SCORED)]
    tokens: list[int] = model.vocab.tokenize(text, add_special=True, parse_special=False)
    if len(tokens) < options.chunks * (READ + SCORED):
        raise SystemExit(f"{options.texts}: the held-out stories have only {len(tokens)} tokens")
    return tokens


def table(result: dict[str, Any]) -> str:
    """Policies down; for each share right answers in percent, question seen / unseen, and perplexity."""
    cells = {(cell["policy"], cell["share"]): cell for cell in result["cells"]}
    shares = sorted({share for policy, share in cells if policy != "full"})
    policies = list(dict.fromkeys(policy for policy, _ in cells if policy != "full"))

    def text(cell: dict[str, Any]) -> str:
        counts = (cell["seen"], cell["unseen"])  # None: not measured
        right = " / ".join("–" if count is None else f"{100 * count / cell['trials']:.0f}" for count in counts)
        return right + (f", {cell['perplexity']:.2f}" if cell["perplexity"] else "")

    lines = [f"| rows kept | {' | '.join(f'{share:.0%}' for share in shares)} |", "| --- |" + " --- |" * len(shares)]
    lines += [f"| {name} | {' | '.join(text(cells[name, share]) for share in shares)} |" for name in policies]
    return "\n".join([*lines, f"\nEvery row kept: {text(cells['full', 1.0])}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", metavar="MODEL.gguf")
    parser.add_argument("--texts", type=Path, help="folder of tests/reference_model/README.md's texts; for perplexity")
    parser.add_argument("--length", type=int, default=2048, help="prompt and answer, in tokens (default: %(default)s)")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--shares", default="0.05,0.12,0.25,0.5", help="of the tokens that are read")
    parser.add_argument("--trials", type=int, default=4, help=f"documents at each of the depths {DEPTHS}")
    parser.add_argument("--chunks", type=int, default=8, help="texts of the perplexity (default: %(default)s)")
    parser.add_argument("--facts", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="append the result to this file's list")
    parser.add_argument("--table", type=Path, help="print the tables of this file and measure nothing")
    options = parser.parse_args()
    if options.table:
        print("\n\n".join(table(result) for result in json.loads(options.table.read_text())))
        return
    if options.model is None:
        parser.error("give a MODEL.gguf, or --table FILE")
    result = {
        "benchmark": "kv_policies", "model": options.model.name, "length": options.length, "facts": options.facts,
        "seed": options.seed, "window": WINDOW, "sinks": SINKS, "chunks": options.chunks if options.texts else 0,
        "cells": list(measure(options)),
    }  # fmt: skip
    print(table(result))
    if options.json:
        append(options.json, result)


if __name__ == "__main__":
    main()
