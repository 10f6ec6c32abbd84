"""Coordinate descent on all that a quantized tensor is made of: scales, mins and codes, each in turn made the best.

The error e = w' - w of a row costs e H e^T. In each of d, dmin, the groups' integers and the codes that is a parabola,
given the others: each part moves to the grid's point nearest to its minimum, if that lowers the cost. Cyclic descent on
codes is known from CDQuant (Nair and Suggala, arXiv:2406.17542); here the scales take part. But for rounding, the cost
never rises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ziggurat.converter import kernels, rounding
from ziggurat.converter.grids import GRIDS, Grid
from ziggurat.converter.parts import Parts
from ziggurat.converter.rounding import Codebook, dot, move

if TYPE_CHECKING:
    import torch

# Two directions whose angle's sine squared is below this are as good as one.
PARALLEL = 1e-6


def descend(parts: Parts, metric: torch.Tensor, type_id: int, passes: int) -> None:
    """Improve the parts of quantized rows.

    Args:
        parts: of rows [n, c]; changed.
        metric: H, float32 of shape [c, c], its diagonal above zero.
        type_id: their ggml type, one of `grids.GRIDS`.
        passes: how often to go over all columns.
    """
    grid = GRIDS[type_id]
    for _ in range(passes):
        for block in range(len(parts.d)):
            _BlockDescent(grid, parts, metric, block).run()


class _BlockDescent:
    """One pass over a block of all rows; what it changes, it changes in the parts."""

    def __init__(self, grid: Grid, parts: Parts, metric: torch.Tensor, block: int) -> None:
        here = slice(block * grid.block, (block + 1) * grid.block)
        groups = slice(block * grid.groups, (block + 1) * grid.groups)
        self._grid, self._book = grid, Codebook(grid, metric.device)
        self._metric = metric[here, here].contiguous()
        # half the cost's derivative by each value
        self._gradient = metric[here] @ parts.errors
        self._errors, self._codes = parts.errors[here], parts.codes[here]
        self._scales, self._mins = parts.scales[groups], parts.mins[groups]
        self._d, self._dmin = parts.d[block], parts.dmin[block]

    def run(self) -> None:
        """The block's floats first, then what belongs to a group, group by group."""
        self._fit_halves()
        sweep = kernels.descend if self._errors.device.type == "cpu" else rounding.descend
        sweep(
            self._grid, self._metric, self._d, self._dmin, self._scales, self._mins, self._codes, self._errors,
            self._gradient,
        )  # fmt: skip

    def _fit_halves(self) -> None:
        """Move d and dmin to where the cost is least."""
        import torch

        n = self._errors.shape[1]
        levels = self._book.level(self._codes).view(self._grid.groups, self._grid.group, n)
        u = (levels * self._scales[:, None]).view(-1, n)
        hu = self._metric @ u
        uu, ug = dot(u, hu), dot(u, self._gradient)
        alone = torch.where(uu > 0, -ug / uu, 0.0)
        if self._grid.dmin is None:
            step, change = self._admissible(self._d, alone)
            better = change & (step * (step * uu + 2 * ug) < 0)
            move(self._gradient, self._errors, u, hu, self._d, torch.where(better, step, 0.0))
            return
        v = (-self._mins).repeat_interleave(self._grid.group, 0)
        # the same for all columns of a group: its columns of the metric are added first
        hv = self._metric.view(-1, self._grid.groups, self._grid.group).sum(2) @ -self._mins
        vv, uv, vg = dot(v, hv), dot(u, hv), dot(v, self._gradient)
        area = uu * vv - uv * uv
        two = area > PARALLEL * uu * vv
        step, fine = self._admissible(self._d, torch.where(two, (uv * vg - vv * ug) / area, alone))
        other, fine_too = self._admissible(self._dmin, torch.where(two, (uv * ug - uu * vg) / area, 0.0))
        cost = step * (step * uu + 2 * ug) + other * (other * vv + 2 * vg) + 2 * step * other * uv
        better = fine & fine_too & (cost < 0)
        move(self._gradient, self._errors, u, hu, self._d, torch.where(better, step, 0.0))
        move(self._gradient, self._errors, v, hv, self._dmin, torch.where(better, other, 0.0))

    @staticmethod
    def _admissible(value: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The step to the nearest float16, and where that is finite and no change of sign."""
        target = (value + step).half().float()
        fine = target.isfinite() & (target * value >= 0)
        return (target - value).where(fine, value.new_zeros(())), fine
