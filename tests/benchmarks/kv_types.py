"""Fewer rows or fewer bits: retrieval and perplexity with rows of each type, at equal bytes.

A budget of --rows F16 rows buys 1.88 times as many in q8_0 and 3.56 times in q4_0. Retrieval is that of kv_retrieval
(the question seen when rows are chosen), perplexity that of `ziggurat eval --text`: the first half of each chunk is
read as a prompt, the second token by token over the rows that stayed; the divergence is that from the first type with
all rows.
Prints a table in Markdown; the last line is JSON, --json FILE appends it to that file's list.

usage: convert tests/reference_model ref.gguf --type f16
       python tests/benchmarks/kv_types.py ref.gguf --texts FOLDER [--rows 40,48] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kv_retrieval import ANSWER_TOKENS, DEPTHS, SINKS, answer
from kv_speed import lengths
from results import append
from texts import held_out_text

from helpers.kv_library import Budget
from ziggurat.runtime.bindings import Model
from ziggurat.runtime.budget import allocate
from ziggurat.runtime.evaluate.filler import TEXT
from ziggurat.runtime.evaluate.needle import Needle, TextNeedles, Wording, grid
from ziggurat.runtime.evaluate.retrieval import is_correct, template_frame
from ziggurat.runtime.plan.kv import row_bytes

Figures = dict[str, Any]
WINDOW, POOL = 32, 13


def pair(kind: str) -> tuple[str, str]:
    """Types of K and V, one for both or two with a colon between."""
    key, _, value = kind.partition(":")
    return key, value or key


def rows_for(rows: int, kind: str) -> int:
    """Rows of this type that take the bytes of so many in F16."""
    block = 32
    return rows * 2 * row_bytes(block, "f16") // sum(row_bytes(block, name) for name in pair(kind))


def retrieved(model: Model, needles: list[Needle], rows: int | None, kind: str, threads: int) -> int:
    """How many questions are answered rightly over so many rows on average; None: all of them."""
    right = 0
    for needle in needles:
        budget = None
        if rows is not None:
            n_prompt, n_layer = len(needle.prompt), model.n_layer
            per_layer = allocate(rows * n_layer, n_layer, window=WINDOW, sinks=SINKS, prompt_tokens=n_prompt)
            budget = Budget(tuple(per_layer), WINDOW, SINKS, POOL, "max", slack=64)
        right += is_correct(needle, answer(model, needle, budget, threads, pair(kind)), ())
    return right


def perplexity(options: argparse.Namespace, text: Path, rows: int | None, kind: str) -> Figures:
    """What ``ziggurat eval`` says, against the logits that the first call leaves beside the text."""
    logits = text.with_suffix(".logits")
    command = ["eval", str(options.model), "--text", str(text)]
    command += ["--against" if logits.exists() else "--save-logits", str(logits)]
    command += ["--ctx", str(options.ctx), "--threads", str(options.threads)]
    command += [part for side, name in zip("kv", pair(kind), strict=True) for part in (f"--cache-type-{side}", name)]
    if rows is not None:
        command += ["--kv-budget", str(rows)]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run(
            [sys.executable, "-m", "ziggurat.runtime", *command, "--json", str(report)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        found = json.loads(report.read_text())
    return {name: found.get(name) for name in ("perplexity", "kl_divergence", "top1_agreement", "tokens")}


def table(cells: list[Figures]) -> str:
    """Bytes down, types across: right answers and perplexity."""
    kinds = list(dict.fromkeys(cell["type"] for cell in cells))
    lines = [f"| F16 rows | {' | '.join(kinds)} |", "| --- |" + " --- |" * len(kinds)]
    for rows in dict.fromkeys(cell["f16_rows"] for cell in cells):
        row = [cell for cell in cells if cell["f16_rows"] == rows]
        text = [
            f"{cell['rows'] or 'all'}: {cell['right'] / cell['trials']:.0%}, {cell['perplexity']:.2f}" for cell in row
        ]
        lines.append(f"| {rows or 'all'} | {' | '.join(text)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--texts", type=Path, required=True, help="folder of the texts that benchmarks use")
    parser.add_argument("--rows", type=lengths, default=[40, 48], help="in F16 (default: %(default)s)")
    parser.add_argument("--types", type=lambda text: text.split(","), default=["f16", "q8_0", "q4_0"])
    parser.add_argument("--length", type=int, default=2048, help="of documents, in tokens (default: %(default)s)")
    parser.add_argument("--ctx", type=int, default=2048, help="of the text's chunks, in tokens (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=4, help=f"documents at each of the depths {DEPTHS}")
    parser.add_argument("--facts", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="append the result to this file's list")
    options = parser.parse_args()
    cells: list[Figures] = []
    with tempfile.TemporaryDirectory() as folder, Model(options.model) as model:
        text = Path(folder) / "held-out.txt"
        text.write_text(held_out_text(options.texts), encoding="utf-8")
        frame = template_frame(model.vocab, model.chat_template)
        writer = TextNeedles(model.vocab, TEXT, frame, Wording(), answer_tokens=ANSWER_TOKENS)
        needles = list(grid(writer, [options.length], DEPTHS, [options.facts], options.trials, options.seed))
        for f16_rows in (None, *options.rows):
            for kind in options.types:
                rows = None if f16_rows is None else rows_for(f16_rows, kind)
                cell: Figures = {"type": kind, "f16_rows": f16_rows, "rows": rows}
                cell |= {"right": retrieved(model, needles, rows, kind, options.threads), "trials": len(needles)}
                cell |= perplexity(options, text, rows, kind)
                print(json.dumps(cell), flush=True)
                cells.append(cell)
    print(table(cells))
    result = {
        "benchmark": "kv_types", "model": options.model.name, "question_seen": True, "facts": options.facts,
        "length": options.length, "ctx": options.ctx, "seed": options.seed, "schedule": "pyramid", "score": "snapkv",
        "window": WINDOW, "sinks": SINKS, "pool": POOL, "pool_type": "max", "cells": cells,
    }  # fmt: skip
    if options.json:
        append(options.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
