"""Calibration sequences in two parts: those to fit on, and those held out to judge by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ziggurat.converter.calibration_text import CalibrationTokens
from ziggurat.converter.errors import CalibrationError

HELD_OUT = 0.2

Windows = list[tuple[int, int]]


@dataclass(frozen=True)
class Split:
    """Sequences in a new order, the held-out ones behind the others, so that every batch is of one kind."""

    tokens: CalibrationTokens
    fit: Windows
    """First and behind-the-last sequence of each batch to fit on."""
    held_out: Windows
    """The same of the batches to judge by."""

    @property
    def all(self) -> Windows:
        """All batches."""
        return [*self.fit, *self.held_out]


def split(tokens: CalibrationTokens, batch_tokens: int) -> Split:
    """Hold out about a fifth of the sequences, evenly spread.

    Raises:
        CalibrationError: there are not two sequences.
    """
    sequences, positions = tokens.ids.shape
    held_out = _held_out(sequences)
    order = np.concatenate([np.setdiff1d(np.arange(sequences), held_out), held_out])
    first = sequences - len(held_out)
    return Split(
        CalibrationTokens(np.ascontiguousarray(tokens.ids[order]), tokens.source),
        batches(first, positions, batch_tokens),
        [(first + a, first + b) for a, b in batches(len(held_out), positions, batch_tokens)],
    )


def batches(sequences: int, positions: int, batch_tokens: int) -> Windows:
    """First and behind-the-last sequence of each batch."""
    step = max(1, batch_tokens // positions)
    return [(start, min(start + step, sequences)) for start in range(0, sequences, step)]


def _held_out(sequences: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Which sequences are held out."""
    if sequences < 2:
        raise CalibrationError(
            "at least two sequences of calibration tokens are needed, one to fit on and one to judge by: give more "
            "text or a smaller sequence length"
        )
    count = min(max(1, round(HELD_OUT * sequences)), sequences - 1)
    return ((np.arange(count) + 0.5) * sequences / count).astype(np.int64)
