"""The arithmetic on logits: log-probabilities, divergence, means with their standard errors. NumPy only.

Definitions are llama.cpp's (``tools/perplexity``), so that figures compare: natural logarithms, KL(reference ||
model) over the whole vocabulary, standard errors of means that take tokens as independent. One deviation: upstream
leaves out tokens whose reference probability is below e^-16 and knows the reference in 16 bits; here both are whole,
unless the reference is a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ziggurat.runtime.errors import ZigguratError

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    error: float


def log_softmax(logits: Float32) -> Float32:
    """Return log-probabilities of logits of shape (rows, n_vocab), float32; the sums are in float64.

    Logits of -inf (tokens a model rules out) become -10000. Raises ZigguratError for logits that are no numbers.
    """
    with np.errstate(invalid="ignore"):
        shifted = logits - logits.max(axis=1, keepdims=True)
    np.maximum(shifted, -1e4, out=shifted)
    total = np.exp(shifted).sum(axis=1, dtype=np.float64, keepdims=True)
    if not np.isfinite(total).all():
        raise ZigguratError("the model computes logits that are no numbers: its file is damaged or a type overflows")
    result: Float32 = shifted - np.log(total).astype(np.float32)
    return result


@dataclass(frozen=True)
class TokenScores:
    """Per scored token, each of shape (rows,): nats, ``same_top`` as bool; the last three only with a reference.

    ``nll`` is the negative log-likelihood of the text's token, ``kld`` the divergence of the whole distribution.
    """

    nll: Float64
    reference_nll: Float64 | None = None
    kld: Float64 | None = None
    same_top: NDArray[np.bool_] | None = None


def score(
    log_probs: Float32, targets: NDArray[np.int32], reference: Float32 | None = None, floor: float = -math.inf
) -> TokenScores:
    """Score rows of log-probabilities (rows, n_vocab) on the tokens that came, and against a reference's rows.

    What the reference has at ``floor`` or below it counts as no probability mass in the divergence.
    """
    rows = np.arange(len(targets))
    nll = -log_probs[rows, targets].astype(np.float64)
    if reference is None:
        return TokenScores(nll)
    mass = np.exp(reference)
    if floor > -math.inf:
        mass[reference <= floor] = 0.0
    kld = (mass * (reference - log_probs)).sum(axis=1, dtype=np.float64)
    same = log_probs.argmax(axis=1) == reference.argmax(axis=1)
    return TokenScores(nll, -reference[rows, targets].astype(np.float64), kld, same)


def row_blocks(n_rows: int, n_vocab: int) -> Iterator[slice]:
    """Yield slices of rows whose float32 arrays take a few MiB each, so that temporaries stay in the cache."""
    size = max(1, _BLOCK_BYTES // (4 * max(1, n_vocab)))
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


class BlockPool:
    """Maps a function over blocks of rows with some threads (NumPy releases the interpreter lock), in order."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def map(self, function: Callable[[slice], TokenScores], n_rows: int, n_vocab: int) -> list[TokenScores]:
        """Return the function's results block by block."""
        blocks = list(row_blocks(n_rows, n_vocab))
        if self._threads == 1 or len(blocks) == 1:
            return [function(block) for block in blocks]
        with ThreadPoolExecutor(min(self._threads, len(blocks))) as pool:
            return list(pool.map(function, blocks))


def mean(values: Float64 | NDArray[np.bool_]) -> Estimate:
    """Return the mean with its standard error, sqrt(var / (n - 1)); the error of fewer than two values is 0."""
    array = np.asarray(values, np.float64)
    variance = float(array.var()) if len(array) > 1 else 0.0
    return Estimate(float(array.mean()), math.sqrt(variance / max(1, len(array) - 1)))


def perplexity(nll: Float64) -> Estimate:
    """Return e^mean of negative log-likelihoods; the error is that of the mean times the perplexity."""
    average = mean(nll)
    value = math.exp(min(average.value, 700.0))
    return Estimate(value, value * average.error)


def accuracy(correct: int, total: int) -> Estimate:
    """Return a share with its standard error, sqrt(p (1 - p) / (n - 1))."""
    share = correct / total if total else 0.0
    return Estimate(share, math.sqrt(share * (1 - share) / max(1, total - 1)))


def quantile(values: Float64, fraction: float) -> float:
    """Return a quantile, interpolated linearly between neighbours."""
    return float(np.quantile(values, fraction))
