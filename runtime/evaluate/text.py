"""Perplexity of a model on a text, and how far it is from a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ziggurat.runtime.evaluate.chunks import Chunks
from ziggurat.runtime.evaluate.decoder import ChunkDecoder, Logits
from ziggurat.runtime.evaluate.logits_file import LogitsWriter
from ziggurat.runtime.evaluate.monitor import Monitor
from ziggurat.runtime.evaluate.reference import Reference
from ziggurat.runtime.evaluate.scoring import (
    BlockPool,
    Estimate,
    Float64,
    TokenScores,
    accuracy,
    log_softmax,
    mean,
    perplexity,
    quantile,
    row_blocks,
    score,
)

KL_QUANTILES = {"kl_median": 0.5, "kl_p90": 0.9, "kl_p99": 0.99, "kl_p999": 0.999}


@dataclass(frozen=True)
class TextResult:
    """Scores of all tokens of a text's chunks, shape (scored tokens,) each; figures are made of them on demand."""

    chunks: Chunks
    scores: TokenScores

    def by_chunk(self, values: Float64) -> Float64:
        """Return the mean of per-token values of each chunk, shape (chunks,)."""
        result: Float64 = values.reshape(self.chunks.n_chunks, -1).mean(axis=1)
        return result

    def as_json(self) -> dict[str, Any]:
        """Return the figures; keys ending in ``_se`` are standard errors, divergences are in nats."""
        scores = self.scores
        figures: dict[str, Any] = _pair("perplexity", perplexity(scores.nll))
        figures |= _pair("nll", mean(scores.nll))
        figures |= {
            "tokens": self.chunks.n_scored,
            "text_tokens": self.chunks.text_tokens,
            "chunks": self.chunks.n_chunks,
            "n_ctx": self.chunks.n_ctx,
            "nll_by_chunk": self.by_chunk(scores.nll).tolist(),
        }
        return figures | self._against()

    def _against(self) -> dict[str, Any]:
        scores = self.scores
        if scores.kld is None or scores.reference_nll is None or scores.same_top is None:
            return {}
        difference = np.exp(-scores.nll) - np.exp(-scores.reference_nll)
        return {
            **_pair("reference_perplexity", perplexity(scores.reference_nll)),
            **_pair("kl_divergence", mean(scores.kld)),
            **{name: quantile(scores.kld, fraction) for name, fraction in KL_QUANTILES.items()},
            "kl_max": float(scores.kld.max()),
            **_pair("top1_agreement", accuracy(int(scores.same_top.sum()), len(scores.same_top))),
            # of each token's log-probability, the model's less the reference's: -ln(PPL(model) / PPL(reference))
            **_pair("log_probability_difference", mean(scores.reference_nll - scores.nll)),
            **_pair("probability_difference", mean(difference)),
            "probability_difference_rms": float(np.sqrt((difference**2).mean())),
            "kl_by_chunk": self.by_chunk(scores.kld).tolist(),
        }


def _pair(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_se": estimate.error}


def evaluate_text(
    decoder: ChunkDecoder,
    chunks: Chunks,
    monitor: Monitor,
    *,
    reference: Reference | None = None,
    writer: LogitsWriter | None = None,
    threads: int = 1,
) -> TextResult:
    """Score all chunks; ``writer`` gets the model's log-probabilities. In memory at once: one step's logits per model.

    Raises what decoding, the reference and the writer raise, and EngineClosedError when the monitor was stopped.
    """
    pool = BlockPool(threads)
    parts: list[TokenScores] = []
    monitor.report("perplexity", 0, chunks.n_chunks)
    for step in chunks.steps(decoder.n_batch):
        logits = decoder.decode(step)
        if reference is not None:
            reference.begin(step)
        part = _Part(logits, chunks.targets(step), reference)
        if len(part.targets):
            parts += pool.map(part.score, len(part.targets), logits.shape[1])
            if writer is not None:
                for block in row_blocks(len(part.targets), logits.shape[1]):
                    writer.write(log_softmax(logits[block]), part.targets[block])
        if step.end == chunks.n_ctx:
            monitor.report("perplexity", step.chunk_end, chunks.n_chunks)
    return TextResult(chunks, _joined(parts))


@dataclass(frozen=True)
class _Part:
    """The rows of one step."""

    logits: Logits
    targets: NDArray[np.int32]
    reference: Reference | None

    def score(self, block: slice) -> TokenScores:
        log_probs, targets = log_softmax(self.logits[block]), self.targets[block]
        if self.reference is None:
            return score(log_probs, targets)
        return score(log_probs, targets, self.reference.rows(block), self.reference.floor)


def _joined(parts: list[TokenScores]) -> TokenScores:
    def join(name: str) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    return TokenScores(join("nll"), join("reference_nll"), join("kld"), join("same_top"))
