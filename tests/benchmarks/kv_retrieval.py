"""Retrieval by KV budget: how often the reference model still finds a fact after its prompt's rows were evicted.

Documents hide six facts and end with a question about one ("What is the code of Lily's red box?"), so the question was
seen when rows are chosen. An answer is right if all its digits are. Budgets are a share of the prompt's tokens, the
mean over the layers. Prints a table in Markdown; the last line is JSON, --json FILE appends it to that file's list.
Accepted is a pyramid or a uniform SnapKV budget that keeps 95 % of the full cache's retrieval at 12 % of the rows; the
exit status says whether one does.

When this model reads the question it looks at what follows the key in the document ("is"), and at the digits only
later, when it says them: they are one to five tokens further. A pool of 5 reaches 2, so small budgets lose them; the
maximum over 13 holds the whole answer.

usage: convert tests/reference_model ref.gguf --type bf16
       python tests/benchmarks/kv_retrieval.py ref.gguf [--pool 5 --pool-type avg] [--trials 4] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import append

from helpers.kv_library import POOLS, Budget, BudgetContext
from ziggurat.runtime.bindings import Model
from ziggurat.runtime.budget import allocate
from ziggurat.runtime.evaluate.filler import TEXT
from ziggurat.runtime.evaluate.needle import Needle, TextNeedles, Wording, grid
from ziggurat.runtime.evaluate.retrieval import is_correct, template_frame

POLICIES = {
    "pyramid": ("pyramid", "snapkv"),
    "snapkv": ("uniform", "snapkv"),
    "streaming": ("uniform", "recent"),
    "random": ("uniform", "random"),
}
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ANSWER_TOKENS = 24
SINKS = 4


def budget_of(policy: str, share: float, n_prompt: int, n_layer: int, seed: int, how: argparse.Namespace) -> Budget:
    """The rows of each layer for a share of the prompt, summed over the layers without loss."""
    schedule, score = POLICIES[policy]
    total = max(round(share * n_prompt * n_layer), n_layer * (how.window + SINKS))
    rows = allocate(total, n_layer, schedule=schedule, window=how.window, sinks=SINKS, prompt_tokens=n_prompt)
    return Budget(tuple(rows), how.window, SINKS, how.pool, how.pool_type, slack=64, score=score, seed=seed)


def answer(
    model: Model, needle: Needle, budget: Budget | None, threads: int, types: tuple[str, str] = ("f16", "f16")
) -> str:
    """What the model says greedily after the prompt was read in one call."""
    vocab = model.vocab
    options: dict[str, Any] = {"flash": True, "types": types, "ubatch": 512, "threads": threads}
    said: list[int] = []
    with BudgetContext(model.handle, vocab.n_tokens, needle.length, budget, **options) as context:
        logits = context.read(needle.prompt)
        while len(said) < ANSWER_TOKENS:
            token = int(logits[0].argmax())
            if vocab.is_eog(token):
                break
            said.append(token)
            logits = context.read([token])
    return vocab.detokenize(said)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One cell after the other: length, policy, share, accuracy."""
    shares = [float(share) for share in options.shares.split(",")]
    policies = [policy for policy in options.policies.split(",") if policy]
    with Model(options.model) as model:
        frame = template_frame(model.vocab, model.chat_template)
        writer = TextNeedles(model.vocab, TEXT, frame, Wording(), answer_tokens=ANSWER_TOKENS)
        for length in map(int, options.lengths.split(",")):
            needles = list(grid(writer, [length], DEPTHS, [options.facts], options.trials, options.seed))
            cells = [("full", 1.0), *((policy, share) for policy in policies for share in shares)]
            for policy, share in cells:
                begun, right = time.monotonic(), 0
                for trial, needle in enumerate(needles):
                    n_prompt = len(needle.prompt)
                    full = policy == "full"
                    budget = None if full else budget_of(policy, share, n_prompt, model.n_layer, trial, options)
                    right += is_correct(needle, answer(model, needle, budget, options.threads), ())
                yield {"length": length, "policy": policy, "share": share, "right": right, "trials": len(needles)}
                seconds = time.monotonic() - begun
                print(f"{length} {policy} {share:.0%}: {right}/{len(needles)}, {seconds:.0f} s", flush=True)


def accuracy(cells: list[dict[str, Any]], policy: str, share: float | None = None, length: int | None = None) -> float:
    """Share of right answers over the cells that fit; None fits all."""
    some = [
        cell
        for cell in cells
        if cell["policy"] == policy and share in (None, cell["share"]) and length in (None, cell["length"])
    ]
    return sum(cell["right"] for cell in some) / max(sum(cell["trials"] for cell in some), 1)


def table(cells: list[dict[str, Any]]) -> str:
    """Lengths and policies down, shares across, in Markdown."""
    shares = sorted({cell["share"] for cell in cells if cell["policy"] != "full"})
    policies = list(dict.fromkeys(cell["policy"] for cell in cells if cell["policy"] != "full"))
    lines = [
        f"| tokens | policy | {' | '.join(f'{share:.0%}' for share in shares)} | full |",
        "| --- | --- |" + " --- |" * (len(shares) + 1),
    ]
    for length in [*dict.fromkeys(cell["length"] for cell in cells), None]:
        for policy in policies:
            row = [f"{accuracy(cells, policy, share, length):.0%}" for share in shares]
            full = f"{accuracy(cells, 'full', None, length):.0%}"
            lines.append(f"| {length or 'all'} | {policy} | {' | '.join(row)} | {full} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--lengths", default="1024,2048,4096", help="prompt and answer, in tokens")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--shares", default="0.05,0.12,0.25,0.5", help="of the prompt's tokens")
    parser.add_argument("--trials", type=int, default=4, help=f"documents at each of the depths {DEPTHS}")
    parser.add_argument("--window", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--pool", type=int, default=13, help="(default: %(default)s)")
    parser.add_argument("--pool-type", choices=POOLS, default="max", help="(default: %(default)s)")
    parser.add_argument("--facts", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="append the result to this file's list")
    options = parser.parse_args()
    cells = list(measure(options))
    print(table(cells))
    full = accuracy(cells, "full")
    kept = {p: accuracy(cells, p, 0.12) / full for p in ("pyramid", "snapkv") if full and p in options.policies}
    result = {
        "benchmark": "kv_retrieval", "model": options.model.name, "question_seen": True, "facts": options.facts,
        "trials": options.trials * len(DEPTHS), "seed": options.seed, "window": options.window, "sinks": SINKS,
        "pool": options.pool, "pool_type": options.pool_type,
        "full": full, "kept_at_12_percent": kept, "accepted": max(kept.values(), default=0.0) >= 0.95, "cells": cells,
    }  # fmt: skip
    if options.json:
        append(options.json, result)
    print(json.dumps(result))
    return 0 if result["accepted"] else 1


if __name__ == "__main__":
    sys.exit(main())
