"""Log-probabilities of generated tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ziggurat.runtime.bindings import Vocab

#: Likeliest tokens that can be asked for with each token.
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class TokenLogprob:
    """One token with its natural logarithm of probability. ``bytes`` may be a part of a character, ``text`` shows it.

    Control tokens have the text they are written with, though a generation does not show it.
    """

    token: int
    text: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True)
class TokenLogprobs:
    """What the model thought of a token that was chosen, and the likeliest tokens in its place, the best first.

    Of the model's own distribution: before penalties, temperature, biases, grammars and every other sampler, as the
    APIs of OpenAI and vLLM give it. The chosen token need not be among ``top``.
    """

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


def token_logprobs(logits: Any, token: int, n_top: int, vocab: Vocab) -> TokenLogprobs:
    """Return those of a token and of the ``n_top`` likeliest, from float32 logits of shape (n_vocab,).

    Tokens that are equally likely come in the order of their ids.
    """
    import numpy as np

    n_top = min(n_top, len(logits))
    best = float(logits.max())
    # In float32 the sum of 100 000 exponentials is good to 1e-6: NumPy adds in pairs.
    normalizer = best + float(np.log(np.exp(logits - best).sum()))
    top: list[int] = []
    if n_top:
        least = np.partition(logits, len(logits) - n_top)[len(logits) - n_top]
        among = np.flatnonzero(logits >= least)
        top = among[np.argsort(-logits[among], kind="stable")][:n_top].tolist()

    def of(token: int) -> TokenLogprob:
        data = vocab.piece(token, special=True)
        return TokenLogprob(token, data.decode("utf-8", errors="replace"), data, float(logits[token]) - normalizer)

    return TokenLogprobs(of(token), tuple(map(of, top)))
