"""Retrieval prompts of token ids with one right answer: keys and values in random filler, the asked key at the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.copy_files import BOS, FIRST_WORD


@dataclass(frozen=True)
class Needle:
    """One prompt. Key and value tokens stand once each in the text; the last token is the asked key again."""

    tokens: list[int]
    answer: list[int]
    """The tokens that must follow."""
    start: int
    """Position of the asked key in the text; its value is at start + 1 ... start + len(answer)."""

    @property
    def rows(self) -> range:
        """Positions of the asked key and its value: the KV rows without which nothing can be found."""
        return range(self.start, self.start + 1 + len(self.answer))


def needle(
    length: int, depth: float, seed: int, *, n_pairs: int = 1, value_tokens: int = 1, vocab_size: int = 1024
) -> Needle:
    """Make a prompt of exactly `length` tokens, BOS first.

    The asked pair stands at `depth` (0: right after BOS, 1: right before the question); `n_pairs - 1` other pairs
    stand at random places. Filler repeats freely and holds no key and no value.
    """
    span = 1 + value_tokens
    body = length - 2  # without BOS and the question
    if not 0 <= depth <= 1 or n_pairs < 1 or value_tokens < 1:
        raise ValueError("depth must be in 0 ... 1, n_pairs and value_tokens 1 at least")
    if n_pairs * span * 2 > body + span:  # half of the text at most: then random places always leave room
        raise ValueError(f"{length} tokens are too few for {n_pairs} pairs of {span} tokens")
    words = vocab_size - FIRST_WORD
    if n_pairs * span >= words:
        raise ValueError(f"{n_pairs} pairs of {span} different tokens need more than {words} words")

    rng = np.random.default_rng([seed, length, round(depth * 1e6), n_pairs, value_tokens])
    ids = FIRST_WORD + rng.permutation(words)
    pairs, filler = ids[: n_pairs * span].reshape(n_pairs, span), ids[n_pairs * span :]
    text = rng.choice(filler, body)
    asked = round(depth * (body - span))
    starts = [asked, *_free_places(rng, body, span, asked, n_pairs - 1)]
    for start, pair in zip(starts, pairs, strict=True):
        text[start : start + span] = pair
    tokens = [BOS, *text.tolist(), int(pairs[0, 0])]
    return Needle(tokens, pairs[0, 1:].tolist(), asked + 1)


def needle_prompt(
    length: int, depth: float, seed: int, *, n_pairs: int = 1, value_tokens: int = 1, vocab_size: int = 1024
) -> tuple[list[int], list[int]]:
    """Return the tokens and the answer of `needle`."""
    made = needle(length, depth, seed, n_pairs=n_pairs, value_tokens=value_tokens, vocab_size=vocab_size)
    return made.tokens, made.answer


def _free_places(rng: np.random.Generator, body: int, span: int, asked: int, count: int) -> list[int]:
    """Draw `count` starts of spans that touch neither each other nor the asked one."""
    free = np.ones(body - span + 1, bool)
    starts: list[int] = []
    for taken in [asked, *([None] * count)]:
        if taken is None:
            left = np.flatnonzero(free)
            if not len(left):
                raise ValueError("the pairs find no room; a longer prompt is needed")
            taken = int(rng.choice(left))
            starts.append(taken)
        free[max(0, taken - span + 1) : taken + span] = False
    return starts
