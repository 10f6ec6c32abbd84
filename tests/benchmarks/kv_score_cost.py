"""What a score costs while a prompt is read: its time over that of snapkv with the same rows.

h2o adds up the attention of all queries, whose products flash attention does not show and which are computed again; the
others come once, when the prompt is whole. Both sides have a uniform budget and one thread, and are interleaved
(ABBA); the figure is the median of the pairs' ratios of that thread's processor time, which other processes disturb
less. The model is random, of a 0.3B Llama's shape in Q4_0, by default with 4 of its 24 layers: they cost alike, and
what is outside of them hardly counts. The last line is JSON; --json FILE appends it to that list.

usage: python tests/benchmarks/kv_score_cost.py --work FOLDER [--lengths 4096,12288] [--scores h2o] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kv_speed import UBATCH, Figures, interleaved, make
from random_model import write_model
from results import append

from helpers.kv_library import Budget, BudgetContext, BudgetModel
from helpers.kv_models import tokens

SHAPE = "0.3b"


def ready_model(work: Path, layers: int) -> Path:
    """The model of so many layers in --work, made if it is not there."""
    path = work / f"{SHAPE}-{layers}-q4_0.gguf"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        write_model(work / f"{SHAPE}-{layers}", SHAPE, layers)
        command = ["-m", "ziggurat.converter", str(work / f"{SHAPE}-{layers}"), str(path), "--type", "q4_0"]
        subprocess.run([sys.executable, *command, "--no-awq", "--no-imatrix"], check=True)
    return path


def fill(context: BudgetContext, length: int) -> float:
    """Read a prompt of random tokens into the emptied context; return this thread's seconds."""
    context.clear()
    prompt = tokens(length)
    begun = time.thread_time()
    context.read(prompt)
    return time.thread_time() - begun


def cost(model: BudgetModel, options: argparse.Namespace, score: str, length: int) -> Figures:
    """Processor seconds of both for a prompt, and their ratio."""
    base = Budget((options.rows,) * model.n_layer, window=32, sinks=4, pool=13, pool_type="max", slack=64)
    other = replace(base, score=score, pool=1)
    with make(model, length, base, 1) as first, make(model, length, other, 1) as second:
        for context in (first, second):
            fill(context, UBATCH)
        found = interleaved(lambda: fill(second, length), lambda: fill(first, length), options.fills)
    return {
        "score": score, "tokens": length, "score_s": found["stock_s"], "snapkv_s": found["ours_s"],
        **{name: found[name] for name in ("ratio", "ratio_min", "ratio_max", "pairs")},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model")
    parser.add_argument("--lengths", default="4096,12288", help="of prompts (default: %(default)s)")
    parser.add_argument("--scores", default="h2o", help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=1024, help="of each layer (default: %(default)s)")
    parser.add_argument("--fills", type=int, default=3, help="pairs of prompts (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="append the result to this file's list")
    options = parser.parse_args()
    result: Figures = {
        "benchmark": "kv_score_cost", "shape": SHAPE, "layers": options.layers, "rows": options.rows,
        "runs": [],
    }  # fmt: skip
    with BudgetModel(ready_model(options.work, options.layers)) as model:
        for length in map(int, options.lengths.split(",")):
            for score in options.scores.split(","):
                result["runs"].append(cost(model, options, score, length))
                print(json.dumps(result["runs"][-1]), flush=True)
    if options.json:
        append(options.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
