"""Whether an engine's memory stays flat and within the plan, over many requests and over many loads.

Parts, chosen by flags:

    --requests 2000   short requests of random lengths from eight callers, a third with a beginning that others have
                      too, a fourth cancelled (at once, or after some tokens), on a KV budget of --rows: resident memory
                      and the library's buffers after every --mark of them, when none runs, and the peak
                      against the planner's bytes for the same context
    --loads 100       so many times an engine that is made, loaded, asked one question and closed

Bytes of the process: ``resident`` all that is in memory, with the mapped file's pages; ``anonymous`` without them. The
plan's ``total`` counts the weights, its ``fixed`` only those that the library holds in an order of its own; Python, the
library's own objects and its threads' scratch memory are in neither. Figures of the process are above what it had
before it loaded the model. The last line is JSON; --json FILE appends it to that file's list.

usage: convert tests/reference_model ref.gguf --type f16
       python tests/benchmarks/engine_memory.py ref.gguf [--requests 2000] [--loads 100]
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine_streams import pyramid, request
from kv_gap import resident
from results import append

from ziggurat.runtime.bindings import Context, library, measure
from ziggurat.runtime.engine import EngineStats
from ziggurat.runtime.engine.llama_engine import EngineSettings, LlamaEngine
from ziggurat.runtime.plan import open_planner

Figures = dict[str, Any]
CALLERS, PARALLEL = 8, 4
SHARED, BEGINNING = 4, 32  # beginnings that some requests share, and their tokens


class Peak:
    """The most anonymous memory that was seen while this was open; looks fifty times a second."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            self.bytes = max(self.bytes, resident("RssAnon"))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()


def settings_of(options: argparse.Namespace) -> EngineSettings:
    return EngineSettings(
        n_ctx=options.ctx, parallel=PARALLEL, cached=PARALLEL, threads=options.threads, flash_attention="on",
        kv=pyramid(options.rows or None),
    )  # fmt: skip


def ask(engine: LlamaEngine, seed: int, longest: int) -> None:
    """One request, the same for the same seed."""
    rng = random.Random(seed)
    asked = request(rng.randint(1, longest // 2), rng.randint(1, 24), seed)
    if rng.random() < 1 / 3 and asked.tokens:
        start = request(BEGINNING, 1, rng.randrange(SHARED)).tokens or ()
        asked = replace(asked, tokens=(*start, *asked.tokens))
    cancelled = rng.choice((0, 1, 8)) if rng.random() < 0.25 else None
    stream = engine.stream(asked)
    if cancelled == 0:
        stream.cancel()
    for count, _event in enumerate(stream, 1):
        if count == cancelled:
            stream.cancel()


def the_context() -> Context:
    """The engine's."""
    found = [thing for thing in gc.get_objects() if isinstance(thing, Context)]
    if len(found) != 1:
        raise SystemExit(f"there are {len(found)} contexts")
    return found[0]


def many_requests(options: argparse.Namespace) -> Figures:
    """See the module; ``first`` and ``last`` are means of marks."""
    library.api()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = {kind: resident(kind) for kind in ("VmRSS", "RssAnon")}
    marks: list[Figures] = []
    with LlamaEngine(options.model, settings_of(options)) as engine, Peak() as peak:
        engine.load()
        context = the_context()
        with ThreadPoolExecutor(CALLERS) as callers:
            for start in range(0, options.requests, options.mark):
                seeds = range(start, min(start + options.mark, options.requests))
                list(callers.map(lambda seed: ask(engine, seed, options.ctx - 32), seeds))
                marks.append(mark(context, before, seeds.stop))
                print(json.dumps(marks[-1]), flush=True)
        stats, settings = engine.stats(), context.settings
        del context
    with open_planner(options.model, gpu_layers=0) as planner:
        planned = planner.plan(settings)
    with open_planner(options.model, gpu_layers=0, ask_library=False) as planner:
        estimated = planner.plan(settings)
    few = min(max(1, 200 // options.mark), len(marks))
    first, last = marks[few - 1], marks[-1]
    anonymous = peak.bytes - before["RssAnon"]
    return {
        "part": "requests", "rows": options.rows, "ctx": options.ctx, "sequences": settings.n_seq_max,
        **counters(stats), "marks": marks,
        "growth_bytes": last["anonymous"] - first["anonymous"],
        "second_half_growth_bytes": last["anonymous"] - marks[len(marks) // 2 - 1]["anonymous"],
        "buffers_flat": len({(m["context"], m["compute"]) for m in marks}) == 1,
        "planned": {
            "context": planned.context, "compute": planned.compute, "output": planned.output,
            "weights": planned.weights, "total": planned.total, "fixed": planned.host.fixed,
        },
        "estimated": {"context": estimated.context, "compute": estimated.compute, "total": estimated.total},
        "buffers_within_plan": last["context"] <= planned.context and last["compute"] <= planned.compute,
        "peak_resident": resident("VmHWM") - before["VmRSS"], "peak_anonymous": anonymous,
        "beyond_fixed": anonymous - planned.host.fixed,
    }  # fmt: skip


def counters(stats: EngineStats) -> Figures:
    names = ("finished", "cancelled", "failed", "prompt_tokens", "reused_tokens", "generated_tokens", "evicted_rows")
    return {name: getattr(stats, name) for name in (*names, "kv_bytes_allocated", "kv_bytes_planned")}


def mark(context: Context, before: dict[str, int], requests: int) -> Figures:
    buffers = measure(context)
    return {
        "requests": requests, "resident": resident() - before["VmRSS"],
        "anonymous": resident("RssAnon") - before["RssAnon"],
        "context": sum(buffer.context for buffer in buffers), "compute": sum(buffer.compute for buffer in buffers),
    }  # fmt: skip


def many_loads(options: argparse.Namespace) -> Figures:
    """Memory when no model is loaded."""

    def sizes() -> Iterator[int]:
        for _ in range(options.loads):
            with LlamaEngine(options.model, settings_of(options)) as engine:
                engine.load()
                list(engine.stream(request(options.ctx // 2, 4, 1)))
            gc.collect()
            yield resident("RssAnon")

    found = list(sizes())
    tenth = max(1, options.loads // 10)
    return {
        "part": "loads", "loads": options.loads, "anonymous": found[tenth - 1 :: tenth],
        "growth_bytes": found[-1] - found[tenth - 1],
        "growth_per_load": (found[-1] - found[tenth - 1]) / max(1, options.loads - tenth),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--requests", type=int)
    parser.add_argument("--mark", type=int, default=100, help="requests between two looks (default: %(default)s)")
    parser.add_argument("--loads", type=int)
    parser.add_argument("--rows", type=int, default=128, help="the KV budget, 0 for none (default: %(default)s)")
    parser.add_argument("--ctx", type=int, default=1024, help="tokens (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="append the result to this file's list")
    options = parser.parse_args()
    result: Figures = {"benchmark": "engine_memory", "model": options.model.name, "runs": []}
    for asked, run in ((options.requests, many_requests), (options.loads, many_loads)):
        if asked:
            result["runs"].append(run(options))
            print(json.dumps(result["runs"][-1]), flush=True)
    if options.json:
        append(options.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
