"""Least squares that make up for removed blocks, folded into down projections. Pure functions on sums over tokens.

Let a kept block add M = W z to the residual stream (W its down projection, z the activations it reads), and let D be
what the stream lacks after it: the hidden state of the whole model where the removed blocks end, minus that of the cut
model. ReplaceMe (Shopkhoev et al., arXiv 2505.02819) finds T with T M close to M + D and writes T W in W's place. Two
deviations, both because they measure better:

- the regularization pulls T towards the identity instead of zero, so that its strong end is no repair at all;
- where the projection is one matrix, D is regressed on z itself and W becomes W + B: as many inputs as the MLP is
  wide, not as the model. T M is the special case B = (T - 1) W, so it stays exact when D is linear in M.

Tokens weigh by the size of the wanted hidden state (`weights`): the norm before the next block divides by it, and a few
tokens of enormous states, the first of a text, would otherwise decide everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

# Relative to the mean square of the regressors; the search goes from the one in the middle to where it gets no better.
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 100.0)
USUAL_RIDGE = 1e-1

# Systems with more unknowns are solved in float32: in float64 they are most of what a repair takes.
EXACT_COLUMNS = 2048

# So many outputs, evenly spread, decide about the ridge of all.
TRIAL_OUTPUTS = 256


@dataclass(frozen=True)
class Sums:
    """Sums over tokens for regressing D on X, kept in float64."""

    xtx: torch.Tensor
    """[f, f]"""
    xtd: torch.Tensor
    """[f, d]"""
    dtd: float
    """Sum of squares of D: what is lacking without repair."""

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.xtx + other.xtx, self.xtd + other.xtd, self.dtd + other.dtd)


@dataclass(frozen=True)
class Correction:
    """B [f, d] with X B close to D, as chosen on held-out tokens."""

    matrix: torch.Tensor
    ridge: float
    left: float
    """Share of D's sum of squares on the held-out tokens that the correction leaves, below 1."""


def weights(wanted: torch.Tensor) -> torch.Tensor:
    """Weight of each token, [n]: one over the mean square of its wanted hidden state; `wanted` of shape [n, d]."""
    import torch

    square = wanted.double().square().mean(-1)
    return 1.0 / square.clamp_min(torch.finfo(torch.float32).tiny)


def sums(x: torch.Tensor, lacking: torch.Tensor, weight: torch.Tensor) -> Sums:
    """Sums of a few tokens: regressors `x` [n, f], `lacking` [n, d], `weight` [n]."""
    kind = _product_type(x.shape[1])
    x, d = ((part.double() * weight.sqrt()[:, None]).to(kind) for part in (x, lacking))
    return Sums((x.T @ x).double(), (x.T @ d).double(), float((lacking.double().square().sum(-1) * weight).sum()))


def solve(train: Sums, ridge: float, outputs: slice = slice(None)) -> torch.Tensor:
    """B [f, d] that minimizes |X B - D|² + ridge · mean square of X · |B|² on the sums; of it the columns `outputs`."""
    import torch

    kind = _product_type(len(train.xtx))
    regularized = train.xtx.to(kind, copy=True)
    regularized.diagonal().add_(ridge * float(train.xtx.diagonal().mean()))
    factor, info = torch.linalg.cholesky_ex(regularized)
    del regularized
    wanted = train.xtd[:, outputs]
    if int(info) != 0:  # not positive definite at this precision
        return torch.full_like(wanted, float("nan"))
    solution: torch.Tensor = torch.cholesky_solve(wanted.to(kind), factor).double()
    return solution


def explained(held_out: Sums, matrix: torch.Tensor, outputs: slice = slice(None)) -> float:
    """How much `matrix`, the columns `outputs` of a B, lowers the sum of squares of D on the tokens of `held_out`."""
    kind = _product_type(len(matrix))
    given = (held_out.xtx.to(kind) @ matrix.to(kind)).double()
    return float(2 * (matrix * held_out.xtd[:, outputs]).sum() - (matrix * given).sum())


def left(held_out: Sums, matrix: torch.Tensor) -> float:
    """Share of D's sum of squares that `matrix` leaves on the tokens of `held_out`: 1 without any correction."""
    return 1 - explained(held_out, matrix) / held_out.dtd


def choose(train: Sums, held_out: Sums) -> Correction | None:
    """The correction whose regularization does best on held-out tokens; None if none is better than nothing there.

    What a ridge explains of the held-out tokens rises with it and then falls, so that few of `RIDGES` have to be
    tried, on a part of the outputs: each takes a factorization and a solution.
    """
    if not (np.isfinite(train.dtd) and np.isfinite(held_out.dtd)) or held_out.dtd <= 0 or train.dtd <= 0:
        return None
    outputs = slice(None, None, max(1, train.xtd.shape[1] // TRIAL_OUTPUTS))

    def tried(index: int) -> float:
        gain = explained(held_out, solve(train, RIDGES[index], outputs), outputs)
        return gain if np.isfinite(gain) else -np.inf

    best = start = RIDGES.index(USUAL_RIDGE)
    gain = tried(start)
    for step in (1, -1):
        while 0 <= best + step < len(RIDGES):
            other = tried(best + step)
            if other <= gain and np.isfinite(gain):
                break
            best, gain = best + step, other
        if best != start:
            break
    if not gain > 0:
        return None
    matrix = solve(train, RIDGES[best])
    share = left(held_out, matrix)
    return Correction(matrix, RIDGES[best], share) if share < 1 else None


def _product_type(columns: int) -> torch.dtype:
    import torch

    return torch.float64 if columns <= EXACT_COLUMNS else torch.float32


@dataclass(frozen=True)
class Fold:
    """What one down projection becomes: `add` [d, f] is added to its matrix, `times` [d, d] multiplies what it gives.

    At most one of them. `times` also works where the projection is one matrix per expert, or has a bias.
    """

    add: npt.NDArray[np.float32] | None = None
    times: npt.NDArray[np.float32] | None = None

    def weight(self, matrix: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """The new matrix or matrices, for [..., d, f]."""
        old = np.asarray(matrix, np.float32)
        if self.add is not None:
            return old + self.add
        return old if self.times is None else np.matmul(self.times, old)

    def bias(self, bias: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """The new bias, for [d]."""
        old = np.asarray(bias, np.float32)
        return old if self.times is None else self.times @ old


def fold_inputs(correction: Correction) -> Fold:
    """Fold a correction that was regressed on the projection's inputs z."""
    return Fold(add=np.ascontiguousarray(correction.matrix.T.float().cpu().numpy()))


def fold_outputs(correction: Correction) -> Fold:
    """Fold a correction that was regressed on the projection's outputs M: T = 1 + B^T."""
    import torch

    times = correction.matrix.T.cpu() + torch.eye(len(correction.matrix), dtype=correction.matrix.dtype)
    return Fold(times=np.ascontiguousarray(times.float().numpy()))
