"""Retrieval trials: held-out text with facts in it, one question, and whether all digits come out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from data import Corpus
from model import Llama
from notebooks import DIGIT_WEIGHT, FACT_TOKENS, Encoder, Fact, Row, draw_facts, write_notebook

FEWEST_FACTS = 6


@dataclass(frozen=True)
class Trial:
    """A prompt that ends where the answer begins, the fact asked for, and the same chat with its answer."""

    prompt: list[int]
    fact: Fact
    answered: Row


def draw_trials(
    encoder: Encoder,
    held_out: Corpus,
    length: int,
    count: int,
    seed: int,
    facts: int | None = None,
    alike: float = 0.0,
) -> list[Trial]:
    """`count` chats of exactly `length` tokens, answer included, that each ask for one of at least six facts.

    The number of facts grows with the length to at most twelve, unless given; codes have four digits. `alike`: see
    `draw_facts`.
    """
    rng = random.Random(seed * 1_000_003 + length)
    most = facts or max(FEWEST_FACTS, min(12, length // (6 * FACT_TOKENS)))
    trials = []
    for _ in range(count):
        some = draw_facts(rng, most, alike=alike)
        asked = rng.choice(some)
        row = write_notebook(rng, encoder, some, [asked], length, lambda room: held_out.filler(rng, room))
        opening = encoder.header("assistant")
        end = _last(row.ids, opening) + len(opening)
        trials.append(Trial(row.ids[:end], asked, row))
    return trials


def _last(ids: Sequence[int], part: Sequence[int]) -> int:
    """Where `part` occurs last in `ids`."""
    return next(i for i in range(len(ids) - len(part), -1, -1) if list(ids[i : i + len(part)]) == list(part))


@torch.no_grad()
def held_out_loss(model: Llama, held_out: Corpus, device: str, windows: int = 24, length: int = 512) -> float:
    """Mean loss in nats per token over the first windows of a text that is never trained on."""
    model.eval()
    losses = []
    for at in range(0, min(len(held_out.ids) - length, windows * length), length):
        ids = torch.from_numpy(held_out.ids[at : at + length].astype("int64"))[None].to(device)
        with torch.autocast(device, torch.bfloat16):
            losses.append(model.losses(ids[:, :-1], ids[:, 1:], torch.ones_like(ids[:, 1:]).float())[0])
    return float(torch.cat(losses).mean())


@torch.no_grad()
def probe(model: Llama, trials: Sequence[Trial], device: str) -> float:
    """Share of the trials whose digits are all the best token, given the rest of the answer.

    Much cheaper than generating, and the same but for answers whose words go wrong before the digits.
    """
    model.eval()
    right = 0
    for trial in trials:
        ids = torch.tensor([trial.answered.ids], device=device)
        weights = (torch.tensor([trial.answered.weights], device=device) == DIGIT_WEIGHT).float()
        with torch.autocast(device, torch.bfloat16):
            _, _, hits = model.losses(ids[:, :-1], ids[:, 1:], weights[:, 1:])
        right += bool(hits.all())
    return right / len(trials)
