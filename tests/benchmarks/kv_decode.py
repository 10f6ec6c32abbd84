"""Decode rate with a KV budget, at depths and row types, between two limits of the same library without one.

Three contexts decode single tokens in turns (in one order, then in the other):

    full     all rows of the prompt, in F16 (a cache without a budget at its best) and in the types of --full
    budget   what --rows per layer on average (a pyramid) keep of it, in each of --types
    short    no budget, all rows of a prompt as long as --rows, in each of --types: what a budget could reach at most

The prompt of the first is not read token by token: as many as --fill are, and their rows are then multiplied, each
copy moved to positions of its own (llama_memory_seq_add), into one sequence whose state the measured context takes;
the third takes the state of the first ones. The second reads twice as many tokens as it has rows on average, so that
every layer is full. Slack fills while it is measured, and selections, when it is full, count. Reported: seconds for a
token, medians, and of each round's ratios

    against_full     full in F16 / budget: above 1 the budget is faster
    against_own      full in the budget's type / budget, where --full has it
    against_short    short / budget: 1 would be all that there is to gain

and the bytes of KV that the library has allocated, with a budget also what of them stays after a prompt. The last line
is JSON; --json FILE appends it to that file's list.

A type is that of K and V, or two with a colon between (q8_0:q4_0).

usage: python tests/benchmarks/kv_decode.py --model 0.3b.gguf --depths 4096,12288,32768 [--types f16,q8_0] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kv_speed import lengths
from results import append

from helpers.kv_library import Budget, BudgetContext, BudgetModel
from helpers.kv_models import tokens

Figures = dict[str, Any]
ROOM = 1024  # tokens that a measurement may generate
UBATCH = 512


def context(
    model: BudgetModel,
    n_ctx: int,
    options: argparse.Namespace,
    budget: Budget | None = None,
    kind: str = "f16",
    **more: Any,
) -> BudgetContext:
    """A context as all of this benchmark are."""
    batch = None if budget else min(2048, n_ctx)
    key, _, value = kind.partition(":")
    types = (key, value or key)
    return model.context(
        n_ctx, budget, ubatch=UBATCH, batch=batch, flash=True, types=types, threads=options.threads, **more
    )


def read(into: BudgetContext, length: int) -> None:
    """Read so many random tokens, in batches of upstream's size."""
    prompt = tokens(length)
    for start in range(0, length, 2048):
        into.read(prompt[start : start + 2048])


def read_state(model: BudgetModel, options: argparse.Namespace, fill: int, kind: str) -> bytes:
    """The state of a sequence of so many tokens, read once for all that start with it."""
    if (fill, kind) not in options.read:
        with context(model, fill, options, None, kind) as single:
            read(single, fill)
            options.read[fill, kind] = single.saved(0)
    state: bytes = options.read[fill, kind]
    return state


def filled_state(model: BudgetModel, options: argparse.Namespace, depth: int, kind: str) -> bytes:
    """The state of a sequence of ``depth`` tokens, of which the first ``--fill`` were read and the rest are copies."""
    fill = min(options.fill, depth)
    copies = depth // fill
    if copies * fill != depth:
        raise SystemExit(f"a depth of {depth} is no multiple of {fill} tokens: choose another --fill or --depths")
    first = read_state(model, options, fill, kind)
    with context(model, (depth + 256) // copies + 256, options, None, kind, n_seq=copies, unified=True) as wide:
        wide.restore(first, 0)
        for copy in range(1, copies):
            wide.restore(first, copy)
            wide.shift(copy, 0, -1, copy * fill)
            wide.copy(copy, 0)
            wide.remove(copy)
        # keys stay turned as they were, since not every type can be turned again: rates do not depend on it
        return wide.saved(0)


def budget_of(options: argparse.Namespace, n_layer: int, depth: int) -> Budget:
    from ziggurat.runtime.budget import allocate

    rows = allocate(options.rows * n_layer, n_layer, window=32, sinks=4, prompt_tokens=depth)
    return Budget(tuple(rows), window=32, sinks=4, pool=5, slack=64, n_copies=0)


def kv_bytes(of: BudgetContext) -> int:
    from ziggurat.runtime.bindings.memory import measure

    return sum(row.context for row in measure(of))  # type: ignore[arg-type]  # it asks for the handle alone


def kept_bytes(of: BudgetContext) -> int:
    """Of them what stays after a prompt: not the room in which one is read."""
    layout = of.layout()
    assert layout is not None
    return int(layout.rows_bytes + layout.position_bytes + layout.query_bytes)


def seconds(of: BudgetContext, steps: int) -> float:
    """For one token."""
    begun = time.perf_counter()
    for _ in range(steps):
        of.read([7])
    return (time.perf_counter() - begun) / steps


def at_depth(model: BudgetModel, options: argparse.Namespace, depth: int) -> list[Figures]:
    """One figure for each type."""
    with ExitStack() as stack:
        sides = {}
        for kind in dict.fromkeys(("f16", *options.full)):
            full = sides[f"full {kind}"] = stack.enter_context(context(model, depth + ROOM, options, None, kind))
            full.restore(filled_state(model, options, depth, kind), 0)
        budget = budget_of(options, model.n_layer, depth)
        for kind in options.types:
            ours = sides[f"budget {kind}"] = stack.enter_context(context(model, depth + ROOM, options, budget, kind))
            ours.read(tokens(min(2 * options.rows, depth)))
            short = stack.enter_context(context(model, options.rows + ROOM, options, None, kind))
            short.restore(filled_state(model, options, options.rows, kind), 0)
            sides[f"short {kind}"] = short
        bytes_of = {name: kv_bytes(side) for name, side in sides.items()}
        kept_of = {kind: kept_bytes(sides[f"budget {kind}"]) for kind in options.types}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for side in sides.values():
            seconds(side, 2)
        for turn in range(options.rounds):
            for name in list(sides)[:: -1 if turn % 2 else 1]:
                times[name].append(seconds(sides[name], options.steps))
            for name, side in sides.items():  # back to where they were, so that the depth stays the depth
                if not name.startswith("budget"):
                    side.remove(0, depth if name.startswith("full") else options.rows)
    found = []
    for kind in options.types:
        ours = times[f"budget {kind}"]
        figures: Figures = {"depth": depth, "rows": options.rows, "type": kind, "threads": options.threads}
        figures["budget_kept_bytes"] = kept_of[kind]
        others = {"full": "full f16", "own": f"full {kind}", "short": f"short {kind}"}
        others = {key: name for key, name in others.items() if name in sides}
        for key, name in {**others, "budget": f"budget {kind}"}.items():
            figures[f"{key}_s"] = statistics.median(times[name])
            figures[f"{key}_kv_bytes"] = bytes_of[name]
        for key, name in others.items():
            ratios = sorted(a / b for a, b in zip(times[name], ours, strict=True))
            figures[f"against_{key}"] = statistics.median(ratios)
            figures[f"against_{key}_quartiles"] = [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]]
        found.append(figures)
        print(json.dumps(figures), file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="GGUF")
    parser.add_argument("--depths", type=lengths, default=[4096, 12288, 32768], metavar="N,…")
    parser.add_argument("--types", type=lambda text: text.split(","), default=["f16", "q8_0"], metavar="TYPE,…")
    parser.add_argument("--full", type=lambda text: text.split(","), default=[], metavar="TYPE,…")
    parser.add_argument("--rows", type=int, default=1024, help="mean over the layers (default: %(default)s)")
    parser.add_argument("--fill", type=int, default=1024, help="tokens that are read (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4, help="tokens in a turn (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="append the result to this file's list")
    options = parser.parse_args()
    options.read = {}
    with BudgetModel(options.model) as model:
        runs = [figures for depth in options.depths for figures in at_depth(model, options, depth)]
    result = {"benchmark": "kv_decode", "model": options.model.name, "rounds": options.rounds, "runs": runs}
    if options.json:
        append(options.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
