"""Total decode rate of the engine against llama.cpp's llama-batched-bench, with 1, 2, 4 and 8 streams.

Both read a prompt of --prompt tokens for every stream and then generate; same file, threads, context per stream, flash
attention and F16 rows, each stream with rows of its own. The engine's streams are consumed by a thread each, chosen
greedily, and measured over the last --generate steps of the one that ends first, in which all of them decode. Its first
streams are some tokens ahead by then: llama-batched-bench's prompts are longer by as many as they may be. It chooses no
tokens, it decodes random ones. A side is measured between two of the other's (ABBA); medians of the pairs' ratios,
above 1 the engine is faster. --noise runs llama-batched-bench on both sides. With --parallel the engine has more
sequences than streams: the library computes together only those whose numbers follow each other.

The model is --model, or a random one of a 0.3B Llama's shape in Q4_0, made in --work unless it is there. The last line
is JSON; --json FILE appends it to that file's list.

usage: python tests/benchmarks/engine_rate.py --bench LLAMA-BATCHED-BENCH --work FOLDER [--threads 1] [--pairs 6]
"""

from __future__ import annotations

import argparse
import json
from itertools import count
from pathlib import Path
from typing import Any

from commands import run
from engine_streams import Listener, pyramid, request
from kv_speed import interleaved, lengths, ready_model
from results import append

from ziggurat.runtime.engine.llama_engine import EngineSettings, LlamaEngine

Figures = dict[str, Any]
N_CTX = 512


def ahead(streams: int) -> int:
    """Tokens that the first streams may have generated when the last one's prompt is read."""
    return 8 * (streams - 1) + 1


def bench_seconds(options: argparse.Namespace, streams: int) -> float:
    """Seconds for a token of llama-batched-bench, whose batch has a token of every stream."""
    found = run(
        options.bench, "-m", options.model, "-c", N_CTX * streams, "-b", 2048, "-ub", 512,
        "-npp", options.prompt + ahead(streams), "-ntg", options.generate, "-npl", streams,
        "-t", options.threads, "-tb", options.threads, "-fa", "on", "-ctk", "f16", "-ctv", "f16", "--no-kv-unified",
        "--output-format", "jsonl",
    )  # fmt: skip
    lines = [json.loads(line) for line in found.splitlines() if line.startswith("{")]
    return 1 / float(lines[0]["speed_tg"])


def engine_seconds(engine: LlamaEngine, options: argparse.Namespace, streams: int, seed: int) -> float:
    """Seconds for a token of the engine."""
    most = options.generate + ahead(streams)
    listeners = [
        Listener(engine, request(options.prompt, most, 1000 * seed + stream)) for stream in range(streams)
    ]  # fmt: skip
    for listener in listeners:
        listener.end()
    times = min((listener.times for listener in listeners), key=lambda times: times[-1])
    begin = times[-1 - options.generate]
    late = sum(listener.times[0] > begin for listener in listeners)
    if late:
        raise SystemExit(f"{late} of {streams} streams began later than the measurement: give more tokens")
    return (times[-1] - begin) / options.generate / streams


def level(options: argparse.Namespace, streams: int) -> Figures:
    """Rates in tokens per second and ratios."""
    settings = EngineSettings(
        n_ctx=N_CTX, parallel=options.parallel or streams, threads=options.threads, flash_attention="on",
        kv=pyramid(options.rows),
    )  # fmt: skip
    seeds = count(1)
    with LlamaEngine(options.model, settings) as engine:
        engine.load()

        def bench() -> float:
            return bench_seconds(options, streams)

        def ours() -> float:
            return bench() if options.noise else engine_seconds(engine, options, streams, next(seeds))

        ours()
        figures = interleaved(bench, ours, options.pairs)
    rates = {"bench_rate": 1 / figures.pop("stock_s"), "engine_rate": 1 / figures.pop("ours_s")}
    figures = {"streams": streams, "parallel": settings.parallel, **rates, **figures}
    print(json.dumps(figures), flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, required=True, help="llama-batched-bench, of the same source tree")
    parser.add_argument("--work", type=Path, help="folder for the random model")
    parser.add_argument("--model", type=Path, metavar="GGUF", help="another model")
    parser.add_argument("--streams", type=lengths, default=[1, 2, 4, 8], metavar="N,…")
    parser.add_argument("--parallel", type=int, help="sequences of the engine (default: as many as streams)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=6, help="for each number of streams (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens (default: %(default)s)")
    parser.add_argument("--generate", type=int, default=64, help="tokens (default: %(default)s)")
    parser.add_argument("--rows", type=int, help="give the engine a KV budget")
    parser.add_argument("--noise", action="store_true", help="llama-batched-bench on both sides")
    parser.add_argument("--json", type=Path, help="append the result to this file's list")
    options = parser.parse_args()
    if options.model is None and options.work is None:
        parser.error("give --work or --model")
    options.model = options.model or ready_model(options)
    result = {
        "benchmark": "engine_rate", "model": options.model.name, "threads": options.threads, "noise": options.noise,
        "rows": options.rows, "prompt": options.prompt, "generate": options.generate, "n_ctx": N_CTX,
        "levels": [level(options, streams) for streams in options.streams],
    }  # fmt: skip
    if options.json:
        append(options.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
