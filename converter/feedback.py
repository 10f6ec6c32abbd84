"""Codes chosen column by column, each making up for the errors of those before it: GPTQ on GGUF's blocks.

With H the Gram matrix of a layer's inputs, the error e = w' - w of a row costs e H e^T. Written as H = M D M^T, M upper
unit triangular and D diagonal, that is the sum over columns of D_jj ((e M)_j)^2: column j is best rounded to the value
nearest w_j - sum over i < j of e_i M_ij. That is GPTQ (Frantar et al., arXiv:2210.17323) in the form of LDLQ (Chee et
al., arXiv:2307.13304), which needs no inverse of H. Deviations: columns keep their order, since blocks are contiguous;
and a block's scales are ggml's own for what the block should be once those before it are known.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        self.between = (self.levels[1:] + self.levels[:-1]) / 2
        self.line = bool((self.levels[1:] - self.levels[:-1] == 1).all())
        self.zero = float(grid.levels[0])
        self.lowest, self.highest = float(grid.lowest), float(len(grid.levels) - 1)

    def level(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes, integers in float32, stand for."""
        return codes + self.zero if self.line else self.levels[codes.long()]

    def rounding(self, scale: torch.Tensor, minimum: torch.Tensor) -> Rounding:
        """To values scale * level - minimum; both of shape [n]."""
        return Rounding(self, scale, minimum)


class Rounding:
    """Rounds columns of a group, which have one scale and one minimum per row."""

    def __init__(self, book: Codebook, scale: torch.Tensor, minimum: torch.Tensor) -> None:
        import torch

        self._book, self._scale = book, scale
        none = scale == 0
        self._inverse = torch.where(none, 0.0, 1 / scale)
        if book.line:  # a value is offset + scale * code
            self._offset = book.zero * scale - minimum
            self._shift = torch.where(none, -book.zero, -self._offset * self._inverse)
        else:
            self._offset, self._shift = -minimum, minimum * self._inverse

    def __call__(self, wanted: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """The nearest values to `wanted`, and their codes to `codes`: float32 of shape [n] all."""
        import torch

        book = self._book
        torch.addcmul(self._shift, wanted, self._inverse, out=codes)
        if book.line:
            codes.round_().clamp_(book.lowest, book.highest)
            return torch.addcmul(self._offset, codes, self._scale)
        places = torch.bucketize(codes, book.between)
        codes.copy_(places)
        return torch.addcmul(self._offset, book.levels[places], self._scale)


def unit_factor(metric: torch.Tensor) -> torch.Tensor:
    """The upper unit triangular M of H = M D M^T.

    Args:
        metric: H, positive definite, float32 of shape [c, c].
    """
    import torch

    # Cholesky factors are lower triangular: that of H read backwards is, read backwards, the upper one
    backwards = metric.flip(0, 1)
    torch.linalg.cholesky(backwards, out=backwards)
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
        codes, rounded = _sweep(target, inner, [book.rounding(*pair) for pair in zip(scale, minimum, strict=True)])
        blocks.codes[:, 0] = codes.T.cpu().numpy()
        torch.sub(rounded, wanted[here], out=errors[here])
        parts.append(pack(grid, blocks))
    return np.concatenate(parts, 1)


def _sweep(
    target: torch.Tensor, factor: torch.Tensor, groups: Sequence[Rounding]
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Round a block's columns one after the other.

    Args:
        target: shape [block, n].
        factor: the block's own part of it, [block, block].
        groups: how the columns of each are rounded.

    Returns:
        Codes (uint8) and values, [block, n] each.
    """
    import torch

    codes, rounded, errors = torch.empty_like(target), torch.empty_like(target), torch.empty_like(target)
    columns, size = factor.T.contiguous(), len(target) // len(groups)
    for begin in range(0, len(target), LAZY):
        base = target[begin : begin + LAZY] - columns[begin : begin + LAZY, :begin] @ errors[:begin]
        for j, column in enumerate(base, begin):
            if j > begin:
                column = torch.addmv(column, errors[begin:j].T, columns[j, begin:j], alpha=-1)
            rounded[j] = groups[j // size](column, codes[j])
            torch.sub(rounded[j], target[j], out=errors[j])
    return codes.to(torch.uint8), rounded
