"""What conversations that go on feel of a KV budget: while a long prompt is read, and when they never end.

Parts, chosen by flags:

    --gap 12288       the time between two tokens of 4 decoding sequences, undisturbed and while a prompt of that length
                      is read for a fifth, one step of it (a ubatch in one layer) before each of their tokens, or as
                      many as fit into --spend seconds; against it the same prompt read with nobody else, in one call.
                      Interleaved, as often as --rounds says.
    --endless 10000   so many tokens of 4 sequences on a budget of --endless-rows: resident memory and buffers on the
                      way, and how many sequences selected in one step at most

The model is --model, or a random one of a 0.3B Llama's shape in Q4_0, made in --work unless it is there. The budget is
a pyramid of --rows on average. Times are in seconds, of the clock, or with --cpu-time of this process, which a busy
machine changes less; with one thread they are the same on an idle one. The last line is JSON; --json FILE appends it to
that file's list.

usage: python tests/benchmarks/kv_gap.py --work FOLDER --gap 12288 [--threads 1] [--spend 0.6] [--rounds 2] [--cpu-time]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kv_speed import UBATCH, ready_model
from results import append

from helpers.kv_library import Budget, BudgetContext, BudgetModel, Part
from helpers.kv_models import tokens
from ziggurat.runtime.bindings.memory import measure
from ziggurat.runtime.budget import allocate

DECODING = 4
Figures = dict[str, Any]


def make(model: BudgetModel, rows: int, n_ctx: int, n_seq: int, threads: int) -> BudgetContext:
    """A context with a pyramid of so many rows on average."""
    kept = allocate(rows * model.n_layer, model.n_layer, window=32, sinks=4, prompt_tokens=n_ctx)
    budget = Budget(tuple(kept), window=32, sinks=4, pool=13, pool_type="max", slack=64)
    return model.context(n_ctx, budget, n_seq=n_seq, ubatch=UBATCH, flash=True, types=("f16", "f16"), threads=threads)


class Clock:
    """The one that times are taken from: of the wall, or of this process."""

    now = staticmethod(time.perf_counter)


def step(context: BudgetContext) -> float:
    """One token of every decoding sequence; return when it was there."""
    context.decode(*(Part(sequence, [7 + sequence]) for sequence in range(DECODING)))
    return Clock.now()


def gaps_undisturbed(context: BudgetContext, count: int) -> list[float]:
    ends = [step(context) for _ in range(count + 1)]
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


def read_alone(context: BudgetContext, prompt: list[int]) -> float:
    """Seconds for a prompt in one call."""
    context.remove(DECODING)
    begun = Clock.now()
    context.read(prompt, DECODING)
    return Clock.now() - begun


def read_beside(context: BudgetContext, prompt: list[int], spend: float) -> tuple[list[float], list[float]]:
    """A prompt in steps, and a token of the others when so many seconds are spent; return gaps, and steps' seconds."""
    context.remove(DECODING)
    context.begin(prompt, DECODING)
    gaps, steps, finished = [], [], False
    last = step(context)
    while not finished:
        spent = 0.0
        while not finished and (spent == 0 or spent + steps[-1] <= spend):
            begun = Clock.now()
            finished = bool(context.step(DECODING).finished)
            steps.append(Clock.now() - begun)
            spent += steps[-1]
        now = step(context)
        gaps.append(now - last)
        last = now
    return gaps, steps


def p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1))]


def gap(model: BudgetModel, options: argparse.Namespace) -> Figures:
    """See the module. A round is quiet, beside, alone, and the next one the other way round."""
    prompt = tokens(options.gap)
    quiet: list[float] = []
    gaps: list[float] = []
    steps: list[float] = []
    rounds: list[tuple[float, float, float]] = []
    with make(model, options.rows, options.gap, DECODING + 1, options.threads) as context:
        for sequence in range(DECODING):
            context.read(tokens(2048, sequence), sequence)
        gaps_undisturbed(context, 10)
        for turn in range(options.rounds):
            quiet += gaps_undisturbed(context, options.steps)
            alone = read_alone(context, prompt) if turn % 2 else 0.0
            begun = Clock.now()
            own_gaps, own_steps = read_beside(context, prompt, options.spend)
            wall = Clock.now() - begun
            alone = alone or read_alone(context, prompt)
            rounds.append((alone, sum(own_steps), wall))
            print(json.dumps({"alone": alone, "steps": sum(own_steps), "wall": wall, "p95": p95(own_gaps)}), flush=True)
            gaps += own_gaps
            steps += own_steps
    undisturbed = statistics.median(quiet)
    bound = 3 * undisturbed + p95(steps)
    return {
        "part": "gap", "tokens": options.gap, "decoding": DECODING, "rows": options.rows, "threads": options.threads,
        "cpu_time": options.cpu_time, "spend_s": options.spend, "rounds": options.rounds,
        "steps": len(steps) // options.rounds,
        "undisturbed_gap_median_s": undisturbed, "undisturbed_gap_p95_s": p95(quiet),
        "gap_median_s": statistics.median(gaps), "gap_p95_s": p95(gaps), "gap_max_s": max(gaps),
        "step_median_s": statistics.median(steps), "step_p95_s": p95(steps),
        "gap_bound_s": bound, "gap_within": p95(gaps) <= bound,
        "alone_s": [alone for alone, _, _ in rounds], "beside_steps_s": [own for _, own, _ in rounds],
        "beside_wall_s": [wall for _, _, wall in rounds],
        "prefill_ratio": statistics.median(own / alone for alone, own, _ in rounds),
        "wall_ratio": statistics.median(wall / alone for alone, _, wall in rounds),
    }  # fmt: skip


def resident(kind: str = "VmRSS") -> int:
    """Bytes of this process in memory, or those of another line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {kind}")


def endless(model: BudgetModel, options: argparse.Namespace) -> Figures:
    """Generate and look at memory ten times on the way."""
    marks, together, selections = [], 0, 0
    with make(model, options.endless_rows, 1024, DECODING, options.threads) as context:
        for sequence in range(DECODING):
            context.read(tokens(1000, sequence), sequence)
        rows = [context.rows(sequence) for sequence in range(DECODING)]
        begun = Clock.now()
        for count in range(1, options.endless + 1):
            step(context)
            before, rows = rows, [context.rows(sequence) for sequence in range(DECODING)]
            selected = sum(max(now) < max(then) for now, then in zip(rows, before, strict=True))
            together, selections = max(together, selected), selections + selected
            if count % (options.endless // 10) == 0:
                buffers = measure(context)  # type: ignore[arg-type]  # it asks for the handle alone
                marks.append((resident(), sum(b.context for b in buffers), sum(b.compute for b in buffers)))
                print(json.dumps({"tokens": count, "resident": marks[-1][0]}), flush=True)
        seconds = Clock.now() - begun
        layout = context.layout()
    assert layout is not None
    return {
        "part": "endless", "tokens": options.endless, "decoding": DECODING, "rows": options.endless_rows,
        "threads": options.threads, "seconds": seconds, "selections": selections, "selections_in_a_step": together,
        "rows_bytes": layout.rows_bytes, "resident": [mark[0] for mark in marks],
        "kv_bytes": sorted({mark[1] for mark in marks}), "compute_bytes": sorted({mark[2] for mark in marks}),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the random model")
    parser.add_argument("--model", type=Path, metavar="GGUF", help="another model")
    parser.add_argument("--gap", type=int, metavar="TOKENS")
    parser.add_argument("--endless", type=int, metavar="TOKENS")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="times of this process")
    parser.add_argument("--rows", type=int, default=1024, help="mean over the layers (default: %(default)s)")
    parser.add_argument("--endless-rows", type=int, default=256, help="the same, of --endless (default: %(default)s)")
    parser.add_argument("--spend", type=float, default=0.0, help="seconds of steps between two tokens, one at least")
    parser.add_argument("--rounds", type=int, default=2, help="of --gap (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="undisturbed tokens of a round (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="append the result to this file's list")
    options = parser.parse_args()
    if options.model is None and options.work is None:
        parser.error("give --work or --model")
    if options.cpu_time:
        Clock.now = staticmethod(time.process_time)
    result: Figures = {"benchmark": "kv_gap", "runs": []}
    with BudgetModel(options.model or ready_model(options)) as model:
        for asked, run in ((options.gap, gap), (options.endless, endless)):
            if asked:
                result["runs"].append(run(model, options))
                print(json.dumps(result["runs"][-1]), flush=True)
    if options.json:
        append(options.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
