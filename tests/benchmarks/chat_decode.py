"""Tokens per second in the chat against `ziggurat run`: the same model, prompt, threads and number of tokens.

    python tests/benchmarks/chat_decode.py MODEL.gguf [--tokens 3000] [--threads 1] [--rounds 3] [--json FILE]

The chat is the whole app on a screen of 120x40, whose escape sequences are made and thrown away, with its server in a
process of its own. Both are greedy, and take turns: run, chat, chat, run. The chat's rate is that of the tokens that
come after its first text, until the answer is whole, by the chat's clock. Beside it stand the engine's own rate in that
server, the part of a core that the chat's process takes, and how many seconds more than the engine's decoding pass
from Enter to the end (``besides_s``: the prompt, the request, the screen). ``chat_to_run`` is the median of the rounds'
ratios, ``best_to_best`` compares the fastest of each, which others on the machine disturb least. The last line is JSON;
--json appends it to a list.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from drawing import Drawing
from results import append

import ziggurat.tui.app
from ziggurat.tui.app import ChatApp
from ziggurat.tui.backend import ModelSetup, Sampling
from ziggurat.tui.collector import spare_the_screen
from ziggurat.tui.local import LocalHost
from ziggurat.tui.parts import ChatParts
from ziggurat.tui.session import Session
from ziggurat.tui.session_events import Finished, Grew, SessionEvent

CTX = 4096


class Chat(Drawing, ChatApp):
    """The chat, drawn."""

    CSS_PATH = str(Path(ziggurat.tui.app.__file__).with_name("ziggurat.tcss"))


def run(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Generate with the command."""
    stats = folder / "stats.json"
    arguments = ["run", str(options.model), options.prompt, "-n", options.tokens, "--temp", 0, "--ctx", CTX]
    command = [sys.executable, "-m", "ziggurat.runtime", *arguments, "--threads", options.threads, "--stats", stats]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    found = json.loads(stats.read_text())
    return {"rate": found["decode_tokens_per_second"], "tokens": found["generated_tokens"]}


async def chat(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Generate in the chat."""
    session = Session(sampling=Sampling(temperature=0.0, max_tokens=options.tokens))
    host = LocalHost([], folder / "server.log")
    setup = ModelSetup(options.model.absolute(), ctx=CTX, threads=options.threads)
    app = Chat(ChatParts(session, host=host, setup=setup, log_file=folder / "chat.log"))
    first: list[tuple[float, int]] = []  # when the first text came, of how many tokens
    done: list[tuple[float, Finished]] = []

    def listen(event: SessionEvent) -> None:
        if isinstance(event, Grew) and not first:
            first.append((time.perf_counter(), session.figures().tokens))
        elif isinstance(event, Finished):
            done.append((time.perf_counter(), event))

    async with app.run_test(size=(120, 40)) as pilot:
        while session.backend is None or app.chat.loader.loading:
            await asyncio.sleep(0.1)
        await pilot.pause(1)
        session.listen(listen)
        app.frames.clear()
        cpu, start = time.process_time(), time.perf_counter()
        app.chat.send(options.prompt)
        while not done:
            await asyncio.sleep(0.05)
            if session.error is not None:
                raise session.error
        cpu, frames = time.process_time() - cpu, len(app.frames)
        await app.action_quit()
    (begin, at_once), (end, event) = first[0], done[0]
    usage, timings = event.message.usage, event.message.timings
    assert usage is not None and timings is not None
    seconds = end - begin
    return {
        "rate": (usage.generated_tokens - at_once) / seconds,
        "tokens": usage.generated_tokens,
        "engine_rate": timings.decode_tokens_per_second,
        "frames_per_second": frames / seconds,
        "cpu_share": cpu / (end - start),
        "besides_s": end - start - (usage.generated_tokens - 1) / timings.decode_tokens_per_second,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--prompt", default="Tell me a long story")
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    spare_the_screen()
    found: dict[str, list[dict[str, float]]] = {"run": [], "chat": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for which in ("run", "chat", "chat", "run"):
                figures = run(options, Path(folder)) if which == "run" else asyncio.run(chat(options, Path(folder)))
                found[which].append(figures)
                print(which, json.dumps({name: round(value, 3) for name, value in figures.items()}), flush=True)
    result: dict[str, Any] = {
        "benchmark": "chat_decode", "model": options.model.name, "tokens": options.tokens, "threads": options.threads,
        "cores": len(os.sched_getaffinity(0)), "rounds": options.rounds,
    }  # fmt: skip
    for which, all_figures in found.items():
        for name in all_figures[0]:
            result[f"{which}_{name}"] = round(statistics.median(figures[name] for figures in all_figures), 3)
    rates = {which: [figures["rate"] for figures in all_figures] for which, all_figures in found.items()}
    rounds = [
        sum(rates["chat"][at : at + 2]) / sum(rates["run"][at : at + 2]) for at in range(0, 2 * options.rounds, 2)
    ]
    result["chat_to_run"] = round(statistics.median(rounds), 3)
    result["best_to_best"] = round(max(rates["chat"]) / max(rates["run"]), 3)
    if options.json:
        append(options.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
