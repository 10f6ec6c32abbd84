"""A quantized tensor taken apart, columns first, while its parts are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ziggurat.converter.grids import Blocks, Grid, pack

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Parts:
    """All are contiguous float32, on the device of the rows [n, c] they stand for, and change in place."""

    d: torch.Tensor
    """Shape [blocks of a row, n], like dmin."""
    dmin: torch.Tensor
    scales: torch.Tensor
    """Integers, shape [groups of a row, n], like mins."""
    mins: torch.Tensor
    codes: torch.Tensor
    """Integers, shape [c, n]."""
    errors: torch.Tensor
    """What the parts stand for, less the rows: shape [c, n]."""

    @staticmethod
    def zeros(grid: Grid, rows: torch.Tensor) -> Parts:
        """All zero."""
        n, c = rows.shape
        blocks = c // grid.block
        lengths = blocks, blocks, blocks * grid.groups, blocks * grid.groups, c, c
        return Parts(*(rows.new_zeros((length, n)) for length in lengths))

    def packed(self, grid: Grid) -> npt.NDArray[np.uint8]:
        """The tensor: shape [n, row bytes]."""
        import torch

        def turned(x: torch.Tensor, dtype: torch.dtype, *inner: int) -> npt.NDArray[Any]:
            return x.to(dtype).T.contiguous().cpu().numpy().reshape(x.shape[1], len(self.d), *inner)

        blocks = Blocks(
            d=turned(self.d, torch.float16),
            dmin=turned(self.dmin, torch.float16),
            scales=turned(self.scales, torch.int16, grid.groups),
            mins=turned(self.mins, torch.int16, grid.groups),
            codes=turned(self.codes, torch.uint8, grid.block),
        )
        return pack(grid, blocks)
