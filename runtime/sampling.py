"""How the next token is chosen: settings, their ranges, and the library's chain for them."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, replace

from ziggurat.runtime.bindings import SamplerChain, Vocab
from ziggurat.runtime.errors import InvalidRequestError

_MAX_SEED = 2**32 - 2  # the library reads 2^32 - 1 as "take a random one"


@dataclass(frozen=True)
class SamplingParams:
    """llama.cpp's names, defaults and order: top-k, top-p, min-p, temperature, then a draw.

    ``temperature`` 0 chooses the likeliest token and ignores the rest. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 switch
    theirs off. ``seed`` None takes a random one; ``seeded`` fixes it, so that it can be reported and repeated.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InvalidRequestError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 <= self.top_k < 2**31:
            raise InvalidRequestError(f"top-k is {self.top_k}; it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise InvalidRequestError(f"top-p is {self.top_p}; it must be above 0 and at most 1 (off)")
        if not 0 <= self.min_p <= 1:
            raise InvalidRequestError(f"min-p is {self.min_p}; it must be from 0 (off) to 1")
        if self.seed is not None and not 0 <= self.seed <= _MAX_SEED:
            raise InvalidRequestError(f"the seed is {self.seed}; it must be from 0 to {_MAX_SEED}")

    def seeded(self) -> SamplingParams:
        """Return these settings with a seed, drawn now if there was none."""
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(_MAX_SEED + 1))


def build_chain(params: SamplingParams, vocab: Vocab) -> SamplerChain:
    """Make the library's sampler chain for one generation; the caller closes it."""
    chain = SamplerChain().suppress(vocab.suppressed(), vocab.n_tokens)
    if params.temperature == 0:
        return chain.greedy()
    seed = params.seeded().seed
    assert seed is not None
    return chain.top_k(params.top_k).top_p(params.top_p).min_p(params.min_p).temperature(params.temperature).dist(seed)
