"""What an exact-copy model is certain to do in a context of a given length: bounds over all prompts, not samples.

The scores are computed in F64 from the weights as they are written (bf16 values). Three steps, each a worst case:

1. previous-token heads: the score depends on the distance alone, so the probability of the right key is the softmax
   over all distances of the longest prompt, exactly;
2. match heads: the bound of `CopyModel.match_gap` for every wrong key, all of them at that bound, less what the leak
   of step 1 can do to the scores;
3. logits: the copied code is p * right + (1 - p) * anything, so the right token leads by logit_gap * (2p - 1).

A cache of fewer bits is covered by `key_error`: the largest error of a stored key's element, relative to the largest
one in its block (F16 2^-11, BF16 2^-8, Q8_0 about 1/254). Kernels that read such a cache round the query likewise.
Not modelled: RoPE's F32 angles (measured: at most 0.0026 rad off at 65 536 positions, which costs 0.03 nats of 32, and
0.041 rad or 0.24 nats at a million), the rounding of sums, and values' rounding, which is the same for every token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.copy_construction import NORM_EPS, CopyModel, distances, to_bf16_values

KEY_ERRORS = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 1 / 254, "q4_0": 1 / 14}


@dataclass(frozen=True)
class Certificate:
    """Lower bounds at `length` tokens; `certain` if the best token is the right one whatever the prompt."""

    length: int
    previous_margin: float
    """Nats between the previous position's score and the next best, errors of the cache taken off."""
    previous_probability: float
    match_margin: float
    match_probability: float
    logit_gap: float

    @property
    def certain(self) -> bool:
        return self.logit_gap > 0


class Written:
    """The construction's sizes after rounding to bf16, as they stand in the file."""

    def __init__(self, model: CopyModel) -> None:
        self._model = model
        root = math.sqrt(model.head_dim)
        self.key = math.sqrt(model.sharpness[0] * root)
        fast = model.frequencies[: model.n_fast]
        self.query = to_bf16_values(self.key * np.stack([np.cos(fast), -np.sin(fast)])).astype(np.float64)
        self.key = _rounded(self.key)
        self.match = _rounded(math.sqrt(model.sharpness[1] * root))
        self.share = _rounded(1 / model.group) * model.group
        self.head = _rounded(model.logit_gap / (2 * model.code.distance))

    def norm(self, parts: int, prev: float, out: float) -> float:
        """What the norm of a stream of `parts` codes multiplies with, with prev and out of these sizes; about 1."""
        mean_square = (self._model.n_code * (1 + prev**2 + out**2) + 1) / self._model.hidden_size
        return _rounded(self._model.rms(parts)) / math.sqrt(mean_square + NORM_EPS)


def _rounded(value: float) -> float:
    return float(to_bf16_values(np.array([value]))[0])


def certify(model: CopyModel, length: int, key_error: float = 0.0) -> Certificate:
    """Bound what happens at the last position of a prompt of `length` tokens, with keys off by `key_error`.

    Filler noise moves the norms by amounts that are not bounded here: ValueError.
    """
    if model.filler_noise:
        raise ValueError("nothing is certified for a model with filler noise")
    written = Written(model)
    fast = model.frequencies[: model.n_fast]
    scale = written.norm(1, 0.0, 0.0) ** 2 * written.key / math.sqrt(model.head_dim)

    def score(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        angle = (x[:, None] + 1) * fast  # sum over pairs of Re(query * exp(i f distance))
        scores: npt.NDArray[np.float64] = np.cos(angle) @ written.query[0] - np.sin(angle) @ written.query[1]
        return scale * scores

    right = float(score(np.zeros(1))[0])
    # Key and query rounded, at the right key and at a wrong one: four times |query|_1 * max |key| * error.
    error = 4 * key_error * scale * float(np.abs(written.query).sum())
    best_wrong, leak = -math.inf, 0.0
    for x in distances(length):
        gaps = score(x) - right + error
        best_wrong = max(best_wrong, float(gaps.max()))
        leak += float(np.exp(np.minimum(gaps, 700.0)).sum())
    previous = 1 / (1 + leak)

    # prev = p * code + (1 - p) * other: at most 2 (1 - p) off in every place, at the right and at the wrong key,
    # and as much again because the norm then divides by another RMS.
    places = model.n_code
    size = written.share * written.norm(1, 0.0, 0.0)  # of the copied code, 1 but for rounding
    sharpness = written.norm(2, size, 0.0) ** 2 * written.match**2 * size / math.sqrt(model.head_dim)
    margin = sharpness * (model.match_gap(length) - 8 * (1 - previous) * places - 4 * math.sqrt(2) * key_error * places)
    match = 1 / (1 + (length - 1) * math.exp(min(-margin, 700.0)))
    out = written.share * written.norm(2, size, 0.0)
    step = 2 * model.code.distance * written.head * out * written.norm(3, size, out)
    # with p <= 1/2 for the first layer nothing is known about the second
    gap = step * (2 * match - 1) if previous > 0.5 else -math.inf
    return Certificate(length, -best_wrong, previous, margin, match, gap)


def longest_certain(model: CopyModel, key_error: float = 0.0, limit: int = 1 << 24) -> int:
    """Return the longest context for which the answer is certain, to 1 %; 0 if none is, `limit` if all tried are."""
    low, high = 1, 2
    while high < limit and certify(model, high, key_error).certain:
        low, high = high, 2 * high
    if high >= limit and certify(model, limit, key_error).certain:
        return limit
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if certify(model, middle, key_error).certain else (low, middle)
    return 0 if low == 1 else low
