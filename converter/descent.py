"""Coordinate descent on all that a quantized tensor is made of: scales, mins and codes, each in turn made the best.

The error e = w' - w of a row costs e H e^T. In each of d, dmin, the groups' integers and the codes that is a parabola,
given the others: each part moves to the grid's point nearest to its minimum, if that lowers the cost. Cyclic descent on
codes is known from CDQuant (Nair and Suggala, arXiv:2406.17542); here the scales take part. But for rounding, the cost
never rises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ziggurat.converter.feedback import Codebook
from ziggurat.converter.grids import GRIDS, Blocks, Grid, dequantize, pack, unpack

if TYPE_CHECKING:
    import torch

# Two directions whose angle's sine squared is below this are as good as one.
PARALLEL = 1e-6


def descend(
    packed: npt.NDArray[np.uint8], rows: torch.Tensor, metric: torch.Tensor, type_id: int, passes: int
) -> npt.NDArray[np.uint8]:
    """Improve quantized rows.

    Args:
        packed: of a ggml type of `grids.GRIDS`, shape [n, row bytes].
        rows: what they should be, float32 of shape [n, c].
        metric: H, float32 of shape [c, c], its diagonal above zero.
        type_id: their type.
        passes: how often to go over all columns.

    Returns:
        Shape [n, row bytes].
    """
    grid = GRIDS[type_id]
    state = _State.of(grid, packed, rows)
    for _ in range(passes):
        for block in range(rows.shape[1] // grid.block):
            _BlockDescent(grid, state, metric, block).run()
    return state.packed(grid)


@dataclass
class _State:
    """A tensor taken apart, columns first."""

    d: torch.Tensor
    """float32 of shape [blocks, n], like dmin."""
    dmin: torch.Tensor
    scales: torch.Tensor
    """float32 of shape [all groups, n], like mins."""
    mins: torch.Tensor
    codes: torch.Tensor
    """Integers in float32, shape [c, n]."""
    errors: torch.Tensor
    """What the parts stand for, less what they should be: float32 of shape [c, n]."""
    book: Codebook

    @staticmethod
    def of(grid: Grid, packed: npt.NDArray[np.uint8], rows: torch.Tensor) -> _State:
        import torch

        def turned(x: npt.NDArray[Any], dtype: type) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(x.reshape(len(x), -1).T, dtype)).to(rows.device)

        blocks = unpack(grid, packed)
        return _State(
            d=turned(blocks.d, np.float32),
            dmin=turned(blocks.dmin, np.float32),
            scales=turned(blocks.scales, np.float32),
            mins=turned(blocks.mins, np.float32),
            codes=turned(blocks.codes, np.float32),
            errors=turned(dequantize(grid, blocks), np.float32) - rows.T,
            book=Codebook(grid, rows.device),
        )

    def packed(self, grid: Grid) -> npt.NDArray[np.uint8]:
        def turned(x: torch.Tensor, dtype: type, *inner: int) -> npt.NDArray[Any]:
            return x.T.cpu().numpy().astype(dtype).reshape(x.shape[1], len(self.d), *inner)

        blocks = Blocks(
            d=turned(self.d, np.float16),
            dmin=turned(self.dmin, np.float16),
            scales=turned(self.scales, np.int16, grid.groups),
            mins=turned(self.mins, np.int16, grid.groups),
            codes=turned(self.codes, np.uint8, grid.block),
        )
        return pack(grid, blocks)


class _BlockDescent:
    """One pass over a block of all rows; what it changes, it changes in the state."""

    def __init__(self, grid: Grid, state: _State, metric: torch.Tensor, block: int) -> None:
        here = slice(block * grid.block, (block + 1) * grid.block)
        groups = slice(block * grid.groups, (block + 1) * grid.groups)
        self._grid, self._book = grid, state.book
        self._metric = metric[here, here]
        # half the cost's derivative by each value
        self._gradient = metric[here] @ state.errors
        self._errors, self._codes = state.errors[here], state.codes[here]
        self._scales, self._mins = state.scales[groups], state.mins[groups]
        self._d, self._dmin = state.d[block], state.dmin[block]

    def run(self) -> None:
        self._fit_halves()
        lowest, largest = self._grid.scale_range
        for group in range(self._grid.groups):
            here = slice(group * self._grid.group, (group + 1) * self._grid.group)
            before = self._errors[here].clone()
            if lowest != largest:
                self._fit_integer(self._scales[group], self._book.level(self._codes[here]) * self._d, here)
                if self._grid.dmin is not None:
                    self._fit_integer(self._mins[group], (-self._dmin).expand(self._grid.group, -1), here)
            self._recode(group, here)
            # the groups before this one are done with
            self._gradient[here.stop :].addmm_(self._metric[here.stop :, here], self._errors[here] - before)

    def _fit_halves(self) -> None:
        """Move d and dmin to where the cost is least."""
        import torch

        n = self._errors.shape[1]
        levels = self._book.level(self._codes).view(self._grid.groups, self._grid.group, n)
        u = (levels * self._scales[:, None]).view(-1, n)
        hu = self._metric @ u
        uu, ug = _dot(u, hu), _dot(u, self._gradient)
        alone = torch.where(uu > 0, -ug / uu, 0.0)
        if self._grid.dmin is None:
            step, change = self._admissible(self._d, alone)
            better = change & (step * (step * uu + 2 * ug) < 0)
            self._move(self._gradient, self._errors, u, hu, self._d, torch.where(better, step, 0.0))
            return
        v = (-self._mins).repeat_interleave(self._grid.group, 0)
        hv = self._metric @ v
        vv, uv, vg = _dot(v, hv), _dot(u, hv), _dot(v, self._gradient)
        area = uu * vv - uv * uv
        two = area > PARALLEL * uu * vv
        step, fine = self._admissible(self._d, torch.where(two, (uv * vg - vv * ug) / area, alone))
        other, fine_too = self._admissible(self._dmin, torch.where(two, (uv * ug - uu * vg) / area, 0.0))
        cost = step * (step * uu + 2 * ug) + other * (other * vv + 2 * vg) + 2 * step * other * uv
        better = fine & fine_too & (cost < 0)
        self._move(self._gradient, self._errors, u, hu, self._d, torch.where(better, step, 0.0))
        self._move(self._gradient, self._errors, v, hv, self._dmin, torch.where(better, other, 0.0))

    @staticmethod
    def _admissible(value: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The step to the nearest float16, and where that is finite and no change of sign."""
        target = (value + step).half().float()
        fine = target.isfinite() & (target * value >= 0)
        return (target - value).where(fine, value.new_zeros(())), fine

    def _fit_integer(self, integer: torch.Tensor, u: torch.Tensor, here: slice) -> None:
        """Move a group's scale or min, by which its values change along `u`, to the best integer."""
        import torch

        gradient = self._gradient[here]
        hu = self._metric[here, here] @ u
        uu, ug = _dot(u, hu), _dot(u, gradient)
        step = torch.where(uu > 0, (integer - ug / uu).round_().clamp_(*self._grid.scale_range) - integer, 0.0)
        better = step * (step * uu + 2 * ug) < 0
        self._move(gradient, self._errors[here], u, hu, integer, torch.where(better, step, 0.0))

    @staticmethod
    def _move(
        gradient: torch.Tensor, errors: torch.Tensor, u: torch.Tensor, hu: torch.Tensor, value: torch.Tensor,
        step: torch.Tensor,
    ) -> None:  # fmt: skip
        value += step
        errors.addcmul_(u, step)
        gradient.addcmul_(hu, step)

    def _recode(self, group: int, here: slice) -> None:
        """Choose the codes of a group again, one column after the other."""
        import torch

        scale, minimum = self._scales[group] * self._d, self._mins[group] * self._dmin
        nearest, inner, codes = self._book.rounding(scale, minimum), self._metric[here, here], self._codes[here]
        gradient = self._gradient[here]
        values = torch.addcmul(-minimum, self._book.level(codes), scale)
        changes = torch.empty_like(values)
        for j, curvature in enumerate(inner.diagonal().tolist()):
            slope = torch.addmv(gradient[j], changes[:j].T, inner[j, :j]) if j else gradient[j]
            rounded = nearest(torch.sub(values[j], slope, alpha=1 / curvature), codes[j])
            torch.sub(rounded, values[j], out=changes[j])
        self._errors[here] += changes


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sums of products over the columns: shape [n]."""
    return (a * b).sum(0)
