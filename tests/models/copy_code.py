"""Binary codes for token ids: words of ±1 whose smallest distance is known, because the code is linear."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_LENGTH = 64
_TRIES = 64


@dataclass(frozen=True)
class Code:
    """`words` (tokens, length) of ±1; any two of them differ in at least `distance` places."""

    words: npt.NDArray[np.float32]
    distance: int


def make_code(n_words: int, length: int, seed: int) -> Code:
    """Return `n_words` code words of `length` places (at most 64).

    The words are the first ones of a random binary linear code with just enough generators. The difference of two
    words of a linear code is a word itself, so the smallest distance is the smallest weight: 2^k weights prove it
    where comparing the words would take n_words² / 2 distances. The best of 64 random generator matrices is kept
    (random linear codes meet the Gilbert-Varshamov bound; better ones are known, none is needed here).
    """
    bits = max(1, (n_words - 1).bit_length())
    if not bits < length <= MAX_LENGTH:
        raise ValueError(f"{n_words} words need a code longer than {bits} and at most {MAX_LENGTH}, not {length}")
    rng = np.random.default_rng(seed)
    best, best_distance = np.zeros(0, np.uint64), 0
    for _ in range(_TRIES):
        words = _span(rng.integers(0, 2, (bits, length), dtype=np.uint64))
        distance = int(_unpack(words[1:], length).sum(1).min())
        if distance > best_distance:
            best, best_distance = words, distance
        if bits > 13 and best_distance >= 2:  # others are slow to try and better by a place or two at most
            break
    if best_distance < 2:
        raise ValueError(f"found no code of {n_words} words in {length} places: a wider head or hidden size is needed")
    signs = 1.0 - 2.0 * _unpack(best[:n_words], length).astype(np.float32)
    return Code(signs, best_distance)


def _span(generators: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """All sums of the rows (k, length), packed into one integer each; the zero word first."""
    powers = np.left_shift(np.uint64(1), np.arange(generators.shape[1], dtype=np.uint64))
    words = np.zeros(1, np.uint64)
    for row in generators:
        words = np.concatenate([words, words ^ np.bitwise_or.reduce(row * powers)])
    return words


def _unpack(words: npt.NDArray[np.uint64], length: int) -> npt.NDArray[np.uint8]:
    little = words.astype("<u8").view(np.uint8).reshape(-1, 8)
    return np.unpackbits(little, axis=1, bitorder="little")[:, :length]
