"""Rounding of blocks in torch, on any device: what `kernels` does on the processor, in many small operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ziggurat.converter.grids import Grid

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
        self.line = grid.line
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

        torch.addcmul(self._shift, wanted, self._inverse, out=codes)
        if self._book.line:
            codes.round_().clamp_(self._book.lowest, self._book.highest)
        else:
            codes.copy_(torch.bucketize(codes, self._book.between))
        return self.values(codes)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes [..., n] stand for."""
        import torch

        levels = codes if self._book.line else self._book.level(codes)
        return torch.addcmul(self._offset, levels, self._scale)


def feed_back(
    grid: Grid, factor: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor, base: torch.Tensor,
    target: torch.Tensor, codes: torch.Tensor, errors: torch.Tensor,
) -> None:  # fmt: skip
    """As `kernels.feed_back`."""
    import torch

    book, columns = Codebook(grid, base.device), factor.T.contiguous()
    groups = [book.rounding(*pair) for pair in zip(scales, mins, strict=True)]
    for begin in range(0, grid.block, LAZY):
        later = base[begin : begin + LAZY] - columns[begin : begin + LAZY, :begin] @ errors[:begin]
        for j, column in enumerate(later, begin):
            if j > begin:
                column = torch.addmv(column, errors[begin:j].T, columns[j, begin:j], alpha=-1)
            torch.sub(groups[j // grid.group](column, codes[j]), target[j], out=errors[j])


def descend(
    grid: Grid, metric: torch.Tensor, d: torch.Tensor, dmin: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor,
    codes: torch.Tensor, errors: torch.Tensor, gradient: torch.Tensor,
) -> None:  # fmt: skip
    """As `kernels.descend`; the gradient changes too."""
    book, (lowest, largest) = Codebook(grid, metric.device), grid.scale_range
    for group in range(grid.groups):
        here = slice(group * grid.group, (group + 1) * grid.group)
        inner, slope, error = metric[here, here], gradient[here], errors[here]
        before = error.clone()
        if lowest != largest:
            _fit_integer(grid, inner, book.level(codes[here]) * d, scales[group], slope, error)
            if grid.dmin is not None:
                _fit_integer(grid, inner, (-dmin).expand(grid.group, -1), mins[group], slope, error)
        _recode(book.rounding(scales[group] * d, mins[group] * dmin), inner, codes[here], slope, error)
        # the groups before this one are done with
        gradient[here.stop :].addmm_(metric[here.stop :, here], error - before)


def _fit_integer(
    grid: Grid, metric: torch.Tensor, u: torch.Tensor, integer: torch.Tensor, gradient: torch.Tensor,
    errors: torch.Tensor,
) -> None:  # fmt: skip
    """Move a group's scale or min, by which its values change along `u`, to the best integer."""
    import torch

    hu = metric @ u
    uu, ug = dot(u, hu), dot(u, gradient)
    step = torch.where(uu > 0, (integer - ug / uu).round_().clamp_(*grid.scale_range) - integer, 0.0)
    move(gradient, errors, u, hu, integer, torch.where(step * (step * uu + 2 * ug) < 0, step, 0.0))


def _recode(
    nearest: Rounding, metric: torch.Tensor, codes: torch.Tensor, gradient: torch.Tensor, errors: torch.Tensor
) -> None:
    """Choose the codes of a group again, one column after the other."""
    import torch

    values = nearest.values(codes)
    changes = torch.empty_like(values)
    for j, curvature in enumerate(metric.diagonal().tolist()):
        slope = torch.addmv(gradient[j], changes[:j].T, metric[j, :j]) if j else gradient[j]
        rounded = nearest(torch.sub(values[j], slope, alpha=1 / curvature), codes[j])
        torch.sub(rounded, values[j], out=changes[j])
    errors += changes


def move(
    gradient: torch.Tensor, errors: torch.Tensor, u: torch.Tensor, hu: torch.Tensor, value: torch.Tensor,
    step: torch.Tensor,
) -> None:  # fmt: skip
    """Change a value, and with it errors along `u` and their gradient along `hu`."""
    value += step
    errors.addcmul_(u, step)
    gradient.addcmul_(hu, step)


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sums of products over the columns: shape [n]."""
    return (a * b).sum(0)
