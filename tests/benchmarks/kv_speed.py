"""Speed and memory of a KV budget against the same library without one, at its best: F16 rows and flash attention.

Parts, chosen by flags, so that each takes minutes; sides are interleaved (ABBA) and medians of paired ratios reported:

    --decode 4096,12288     ms for a token when a prompt of that length was read, and the ratio
    --prefill 2048,8192     the exact prefill's rate over the other's
    --memory 16384          bytes of KV and compute for 1 and 4 sequences of that many tokens, nothing is computed
    --off PYTHON            prefill and decode without a budget against the library of another interpreter (unpatched)
    --noise                 instead of a budget none: both sides alike, what the ratios vary by

The model is random, of a 0.3B Llama's shape in Q4_0, made in --work unless it is there. The budget is a pyramid of
--rows on average. The last line is JSON; --json FILE appends it to that file's list.

usage: python tests/benchmarks/kv_speed.py --work FOLDER --decode 4096 [--threads 1,2] [--rows 1024] [--pairs 10]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import append

from helpers.kv_library import Budget, BudgetContext, BudgetModel
from helpers.kv_models import tokens

UBATCH = 512
Figures = dict[str, Any]


class Side:
    """One of the two: a context that reads prompts and computes single tokens, timed."""

    def __init__(self, context: BudgetContext) -> None:
        self._context = context

    def fill(self, length: int) -> float:
        """Read a prompt of random tokens into the emptied context; return seconds."""
        self._context.clear()
        prompt = tokens(length)
        begun = time.perf_counter()
        self._context.read(prompt)
        return time.perf_counter() - begun

    def steps(self, count: int) -> float:
        """Compute tokens one by one; return seconds for one."""
        begun = time.perf_counter()
        for _ in range(count):
            self._context.read([7])
        return (time.perf_counter() - begun) / count


class RemoteSide:
    """A side without budget in another interpreter's library."""

    def __init__(self, python: Path, model: Path, n_ctx: int, threads: int) -> None:
        command = [str(python), __file__, "--serve", str(model), str(n_ctx), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def fill(self, length: int) -> float:
        return self._ask(f"fill {length}")

    def steps(self, count: int) -> float:
        return self._ask(f"steps {count}")

    def _ask(self, question: str) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(question, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("the other interpreter ended: has it llama_cpp and numpy?")
        return float(answer)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def serve(model: str, n_ctx: str, threads: str) -> None:
    """Answer a RemoteSide."""
    with BudgetModel(Path(model)) as loaded, make(loaded, int(n_ctx), None, int(threads)) as context:
        side = Side(context)
        for line in sys.stdin:
            name, number = line.split()
            print(getattr(side, name)(int(number)), flush=True)


def make(model: BudgetModel, n_ctx: int, budget: Budget | None, threads: int, n_seq: int = 1) -> BudgetContext:
    """A context of this benchmark. Without a budget its batches are of upstream's size."""
    batch = None if budget else min(2048, n_ctx)
    return model.context(
        n_ctx, budget, n_seq=n_seq, ubatch=UBATCH, batch=batch, flash=True, types=("f16", "f16"), threads=threads
    )


class Chunked(Side):
    """Reads prompts in batches of upstream's size, since its context takes no larger ones."""

    def fill(self, length: int) -> float:
        self._context.clear()
        prompt = tokens(length)
        begun = time.perf_counter()
        for start in range(0, length, 2048):
            self._context.read(prompt[start : start + 2048])
        return time.perf_counter() - begun


def interleaved(first: Callable[[], float], second: Callable[[], float], pairs: int) -> Figures:
    """Measure both in the order ABBA; return medians, and those of the pairs' ratios first / second."""
    times: list[tuple[float, float]] = []
    for pair in range(pairs):
        if pair % 2:
            b = second()
            times.append((first(), b))
        else:
            a = first()
            times.append((a, second()))
    ratios = [a / b for a, b in times]
    return {
        "stock_s": statistics.median(a for a, _ in times), "ours_s": statistics.median(b for _, b in times),
        "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios), "pairs": pairs,
    }  # fmt: skip


def budget_of(options: argparse.Namespace, n_layer: int, n_prompt: int) -> Budget | None:
    from ziggurat.runtime.budget import allocate

    if options.noise:
        return None
    rows = allocate(options.rows * n_layer, n_layer, window=32, sinks=4, prompt_tokens=n_prompt)
    return Budget(tuple(rows), window=32, sinks=4, pool=5, slack=64)


@contextlib.contextmanager
def sides(
    model: BudgetModel, options: argparse.Namespace, n_ctx: int, length: int, threads: int
) -> Iterator[tuple[Side, Side]]:
    """Without budget, and with."""
    budget = budget_of(options, model.n_layer, length)
    with make(model, n_ctx, None, threads) as stock, make(model, n_ctx, budget, threads) as ours:
        yield Chunked(stock), Side(ours) if budget else Chunked(ours)


def decode(model: BudgetModel, options: argparse.Namespace, length: int, threads: int) -> Figures:
    """Steps after a prompt that each side read once."""
    with sides(model, options, length + 4 * options.pairs * options.steps, length, threads) as (stock, ours):
        filled = stock.fill(length), ours.fill(length)
        stock.steps(2), ours.steps(2)
        figures = interleaved(lambda: stock.steps(options.steps), lambda: ours.steps(options.steps), options.pairs)
    return {**figures, "prefill_stock_s": filled[0], "prefill_ours_s": filled[1]}


def prefill(model: BudgetModel, options: argparse.Namespace, length: int, threads: int) -> Figures:
    """Whole prompts; a ratio above 1 means that ours is faster."""
    with sides(model, options, length, length, threads) as (stock, ours):
        stock.fill(UBATCH), ours.fill(UBATCH)
        return interleaved(lambda: stock.fill(length), lambda: ours.fill(length), options.fills)


def off(model: BudgetModel, options: argparse.Namespace, length: int, threads: int) -> Figures:
    """No budget here, the other interpreter's library there."""
    n_ctx = length + 4 * options.pairs * options.steps
    other = RemoteSide(options.off, options.model, n_ctx, threads)
    try:
        with make(model, n_ctx, None, threads) as context:
            ours = Side(context)
            ours.fill(64), other.fill(64)
            read = interleaved(lambda: other.fill(length), lambda: ours.fill(length), options.fills)
            step = interleaved(lambda: other.steps(options.steps), lambda: ours.steps(options.steps), options.pairs)
    finally:
        other.close()
    return {"prefill": read, "decode": step}


def memory(model: BudgetModel, options: argparse.Namespace, length: int) -> Figures:
    """Bytes of KV and compute, as the library counts them."""
    from ziggurat.runtime.bindings.memory import measure

    figures: Figures = {}
    for n_seq in (1, 4):
        budgets = (None, budget_of(options, model.n_layer, length))
        for name, budget in zip(("stock", "ours"), budgets, strict=True):
            if budget is not None and n_seq == 1:
                budget = replace(budget, n_copies=0)  # one prompt in an empty cache, which is how run reads it
            with make(model, length, budget, 1, n_seq) as context:
                rows = measure(context)  # type: ignore[arg-type]  # it asks for the handle alone
                figures[f"{name}_kv_{n_seq}"] = sum(row.context for row in rows)
                figures[f"{name}_compute_{n_seq}"] = sum(row.compute for row in rows)
        both = {name: figures[f"{name}_kv_{n_seq}"] + figures[f"{name}_compute_{n_seq}"] for name in ("stock", "ours")}
        figures[f"share_{n_seq}"] = both["ours"] / both["stock"]
    return figures


def ready_model(options: argparse.Namespace, shape: str = "0.3b") -> Path:
    """The model of --work, made if it is not there."""
    from random_model import write_model

    path = Path(options.work / f"{shape}-q4_0.gguf")
    if not path.exists():
        options.work.mkdir(parents=True, exist_ok=True)
        write_model(options.work / shape, shape)
        command = ["-m", "ziggurat.converter", str(options.work / shape), str(path), "--type", "q4_0"]
        command += ["--no-awq", "--no-imatrix"]
        subprocess.run([sys.executable, *command], check=True)
    return path


def lengths(text: str) -> list[int]:
    return [int(length) for length in text.split(",") if length]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model")
    for part in ("decode", "prefill", "memory"):
        parser.add_argument(f"--{part}", type=lengths, default=[], metavar="TOKENS,…")
    parser.add_argument("--off", type=Path, metavar="PYTHON", help="an interpreter with another llama_cpp")
    parser.add_argument("--noise", action="store_true", help="no budget on either side")
    parser.add_argument("--threads", type=lengths, default=[1], metavar="N,…")
    parser.add_argument("--rows", type=int, default=1024, help="mean over the layers (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=20, help="of decode steps (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="tokens of a decode step (default: %(default)s)")
    parser.add_argument("--fills", type=int, default=4, help="pairs of prompts (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="append the result to this file's list")
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:5])
        return
    options = arguments()
    options.model = ready_model(options)
    result: Figures = {"benchmark": "kv_speed", "rows": options.rows, "noise": options.noise, "runs": []}
    with BudgetModel(options.model) as model:
        jobs = [("decode", decode, n, t) for n in options.decode for t in options.threads]
        jobs += [("prefill", prefill, n, t) for n in options.prefill for t in options.threads]
        jobs += [("off", off, 2048, t) for t in options.threads if options.off]
        for name, run, length, threads in jobs:
            figures = {"part": name, "tokens": length, "threads": threads, **run(model, options, length, threads)}
            print(json.dumps(figures), flush=True)
            result["runs"].append(figures)
        for length in options.memory:
            result["runs"].append({"part": "memory", "tokens": length, **memory(model, options, length)})
            print(json.dumps(result["runs"][-1]), flush=True)
    if options.json:
        append(options.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
