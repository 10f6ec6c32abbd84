"""Chats of five turns over a document with a budget: go on with the rows that were kept, or read everything again.

Documents hide --facts facts; every turn asks for another one. The first question is seen when the document's rows are
chosen, the later ones are not: what they ask for stays only by chance. Going on reads a turn's new tokens, re-reading
the whole conversation, so that each turn's question is seen. Budgets are shares of the document's tokens (the mean over
the layers), the same in all turns; the line above is the full cache. An answer is right if all its digits are.

Turns are put together as tokens, with what the model generated in between unchanged, so that every turn's prompt begins
with the one before and its answer. Prints a table in Markdown; the last line is JSON, --json FILE appends it.

usage: convert tests/reference_model ref.gguf --type f16
       python tests/benchmarks/chat_turns.py ref.gguf [--length 2048] [--documents 20] [--shares 0.12,0.25,0.5]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kv_retrieval import ANSWER_TOKENS, DEPTHS
from results import append

from ziggurat.runtime.bindings import Model
from ziggurat.runtime.budget import Budget
from ziggurat.runtime.engine import GenerationRequest, TokenEvent
from ziggurat.runtime.engine.llama_engine import EngineSettings, LlamaEngine
from ziggurat.runtime.evaluate.filler import TEXT
from ziggurat.runtime.evaluate.needle import TextNeedles, Wording
from ziggurat.runtime.evaluate.retrieval import template_frame
from ziggurat.runtime.kv_policy import KVPolicy
from ziggurat.runtime.sampling import SamplingParams

Figures = dict[str, Any]
TURN_TOKENS = 48  # a question, an answer and what the template puts around them


@dataclass(frozen=True)
class Chat:
    """A document with its first question, as tokens; then what each later turn adds; and the answers."""

    opening: list[int]
    turns: list[list[int]]
    expected: list[str]


def write_chats(options: argparse.Namespace) -> list[Chat]:
    """The same for the same seed; the facts asked first lie at all depths."""
    chats = []
    with Model(options.model) as model:
        vocab = model.vocab
        head, tail = template_frame(vocab, model.chat_template)
        wording = Wording()
        writer = TextNeedles(vocab, TEXT, (head, tail), wording, answer_tokens=ANSWER_TOKENS)
        again = head[1:] if vocab.adds_bos or head[0] == vocab.bos else head
        for number in range(options.documents):
            rng = random.Random(f"{options.seed}/{number}")
            needle = writer(rng, options.length, DEPTHS[number % len(DEPTHS)], options.facts)
            others = [fact for fact in needle.hidden if fact[0] != needle.key]
            asked = rng.sample(others, options.turns - 1)
            questions = [
                vocab.tokenize(wording.ask(key), add_special=False, parse_special=False) for key, _ in asked
            ]  # fmt: skip
            # the end of a message is the first token after it, and not among those that the model says
            turns = [[tail[0], *again, *question, *tail] for question in questions]
            chats.append(Chat(list(needle.prompt), turns, [needle.expected, *(value for _, value in asked)]))
    return chats


def talk(engine: LlamaEngine, chat: Chat, reread: bool) -> list[Figures]:
    """What each turn said, took and reused."""
    said: list[Figures] = []
    conversation = chat.opening
    for added, expected in zip([[], *chat.turns], chat.expected, strict=True):
        conversation = [*conversation, *added]
        request = GenerationRequest(
            tokens=tuple(conversation), max_tokens=ANSWER_TOKENS, sampling=SamplingParams(temperature=0.0),
            reread=reread,
        )  # fmt: skip
        *tokens, done = engine.stream(request)
        text = "".join(event.text for event in (*tokens, done))
        conversation += [event.token for event in tokens if isinstance(event, TokenEvent)]
        said.append(
            {
                "right": expected in text, "first_s": done.stats.time_to_first_token_s,
                "prompt": done.stats.prompt_tokens, "reused": done.stats.reused_tokens,
            }
        )  # fmt: skip
    return said


def way(options: argparse.Namespace, chats: Sequence[Chat], name: str, share: float | None) -> Figures:
    """All chats in one way: full, going on or re-reading; lists are by turn."""
    n_ctx = options.length + options.turns * TURN_TOKENS
    kv = None if share is None else KVPolicy(Budget(rows=round(share * len(chats[0].opening))))
    settings = EngineSettings(n_ctx=n_ctx, threads=options.threads, flash_attention="on", kv=kv)
    with LlamaEngine(options.model, settings) as engine:
        engine.load()
        *_, _done = engine.stream(GenerationRequest(tokens=tuple(chats[0].opening[:64]), max_tokens=2))
        all_said = [talk(engine, chat, name == "reread") for chat in chats]
    by_turn = list(zip(*all_said, strict=True))
    return {
        "way": name, "share": share, "rows": None if kv is None else kv.budget.rows,
        "right": [sum(turn["right"] for turn in turns) for turns in by_turn],
        "first_s": [statistics.median(turn["first_s"] for turn in turns) for turns in by_turn],
        "read_tokens": [statistics.median(turn["prompt"] - turn["reused"] for turn in turns) for turns in by_turn],
        "prompt_tokens": [statistics.median(turn["prompt"] for turn in turns) for turns in by_turn],
    }  # fmt: skip


def table(ways: Sequence[Figures], documents: int) -> str:
    """Ways down, turns across: right answers and milliseconds to the first token, in Markdown."""
    turns = range(1, len(ways[0]["right"]) + 1)
    lines = [
        "| budget | later turns | " + " | ".join(f"turn {turn}" for turn in turns) + " |",
        "| --- | --- |" + " --- |" * len(turns),
    ]
    names = {"full": "go on", "continue": "go on", "reread": "read again"}
    for each in ways:
        budget = "none" if each["share"] is None else f"{each['share']:.0%} ({each['rows']} rows)"
        cells = [
            f"{right / documents:.0%}, {1000 * first:.0f} ms"
            for right, first in zip(each["right"], each["first_s"], strict=True)
        ]
        lines.append(f"| {budget} | {names[each['way']]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--length", type=int, default=2048, help="document, first question and answer, in tokens")
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--facts", type=int, default=6)
    parser.add_argument("--shares", default="0.12,0.25,0.5", help="of the document's tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="append the result to this file's list")
    options = parser.parse_args()
    if options.facts < options.turns:
        parser.error("there are fewer facts than turns")
    chats = write_chats(options)
    ways = []
    jobs = [("full", None), *((name, float(s)) for s in options.shares.split(",") for name in ("continue", "reread"))]
    for name, share in jobs:
        ways.append(way(options, chats, name, share))
        print(json.dumps(ways[-1]), flush=True)
    print(table(ways, options.documents))
    result = {
        "benchmark": "chat_turns", "model": options.model.name, "length": options.length, "facts": options.facts,
        "documents": options.documents, "turns": options.turns, "seed": options.seed, "threads": options.threads,
        "question_seen_when_rows_are_chosen": {
            "continue": [turn == 0 for turn in range(options.turns)], "reread": [True] * options.turns,
        },
        "ways": ways,
    }  # fmt: skip
    if options.json:
        append(options.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
