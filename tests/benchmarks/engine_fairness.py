"""What short streams feel of a long prompt that is read beside them, and a short request that arrives meanwhile.

--streams streams decode. Undisturbed gaps between two tokens of each are noted, as its consumer sees them; then a
prompt of --long tokens comes, and the gaps until its first token are noted; in the middle of it comes a short request
of --prompt tokens, whose time to its first token is compared with that beside the streams alone, and with that in an
idle engine. A chunk is one call of the library that reads a part of a prompt: a step of a prompt where there is a KV
budget, and otherwise a batch with more tokens than streams. The bound is three undisturbed gaps (median) and one chunk
(p95). The long prompt is read alone as well, in the idle engine. Every prompt is another one, so that nothing is
reused. Each of --rows is a KV budget, a pyramid of so many rows on average; 0 is none.

The model is --model, or a random one of a 0.3B Llama's shape in Q4_0, made in --work unless it is there. The last line
is JSON; --json FILE appends it to that file's list.

usage: python tests/benchmarks/engine_fairness.py --work FOLDER [--threads 2] [--long 10240] [--rows 1024,0]
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any

from engine_streams import Calls, Listener, library_calls, percentile, pyramid, request, spread
from kv_speed import lengths, ready_model
from results import append

from ziggurat.runtime.engine.llama_engine import EngineSettings, LlamaEngine

Figures = dict[str, Any]
SHORT = 8  # tokens of the short request's answer


class Run:
    """An engine and what is measured in it; every request has a seed of its own."""

    def __init__(self, engine: LlamaEngine, calls: Calls, options: argparse.Namespace) -> None:
        self._engine, self._calls, self._options = engine, calls, options
        self._seeds = count(1)

    def _start(self, length: int, max_tokens: int) -> Listener:
        return Listener(self._engine, request(length, max_tokens, next(self._seeds)))

    def alone(self, length: int) -> float:
        """Seconds to the first token in the idle engine."""
        listener = self._start(length, 1)
        listener.end()
        return listener.first

    def short(self) -> float:
        """Seconds to the first token of a short request, now."""
        listener = self._start(self._options.prompt, SHORT)
        listener.end()
        return listener.first

    def round(self) -> Figures:
        """Streams undisturbed, with a short request, and beside a long prompt; lists of seconds."""
        options = self._options
        streams = [self._start(options.prompt, options.ctx) for _ in range(options.streams)]
        try:
            begun = max(listener.until(options.steps // 8) for listener in streams)
            counts = [len(listener.times) + options.steps for listener in streams]
            quiet = max(listener.until(count) for listener, count in zip(streams, counts, strict=True))
            short = self.short()
            long = self._start(options.long, 2)
            timer = threading.Thread(target=self._in_the_middle, args=(long,))
            timer.start()
            first = long.until(1)
            timer.join()
            long.end()
            gaps = [gap for listener in streams for gap in listener.gaps(long.submitted, first)]
            undisturbed = [gap for listener in streams for gap in listener.gaps(begun, quiet)]
        finally:
            for listener in streams:
                listener.cancel()
            for listener in streams:
                listener.end()
        return {
            "quiet": undisturbed, "gaps": gaps, "short_beside_streams": short, "short_beside_prompt": self._meanwhile,
            "long": long.first, "chunks": self._chunks(long.submitted, first),
        }  # fmt: skip

    def _in_the_middle(self, long: Listener) -> None:
        while (self._engine.stats().prompt_progress or 0) < 0.3 and not long.times:
            time.sleep(0.02)
        self._meanwhile = None if long.times else self.short()

    def _chunks(self, begin: float, end: float) -> list[float]:
        calls = list(self._calls.between(begin, end))
        steps = [call.seconds for call in calls if call.name == "kv_prompt_step"]
        most = self._options.streams + 1
        return steps or [call.seconds for call in calls if call.name == "llama_decode" and call.tokens > most]


def measure(options: argparse.Namespace, rows: int | None) -> Figures:
    """One budget."""
    settings = EngineSettings(
        n_ctx=options.ctx, parallel=options.streams + 2, threads=options.threads, flash_attention="on",
        kv=pyramid(rows),
    )  # fmt: skip
    with library_calls() as calls, LlamaEngine(options.model, settings) as engine:
        engine.load()
        run = Run(engine, calls, options)
        run.alone(64)
        alone_short = [run.alone(options.prompt) for _ in range(5)]
        alone, rounds = [run.alone(options.long)], []
        for _ in range(options.rounds):
            rounds.append(run.round())
            alone.append(run.alone(options.long))
    quiet, gaps, chunks = ([value for each in rounds for value in each[name]] for name in ("quiet", "gaps", "chunks"))
    chunk = percentile(chunks, 0.95)
    bound = 3 * statistics.median(quiet) + chunk
    together = [each["long"] for each in rounds]
    return {
        "rows": rows, "undisturbed": spread(quiet), "reading": spread(gaps), "chunk": spread(chunks), "bound_s": bound,
        "p95_within": percentile(gaps, 0.95) <= bound, "p99_within": percentile(gaps, 0.99) <= bound,
        "share_within": sum(gap <= bound for gap in gaps) / len(gaps),
        "long_alone_s": alone, "long_beside_s": together,
        "long_ratio": statistics.median(together) / statistics.median(alone),
        "short_alone_s": statistics.median(alone_short),
        "short_beside_streams_s": [each["short_beside_streams"] for each in rounds],
        "short_beside_prompt_s": [each["short_beside_prompt"] for each in rounds],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the random model")
    parser.add_argument("--model", type=Path, metavar="GGUF", help="another model")
    parser.add_argument("--rows", type=lengths, default=[1024, 0], metavar="ROWS,…")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of short ones (default: %(default)s)")
    parser.add_argument("--long", type=int, default=10240, help="tokens of the long one (default: %(default)s)")
    parser.add_argument("--ctx", type=int, default=10752, help="tokens (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="undisturbed tokens of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="append the result to this file's list")
    options = parser.parse_args()
    if options.model is None and options.work is None:
        parser.error("give --work or --model")
    options.model = options.model or ready_model(options)
    result: Figures = {
        "benchmark": "engine_fairness", "model": options.model.name, "threads": options.threads, "long": options.long,
        "streams": options.streams, "prompt": options.prompt, "rounds": options.rounds, "runs": [],
    }  # fmt: skip
    for rows in options.rows:
        result["runs"].append(measure(options, rows or None))
        print(json.dumps(result["runs"][-1]), flush=True)
    if options.json:
        append(options.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
