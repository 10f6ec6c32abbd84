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

from ziggurat.converter import ggml, kernels, rounding
from ziggurat.converter.grids import GRIDS, unpack_scales
from ziggurat.converter.parts import Parts

if TYPE_CHECKING:
    import torch


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
) -> Parts:
    """Quantize rows so that the error of their products with the inputs is small.

    Args:
        rows: float32 of shape [n, c].
        factor: `unit_factor` of the inputs' metric.
        type_id: a ggml type of `grids.GRIDS`, prepared.
        importance: of the columns, for ggml's choice of scales: shape [c].

    Raises:
        QuantizeError: ggml finds non-finite scales.
    """
    import torch

    grid = GRIDS[type_id]
    parts, wanted = Parts.zeros(grid, rows), rows.T.contiguous()
    for block, begin in enumerate(range(0, len(wanted), grid.block)):
        here, groups = slice(begin, begin + grid.block), slice(block * grid.groups, (block + 1) * grid.groups)
        inner = factor[here, here].contiguous()
        base = target = wanted[here]
        if begin:
            owed = factor[:begin, here].T @ parts.errors[:begin]
            base = base - owed
            # what the block should be if nothing in it had to be rounded
            target = target - torch.linalg.solve_triangular(inner.T, owed, upper=False, unitriangular=True)
        weights = None if importance is None else np.ascontiguousarray(importance[here])
        ours = parts.d[block], parts.dmin[block], parts.scales[groups], parts.mins[groups]
        for part, found in zip(ours, _ggml_scales(type_id, target, weights), strict=True):
            part.copy_(torch.from_numpy(found.T))
        scale, minimum = parts.scales[groups] * parts.d[block], parts.mins[groups] * parts.dmin[block]
        sweep = kernels.feed_back if rows.device.type == "cpu" else rounding.feed_back
        sweep(grid, inner, scale, minimum, base, wanted[here], parts.codes[here], parts.errors[here])
    return parts


def _ggml_scales(
    type_id: int, target: torch.Tensor, importance: npt.NDArray[np.float32] | None
) -> tuple[npt.NDArray[np.generic], ...]:
    """`grids.unpack_scales` of what ggml makes of a block [block, n]."""
    grid, values = GRIDS[type_id], target.T.contiguous().cpu().numpy()
    packed = np.empty((len(values), grid.nbytes), np.uint8)
    ggml.quantize_rows(type_id, values, packed, importance)
    return unpack_scales(grid, packed)
