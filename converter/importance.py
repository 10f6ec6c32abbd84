"""The importance matrix of a tuning pass: sums of squares of what each matrix of the GGUF reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ziggurat.converter import activations
from ziggurat.converter.activations import ChannelStatistics
from ziggurat.converter.calibration_text import CalibrationTokens
from ziggurat.converter.calibration_work import WorkFolder
from ziggurat.converter.errors import CalibrationError
from ziggurat.converter.imatrix import Float32, ImportanceMatrix


@dataclass(frozen=True)
class Gathered:
    """An importance matrix, and where it had to guess."""

    matrix: ImportanceMatrix
    unrouted: dict[str, tuple[int, ...]]
    """Of mixtures, the experts that no token came to, by tensor: they stand in the matrix with the mean of the others'
    and a count of one, so that every reader takes them for that."""


def gather(work: WorkFolder, tensors: Mapping[str, str], tokens: CalibrationTokens) -> Gathered:
    """Bring a finished pass's statistics into the form of llama.cpp's.

    Args:
        work: what `tune.tune` returned.
        tensors: linear layer to GGUF tensor (`linears.tensor_names`).
        tokens: what went through.

    Raises:
        CalibrationError: sums are beyond float32.
    """
    sums: dict[str, Float32] = {}
    counts: dict[str, Float32] = {}
    unrouted: dict[str, tuple[int, ...]] = {}
    for place in range(work.finished):
        for layer, statistics in activations.unpack(work.block(place, _is_statistic)).items():
            name = tensors.get(layer)
            if name is None:
                continue
            sums[name], counts[name], missing = _entry(statistics)
            if missing:
                unrouted[name] = missing
            if not np.isfinite(sums[name]).all():
                raise CalibrationError(
                    f"what {layer} reads is too large for an importance matrix: the checkpoint is damaged, or convert "
                    "it with --no-awq --no-imatrix"
                )
    sequences, positions = tokens.ids.shape
    return Gathered(ImportanceMatrix(sums, counts, (tokens.source,), sequences, positions), unrouted)


def _is_statistic(name: str) -> bool:
    """Not what a step found."""
    return "/" not in name


def _entry(statistics: ChannelStatistics) -> tuple[Float32, Float32, tuple[int, ...]]:
    """Sums, counts, and which experts have the mean of the others'."""
    squares, count = np.atleast_2d(statistics.squares).copy(), np.atleast_1d(statistics.count).copy()
    missing = np.flatnonzero(count == 0)
    if len(missing):
        routed = count > 0
        squares[missing] = (squares[routed] / count[routed, None]).mean(0) if routed.any() else 1.0
        count[missing] = 1
    with np.errstate(over="ignore"):
        total = squares.astype(np.float32)
    return total, count[:, None].astype(np.float32), tuple(int(expert) for expert in missing)
