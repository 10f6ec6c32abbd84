"""What a search looks at of a layer's inputs: a sample of their rows, and their Gram matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sampled:
    """Of one block, by the layers that lead (`activations.Collector.leaders`)."""

    rows: Mapping[str, torch.Tensor]
    """float32, shape [at most as many as asked for, columns]."""
    experts: Mapping[str, torch.Tensor]
    """For the experts of a mixture: which of them read each row, int64 of shape [rows]."""
    grams: Mapping[str, torch.Tensor]
    """Sum of x x^T, float32 of shape [columns, columns]; not of experts."""


@dataclass
class _Rows:
    """Rows of one layer, or of one expert."""

    limit: int
    parts: list[torch.Tensor] = field(default_factory=list)
    taken: int = 0

    def take(self, x: torch.Tensor, share: float) -> None:
        """Take evenly spread rows of `x`, so that with a `share` of all inputs seen that share of the limit is."""
        import torch

        count = min(int(self.limit * share + 1e-9) - self.taken, len(x))
        if count > 0:
            places = torch.arange(count, device=x.device) * len(x) // count
            self.parts.append(x[places])
            self.taken += count


class Sampler:
    """An `activations.Observer` that keeps rows evenly spread over `batches` batches, the same every time."""

    def __init__(self, rows: int, batches: int, *, grams: bool) -> None:
        self._limit, self._batches, self._with_grams = rows, batches, grams
        self._batch = 0
        self._rows: dict[str, dict[int, _Rows]] = {}
        self._grams: dict[str, torch.Tensor] = {}

    def begin_batch(self) -> None:
        """The inputs that follow are of the next batch; none is kept after the last."""
        self._batch += 1

    def add(self, leader: str, x: torch.Tensor, expert: int | None, experts: int | None) -> None:
        """Inputs [n, columns] of a layer, or of one of its experts."""
        import torch

        if self._batch > self._batches:
            return
        limit = self._limit if experts is None else max(1, self._limit // experts)
        mine = self._rows.setdefault(leader, {}).setdefault(-1 if expert is None else expert, _Rows(limit))
        mine.take(x, self._batch / self._batches)
        if self._with_grams and expert is None:
            if leader not in self._grams:
                self._grams[leader] = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
            self._grams[leader].addmm_(x.T, x)

    def take(self) -> Sampled:
        """What was gathered; begins anew."""
        import torch

        rows, experts = {}, {}
        for leader, of_expert in self._rows.items():
            kept = {expert: torch.cat(r.parts) for expert, r in sorted(of_expert.items()) if r.parts}
            rows[leader] = torch.cat(list(kept.values()))
            if -1 not in kept:
                sizes = torch.tensor([len(x) for x in kept.values()])
                experts[leader] = torch.repeat_interleave(torch.tensor(list(kept)), sizes)
        result = Sampled(rows, experts, self._grams)
        self._rows, self._grams, self._batch = {}, {}, 0
        return result
