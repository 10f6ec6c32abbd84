"""Quantized tensors whose codes keep the error of a layer's output small, not that of its weights.

They are ordinary GGUF tensors. Codes are chosen by error feedback (`feedback`) and improved, with the scales, by
coordinate descent (`descent`). Both measure errors by the Gram matrix G of the layer's inputs, shrunk towards its
diagonal: G + shrinkage * diag(G). So much less trust in correlations is needed the fewer tokens per column there are
and the rarer large inputs; how much is tried out on held-out inputs. Shrinking each column by its own size, not by the
mean size as GPTQ does, keeps the outcome the same when channels are scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ziggurat.converter import ggml
from ziggurat.converter.calibrate import torch_threads
from ziggurat.converter.descent import descend
from ziggurat.converter.feedback import feed_back, unit_factor
from ziggurat.converter.grids import GRIDS

if TYPE_CHECKING:
    import torch

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class CompensateSettings:
    """How thoroughly errors are compensated."""

    shrinkages: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    """Ascending: tried until the next is no better."""
    passes: int = 2
    """Of coordinate descent."""
    trial_rows: int = 64
    """Rows of a tensor that shrinkages are tried on."""
    columns: int = 16384
    """Tensors with more are quantized plainly: their Gram matrix would not fit."""
    values: int = 1 << 22
    """Weights that a thread works on at a time, in whole rows."""


@dataclass(frozen=True)
class Metric:
    """How errors of a layer's weights count."""

    gram: torch.Tensor
    """Shrunk, float32 of shape [c, c]."""
    factor: torch.Tensor
    """Its `feedback.unit_factor`."""


class Gram:
    """The Gram matrix of a layer's inputs, and what becomes of it as it is shrunk; in place, since it can be large."""

    def __init__(self, gram: torch.Tensor, threads: int = 1) -> None:
        """Take the sum of x x^T over inputs x, float32 of shape [c, c], finite; its diagonal changes from now on."""
        self._gram, self._diagonal, self._threads = gram, gram.diagonal().clone(), threads

    def metric(self, shrinkage: float) -> Metric:
        """With so much of its diagonal added; one given before changes with it."""
        import torch

        diagonal = self._diagonal
        # columns that are always zero: any error is fine, and ordinary rounding the obvious choice
        silent = torch.where(diagonal > 0, 0.0, diagonal.mean().clamp(min=1.0))
        self._gram.diagonal().copy_(diagonal * (1 + shrinkage) + silent)
        with torch_threads(self._threads):
            return Metric(self._gram, unit_factor(self._gram))


@dataclass(frozen=True)
class Matrix:
    """A tensor to quantize."""

    rows: torch.Tensor
    """float32 of shape [n, c]."""
    type_id: int
    """To this ggml type, prepared."""
    importance: Float32 | None
    """Of the columns, shape [c]: what ggml's own choices are weighted with."""

    def part(self, step: slice) -> Matrix:
        """Some of its rows."""
        return Matrix(self.rows[step], self.type_id, self.importance)

    def parts(self, settings: CompensateSettings) -> list[Matrix]:
        """All of its rows, a thread's share in each."""
        step = max(1, settings.values // self.rows.shape[1])
        return [self.part(slice(begin, begin + step)) for begin in range(0, len(self.rows), step)]


@dataclass(frozen=True)
class Compensated:
    """A quantized tensor."""

    packed: UInt8
    """Shape [n, row bytes]: ggml's own wherever compensation does not lower the held-out loss."""
    plain_loss: float
    """Squared error of the layer's output on held-out inputs as ggml quantizes it, relative to that output."""
    loss: float
    """The same of `packed`."""
    shrinkage: float
    """Of the metric; not a number if ggml's own quantization was kept."""


def supported(type_id: int, columns: int, settings: CompensateSettings) -> bool:
    """Whether tensors of a type and width can be compensated."""
    return type_id in GRIDS and columns % GRIDS[type_id].block == 0 and columns <= settings.columns


def compensate_all(
    matrices: Sequence[Matrix], gram: torch.Tensor, held_out: torch.Tensor, settings: CompensateSettings,
    pool: Executor, threads: int = 1,
) -> list[Compensated]:  # fmt: skip
    """Quantize the matrices that read one input.

    Args:
        matrices: all with as many columns.
        gram: sum of x x^T over their inputs x, float32 of shape [c, c]; its diagonal is not what it was afterwards.
        held_out: other inputs, shape [tokens, c].
        settings: how.
        pool: who does it; its threads compute on one core each.
        threads: what the Gram matrix is worked on with; the last digits depend on it.

    Raises:
        QuantizeError: ggml finds non-finite scales.
    """
    metric, shrinkage = choose_metric(matrices, Gram(gram, threads), held_out, settings, pool)
    results = []
    for matrix in matrices:
        size = _size(matrix, held_out)

        def both(part: Matrix) -> tuple[UInt8, float, UInt8, float]:
            plain, packed = quantize_plainly(part), _compensated(part, metric, settings)
            return plain, squared_error(part, plain, held_out), packed, squared_error(part, packed, held_out)

        plain, plain_error, packed, error = zip(*pool.map(both, matrix.parts(settings)), strict=True)
        plain_loss, loss = sum(plain_error) / size, sum(error) / size
        if loss < plain_loss:
            results.append(Compensated(np.concatenate(packed), plain_loss, loss, shrinkage))
        else:
            results.append(Compensated(np.concatenate(plain), plain_loss, plain_loss, float("nan")))
    return results


def compensate(matrix: Matrix, metric: Metric, settings: CompensateSettings, pool: Executor) -> UInt8:
    """Quantize a matrix so that its products with the metric's inputs change little: shape [n, row bytes].

    Memory is about six times that of `settings.values` in float32, for each thread. Rows do not depend on each other.

    Raises:
        QuantizeError: ggml finds non-finite scales.
    """
    return np.concatenate(list(pool.map(lambda part: _compensated(part, metric, settings), matrix.parts(settings))))


def _compensated(part: Matrix, metric: Metric, settings: CompensateSettings) -> UInt8:
    parts = feed_back(part.rows, metric.factor, part.type_id, part.importance)
    descend(parts, metric.gram, part.type_id, settings.passes)
    return parts.packed(GRIDS[part.type_id])


def choose_metric(
    matrices: Sequence[Matrix], gram: Gram, held_out: torch.Tensor, settings: CompensateSettings, pool: Executor
) -> tuple[Metric, float]:
    """The metric, and its shrinkage, with which evenly spread rows of the matrices err least on held-out inputs."""
    trials = [m.part(slice(0, None, -(-len(m.rows) // settings.trial_rows))) for m in matrices]
    sizes = [_size(trial, held_out) for trial in trials]
    best: tuple[float, float] | None = None
    metric: Metric | None = None
    for shrinkage in settings.shrinkages:
        del metric  # room for the next
        metric = gram.metric(shrinkage)
        packed = list(pool.map(lambda trial, metric=metric: _compensated(trial, metric, settings), trials))
        errors = [squared_error(*pair, held_out) for pair in zip(trials, packed, strict=True)]
        loss = sum(error / size for error, size in zip(errors, sizes, strict=True))
        if best is not None and loss >= best[0]:
            del metric  # room for the one before, made again
            return gram.metric(best[1]), best[1]
        best = loss, shrinkage
    assert metric is not None
    return metric, shrinkage


def _size(matrix: Matrix, inputs: torch.Tensor) -> float:
    """Sum of squares of its products with inputs [tokens, c]; 1 if there is nothing."""
    step, total = max(1, (1 << 22) // matrix.rows.shape[1]), 0.0
    for begin in range(0, len(matrix.rows), step):
        total += float((inputs @ matrix.rows[begin : begin + step].T).square().sum())
    return total or 1.0


def quantize_plainly(matrix: Matrix) -> UInt8:
    """What ggml's quantizer makes of it: shape [n, row bytes].

    Raises:
        QuantizeError: ggml finds non-finite scales.
    """
    rows = np.ascontiguousarray(matrix.rows.cpu().numpy())
    packed = np.empty((len(rows), ggml.row_bytes(matrix.type_id, rows.shape[1])), np.uint8)
    ggml.quantize_rows(matrix.type_id, rows, packed, matrix.importance)
    return packed


def squared_error(matrix: Matrix, packed: UInt8, inputs: torch.Tensor) -> float:
    """Sum of the squared errors of its products with inputs [tokens, c]."""
    import torch

    step, total = max(1, (1 << 22) // matrix.rows.shape[1]), 0.0
    for begin in range(0, len(packed), step):
        back = ggml.dequantize_rows(matrix.type_id, packed[begin : begin + step], matrix.rows.shape[1])
        error = torch.from_numpy(back).to(matrix.rows.device) - matrix.rows[begin : begin + step]
        total += float((inputs @ error.T).double().square().sum())
    return total
