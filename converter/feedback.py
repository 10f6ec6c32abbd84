"""Codes chosen column by column, each making up for the errors of those before it: GPTQ on GGUF's blocks.

With H the Gram matrix of a layer's inputs, the error e = w' - w of a row costs e H e^T. Written as H = M D M^T, M upper
unit triangular and D diagonal, that is the sum over columns of D_jj ((e M)_j)^2: column j is best rounded to the value
nearest w_j - sum over i < j of e_i M_ij. That is GPTQ (Frantar et al., arXiv:2210.17323) in the form of LDLQ (Chee et
al., arXiv:2307.13304), which needs no inverse of H. Deviations: columns keep their order, since blocks are contiguous;
and a block's scales are ggml's own for what the block should be once those before it are known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ziggurat.converter import ggml
from ziggurat.converter.grids import GRIDS, Grid, pack, unpack

if TYPE_CHECKING:
    import torch

# Columns whose errors are fed forward one by one; to those behind them in one product.
LAZY = 32


class Codebook:
    """The levels of a grid, to round to."""

    def __init__(self, grid: Grid, device: torch.device) -> None:
        import torch

        self.levels = torch.tensor(grid.levels, dtype=torch.float32, device=device)
        self._between = (self.levels[1:] + self.levels[:-1]) / 2
        self._line = bool((self.levels[1:] - self.levels[:-1] == 1).all())
        self._lowest = grid.lowest

    def nearest(
        self, wanted: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes (int64) whose values scale * level - minimum are nearest, and these; all of one shape."""
        import torch

        level = (wanted + minimum) / torch.where(scale == 0, torch.inf, scale)
        if self._line:
            codes = (level - self.levels[0]).round().clamp(self._lowest, len(self.levels) - 1).long()
        else:
            codes = torch.bucketize(level, self._between)
        return codes, self.levels[codes] * scale - minimum


def unit_factor(metric: torch.Tensor) -> torch.Tensor:
    """The upper unit triangular M of H = M D M^T.

    Args:
        metric: H, positive definite, float32 of shape [c, c].
    """
    import torch

    # Cholesky factors are lower triangular: that of H read backwards is, read backwards, the upper one
    backwards = torch.linalg.cholesky(metric.flip(0, 1))
    factor: torch.Tensor = backwards.flip(0, 1)
    return factor.div_(factor.diagonal().clone())


def feed_back(
    rows: torch.Tensor, factor: torch.Tensor, type_id: int, importance: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.uint8]:
    """Quantize rows so that the error of their products with the inputs is small.

    Args:
        rows: float32 of shape [n, c].
        factor: `unit_factor` of the inputs' metric.
        type_id: a ggml type of `grids.GRIDS`, prepared.
        importance: of the columns, for ggml's choice of scales: shape [c].

    Returns:
        Shape [n, row bytes].

    Raises:
        QuantizeError: ggml finds non-finite scales.
    """
    import torch

    grid = GRIDS[type_id]
    book, wanted = Codebook(grid, rows.device), rows.T.contiguous()
    errors, parts = torch.zeros_like(wanted), []
    for begin in range(0, len(wanted), grid.block):
        here = slice(begin, begin + grid.block)
        inner, target = factor[here, here], wanted[here]
        if begin:
            owed = factor[:begin, here].T @ errors[:begin]
            # what the block should be if nothing in it had to be rounded
            target = target - torch.linalg.solve_triangular(inner.T, owed, upper=False, unitriangular=True)
        packed = np.empty((len(rows), grid.nbytes), np.uint8)
        values = np.ascontiguousarray(target.T.cpu().numpy())
        ggml.quantize_rows(
            type_id, values, packed, None if importance is None else np.ascontiguousarray(importance[here])
        )
        blocks = unpack(grid, packed)
        scale, minimum = (torch.from_numpy(x[:, 0].T.copy()).to(rows.device) for x in (blocks.scale, blocks.minimum))
        codes, rounded = _sweep(target, inner, book, scale, minimum, grid.group)
        blocks.codes[:, 0] = codes.T.cpu().numpy()
        errors[here] = rounded - wanted[here]
        parts.append(pack(grid, blocks))
    return np.concatenate(parts, 1)


def _sweep(
    target: torch.Tensor, factor: torch.Tensor, book: Codebook, scale: torch.Tensor, minimum: torch.Tensor, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a block's columns one after the other.

    Args:
        target: shape [block, n].
        factor: the block's own part of it, [block, block].
        book: the levels.
        scale: of the groups, [groups, n].
        minimum: likewise.
        group: columns of a group.

    Returns:
        Codes and values, [block, n] each.
    """
    import torch

    codes, rounded = torch.empty(target.shape, dtype=torch.uint8, device=target.device), torch.empty_like(target)
    errors = torch.zeros_like(target)
    for begin in range(0, len(target), LAZY):
        base = target[begin : begin + LAZY] - factor[:begin, begin : begin + LAZY].T @ errors[:begin]
        for j, column in enumerate(base, begin):
            column = column - factor[begin:j, j] @ errors[begin:j]
            codes[j], rounded[j] = book.nearest(column, scale[j // group], minimum[j // group])
            errors[j] = rounded[j] - target[j]
    return codes, rounded
