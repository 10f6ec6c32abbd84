"""Muon (Jordan et al. 2024): momentum whose step is made orthogonal, for the matrices inside the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(batch: Tensor, steps: int = 5) -> Tensor:
    """Replace the singular values of matrices [n, rows, columns] by about 1 (quintic Newton-Schulz iteration)."""
    a, b, c = NEWTON_SCHULZ
    tall = batch.shape[1] > batch.shape[2]
    x = (batch.mT if tall else batch).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    out: Tensor = (x.mT if tall else x).to(batch.dtype)
    return out


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; matrices of one shape are handled in one batch.

    A group may carry `scale`, a factor on the learning rate that schedules leave alone.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.95, decay: float = 0.005) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay, "scale": 1.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                self._update(parameters, group, max(1.0, shape[0] / shape[1]) ** 0.5)

    def _update(self, parameters: list[Tensor], group: dict[str, Any], stretch: float) -> None:
        directions = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            momentum = state.setdefault("momentum", torch.zeros_like(parameter))
            momentum.mul_(group["momentum"]).add_(parameter.grad)
            directions.append(parameter.grad.add(momentum, alpha=group["momentum"]))
        rate = group["lr"] * group["scale"]
        for parameter, update in zip(parameters, orthogonalise(torch.stack(directions)), strict=True):
            parameter.mul_(1 - rate * group["decay"]).add_(update, alpha=-rate * stretch)
