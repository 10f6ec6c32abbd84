"""Rates and delays of `ziggurat serve` against the servers of llama.cpp and llama-cpp-python.

1, 2, 4 and 8 clients in a closed loop stream completions (/v1/completions, greedy, the end ignored, --generate tokens)
of prompts of --prompts random tokens, so that nothing of one can be reused for another. All servers have the same
model, threads, context for each conversation, ubatch (512), flash attention, F16 rows, and as many places as there are
clients. Measured, over a round of --requests for each client:

    rate        generated tokens per second from the first request to the last one's end, so prompts' reading included
    total_rate  the same with the prompts' tokens
    first_s     time to first token, median and 95th percentile
    gap_s       time between tokens, median and 95th percentile
    decode_rate generated tokens per second while all clients are at their first answers' tokens; none if never

Servers wait, idle, while another is measured; rounds go through them forth and back (ABBA). Medians over the rounds,
and of each round's ratio to the first llama-server, above 1 the server's rate is better. A server that cannot be
started is reported. Servers: ziggurat, ziggurat with --kv-budget of each of --budgets, and those whose programs are
named:

    --llama-server PATH     of the same source tree; with a unified and with a split KV cache
    --peer-python PYTHON    an interpreter with unpatched llama-cpp-python, for llama_cpp.server and the example:
                            python -m venv PEER
                            PEER/bin/pip install 'llama-cpp-python[server]==0.3.36' openai safetensors websockets
    --example PATH          examples/server/server.py of llama-cpp-python's source archive

The model is --model, or a random one of a 0.3B Llama's shape in Q4_0, made in --work unless it is there. The last line
is JSON; --json FILE appends it to that file's list.

usage: python tests/benchmarks/server_rate.py --work FOLDER --llama-server PATH [--prompts 32,4096] [--clients 1,8]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

from kv_speed import lengths, ready_model
from results import append
from server_peers import (
    HOST,
    Load,
    Peer,
    PeerFailed,
    Running,
    example_server,
    llama_cpp_server,
    llama_server,
    ziggurat,
)
from sse_client import Answer, closed_loop

Figures = dict[str, Any]
BASE = "llama-server split"
WORDS = ("the", "a", "o", "l", "r", "s", "w")


def with_text(model: Path) -> Path:
    """A copy of the random model in which every token has a text: else its streams have no events to measure.

    Most of its vocabulary fills it up, and llama.cpp shows nothing for tokens of the type unused.
    """
    from gguf import GGUFReader, TokenType

    copy = model.with_name(f"{model.stem}-text.gguf")
    if not copy.exists():
        part = copy.with_suffix(".part")
        shutil.copy(model, part)
        types = GGUFReader(part, "r+").fields["tokenizer.ggml.token_type"]
        for index in types.data:
            if types.parts[index][0] == TokenType.UNUSED:
                types.parts[index][0] = TokenType.NORMAL
        part.rename(copy)
    return copy


def prompt(tokens: int, seed: int) -> str:
    """Random words, of which the random model's tokenizer makes a token each; it begins every text with one more."""
    return " ".join(random.Random(seed).choices(WORDS, k=tokens - 1))


def percentile(values: list[float], share: float) -> float:
    """The value below which ``share`` of them are."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def decode_rate(streams: list[list[Answer]]) -> float | None:
    """Tokens per second of the time in which all clients are between the first and the last token of their first."""
    begin = max(answers[0].times[0] for answers in streams)
    end = min(answers[0].times[-1] for answers in streams)
    seen = sum(begin < moment <= end for answers in streams for moment in answers[0].times)
    return seen / (end - begin) if seen >= 4 * len(streams) else None


def figures_of(streams: list[list[Answer]], tokens: int, generate: int) -> Figures:
    """Of one round. Raises ValueError if an answer has not as many tokens as asked for."""
    answers = [answer for found in streams for answer in found]
    if any((answer.tokens or generate) != generate for answer in answers):
        raise ValueError(f"{[answer.tokens for answer in answers]} tokens instead of {generate} each")
    seconds = max(a.events[-1][0] for a in answers) - min(a.sent for a in answers)
    prompts = sum(a.prompt_tokens or tokens for a in answers)  # some do not tell
    made = len(answers) * generate
    firsts = [a.times[0] - a.sent for a in answers]
    gaps = [b - a for each in answers for a, b in zip(each.times, each.times[1:], strict=False)]
    figures = {
        "rate": made / seconds, "total_rate": (made + prompts) / seconds,
        "first_s": statistics.median(firsts), "first_p95_s": percentile(firsts, 0.95),
        "gap_s": statistics.median(gaps), "gap_p95_s": percentile(gaps, 0.95), "decode_rate": decode_rate(streams),
        "prompt_tokens": prompts / len(answers), "events": sum(len(a.times) for a in answers) / len(answers),
    }  # fmt: skip
    return figures


def measure(server: Running, options: argparse.Namespace, tokens: int, clients: int, seeds: Iterator[int]) -> Figures:
    """One round. Raises PeerFailed."""

    def body(length: int, generate: int) -> Figures:
        fields = {"max_tokens": generate, "temperature": 0.0, "stream": True}
        return {**fields, **server.peer.fields, "prompt": prompt(length, next(seeds))}

    requests = [[body(tokens, options.generate) for _ in range(options.requests)] for _ in range(clients)]
    try:
        closed_loop(HOST, server.port, [[body(32, 2)]])  # what a first request costs is not measured
        return figures_of(closed_loop(HOST, server.port, requests), tokens, options.generate)
    except (OSError, EOFError, ValueError) as error:
        raise PeerFailed(f"{server.peer.name}: {type(error).__name__}: {error}; {server.log()}") from None


def summary(rounds: dict[str, list[Figures]], base: str) -> Figures:
    """Medians of each server's rounds, and of the ratios to the other in the same round."""
    found: Figures = {}
    for name, figures in rounds.items():
        medians: Figures = {}
        for key in figures[0]:
            values = [each[key] for each in figures if each[key] is not None]
            medians[key] = statistics.median(values) if values else None
        if base in rounds:
            ratios = [a["rate"] / b["rate"] for a, b in zip(figures, rounds[base], strict=True)]
            medians |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
        found[name] = medians
    return found


def level(options: argparse.Namespace, tokens: int, clients: int, seeds: Iterator[int]) -> Figures:
    """All servers with prompts of one length and a number of clients."""
    n_ctx = -(-(tokens + options.generate + 64) // 256) * 256
    load = Load(options.model, clients, n_ctx, options.threads)
    rounds: dict[str, list[Figures]] = {}
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        running = []
        for peer in options.peers:
            try:
                running.append(Running(peer, load))
                stack.callback(running[-1].close)
                rounds[peer.name] = []
            except PeerFailed as error:
                failed[peer.name] = str(error)
        for turn in range(options.rounds):
            for server in running[:: -1 if turn % 2 else 1]:
                name = server.peer.name
                if name in failed:
                    continue
                try:
                    rounds[name].append(measure(server, options, tokens, clients, seeds))
                    told = {key: value and round(value, 4) for key, value in rounds[name][-1].items()}
                    print(tokens, clients, name, json.dumps(told), file=sys.stderr, flush=True)
                except PeerFailed as error:
                    failed[name] = str(error)
                    del rounds[name]
    for text in failed.values():
        print(f"not measured: {text}", file=sys.stderr, flush=True)
    figures = {
        "prompt": tokens, "clients": clients, "n_ctx": n_ctx, "servers": summary(rounds, options.base),
        "failed": failed,
    }  # fmt: skip
    print(json.dumps(figures), flush=True)
    return figures


def peers(options: argparse.Namespace) -> list[Peer]:
    """The servers that were asked for."""
    found = [ziggurat("ziggurat")]
    found += [ziggurat(f"ziggurat {rows}", "--kv-budget", rows) for rows in options.budgets]
    if options.llama_server:
        found.append(llama_server(options.llama_server, BASE, "--no-kv-unified"))
        found.append(llama_server(options.llama_server, "llama-server unified", "--kv-unified"))
    if options.peer_python:
        found.append(llama_cpp_server(options.peer_python))
    if options.peer_python and options.example:
        found.append(example_server(options.peer_python, options.example, "example unified", unified=True))
        found.append(example_server(options.peer_python, options.example, "example split", unified=False))
    return [peer for peer in found if not options.only or peer.name in options.only]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", type=Path, metavar="PATH")
    parser.add_argument("--peer-python", type=Path, metavar="PYTHON")
    parser.add_argument("--example", type=Path, metavar="PATH")
    parser.add_argument("--only", action="append", metavar="NAME", help="of the servers; may be repeated")
    parser.add_argument("--work", type=Path, help="folder for the random model")
    parser.add_argument("--model", type=Path, metavar="GGUF", help="another model")
    parser.add_argument("--prompts", type=lengths, default=[32, 4096], metavar="N,…", help="tokens (default: 32,4096)")
    parser.add_argument("--clients", type=lengths, default=[1, 2, 4, 8], metavar="N,…")
    parser.add_argument("--budgets", type=lengths, default=[1024], metavar="N,…", help="rows (default: 1024)")
    parser.add_argument("--generate", type=int, default=64, help="tokens (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=2, help="of each client in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--base", default=BASE, help="server whose rates the ratios are to (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="append the result to this file's list")
    options = parser.parse_args()
    if options.model is None and options.work is None:
        parser.error("give --work or --model")
    options.model = with_text(options.model or ready_model(options))
    options.peers = peers(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends the servers as well
    seeds = count(1)
    result = {
        "benchmark": "server_rate", "model": options.model.name, "threads": options.threads,
        "generate": options.generate, "requests": options.requests, "rounds": options.rounds,
        "levels": [level(options, t, c, seeds) for t in options.prompts for c in options.clients],
    }  # fmt: skip
    if options.json:
        append(options.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
