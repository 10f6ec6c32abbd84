"""What the engine's Python costs in a decode step, by number of sequences.

A step is the time from one end of llama_decode to the next, in the window in which all streams decode. The library's
functions are replaced by ones that note the clock and the thread's own CPU time before and after, which costs about a
microsecond a call and is counted as Python's. Of the engine's thread, as a share of the step's wall time:

    python   what is not inside the library's functions, by the clock; on a busy machine also what others took
    cpu      the same in the thread's CPU time: without what it waited for
    waiting  wall time less CPU time in calls other than llama_decode: after a call the thread waits for the interpreter
             while a consumer holds it (each stream has one, in a thread of its own)

The model is --model, or a random one of a 1B Llama's shape in Q4_0, made in --work unless it is there. --functions
prints seconds by library function, --profile where Python's time goes (cProfile of the engine's thread, which costs
much time itself). The last line is JSON; --json FILE appends it to that file's list.

usage: python tests/benchmarks/engine_cost.py --work FOLDER [--threads 2] [--streams 1,2,4,8,16,32] [--rows 256]
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import pstats
import statistics
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine_streams import Call, Calls, Listener, library_calls, pyramid, request
from kv_speed import lengths, ready_model
from results import append

from ziggurat.runtime.engine.llama_engine import EngineSettings, LlamaEngine

Figures = dict[str, Any]


def shares(calls: list[Call], streams: int) -> Figures:
    """Of the steps between the decodes of whole batches."""
    ends = [index for index, call in enumerate(calls) if call.name == "llama_decode"]
    walls, outside, outside_cpu, waiting = [], [], [], []
    for before, after in zip(ends, ends[1:], strict=False):
        if calls[before].tokens != streams or calls[after].tokens != streams:
            continue
        last, inner = calls[before], calls[before + 1 : after + 1]
        wall = inner[-1].end - last.end
        cpu = (inner[-1].thread_begin + inner[-1].cpu) - (last.thread_begin + last.cpu)
        walls.append(wall)
        outside.append(wall - sum(call.seconds for call in inner))
        outside_cpu.append(cpu - sum(call.cpu for call in inner))
        waiting.append(sum(call.seconds - call.cpu for call in inner[:-1]))
    if not walls:
        raise SystemExit(f"no two neighbouring steps of {streams} sequences")
    return {
        "steps": len(walls), "step_s": statistics.median(walls), "python_s": statistics.median(outside),
        "cpu_s": statistics.median(outside_cpu),
        "calls": round(sum(b - a for a, b in zip(ends, ends[1:], strict=False)) / max(1, len(ends) - 1), 1),
        "python": sum(outside) / sum(walls), "cpu": sum(outside_cpu) / sum(walls),
        "waiting": sum(waiting) / sum(walls),
    }  # fmt: skip


def level(engine: LlamaEngine, calls: Calls, options: argparse.Namespace, streams: int) -> Figures:
    """The steps in which so many streams decode."""
    calls.made.clear()
    most = options.generate + 2 * streams
    listeners = [Listener(engine, request(options.prompt, most, 100 * streams + n)) for n in range(streams)]
    begin = max(listener.until(1) for listener in listeners)
    end = min(listener.until(most) for listener in listeners)
    for listener in listeners:
        listener.end()
    made = list(calls.between(begin, end))
    figures = {"streams": streams, **shares(made, streams)}
    print(json.dumps(figures), flush=True)
    if options.functions:
        seconds: Counter[str] = Counter()
        for call in made:
            seconds[call.name] += call.seconds
        print(json.dumps({name: round(value / figures["steps"] * 1e6, 1) for name, value in seconds.most_common(8)}))
    return figures


@contextlib.contextmanager
def profiled(on: bool) -> Iterator[None]:
    """Profile the threads called after the engine's that start in here, and print where their time went."""
    if not on:
        yield
        return
    profile, run = cProfile.Profile(), threading.Thread.run

    def call(thread: threading.Thread) -> None:
        if thread.name.startswith("ziggurat"):
            profile.runcall(run, thread)
        else:
            run(thread)

    threading.Thread.run = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        threading.Thread.run = run  # type: ignore[method-assign]
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)


def measure(options: argparse.Namespace) -> list[Figures]:
    settings = EngineSettings(
        n_ctx=options.ctx, parallel=max(options.streams), threads=options.threads, flash_attention="on",
        kv=pyramid(options.rows),
    )  # fmt: skip
    with library_calls() as calls, profiled(options.profile), LlamaEngine(options.model, settings) as engine:
        engine.load()
        return [level(engine, calls, options, streams) for streams in options.streams]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the random model")
    parser.add_argument("--model", type=Path, metavar="GGUF", help="another model")
    parser.add_argument("--streams", type=lengths, default=[1, 2, 4, 8, 16, 32], metavar="N,…")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=32, help="tokens (default: %(default)s)")
    parser.add_argument("--generate", type=int, default=32, help="tokens (default: %(default)s)")
    parser.add_argument("--ctx", type=int, default=512, help="tokens (default: %(default)s)")
    parser.add_argument("--rows", type=int, help="a KV budget")
    parser.add_argument("--functions", action="store_true", help="microseconds in a step by library function")
    parser.add_argument("--profile", action="store_true", help="where Python's time goes")
    parser.add_argument("--json", type=Path, help="append the result to this file's list")
    options = parser.parse_args()
    if options.model is None and options.work is None:
        parser.error("give --work or --model")
    options.model = options.model or ready_model(options, "1b")
    result = {
        "benchmark": "engine_cost", "model": options.model.name, "threads": options.threads, "rows": options.rows,
        "prompt": options.prompt, "generate": options.generate, "profiled": options.profile, "levels": measure(options),
    }  # fmt: skip
    if options.json:
        append(options.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
