"""What a model loses when a matrix is quantized to one type or another, in nats per token.

To second order, the divergence of a changed model's predictions from the model's own is half the mean square of the
directional derivative of log p(y | text), with y drawn from the model's prediction (its Fisher information). Of a
matrix's change E that derivative is, per sequence of text, the sum over rows r of G_r . E_r with G = sum over positions
of g x^T: x what the matrix reads, g the gradient at what it gives. Rows are quantized on their own, so the products of
different rows cancel out on average and are left out: sum over r of (G_r . E_r)^2 is what the mean is taken of.

This is the quadratic model of Optimal Brain Damage (LeCun et al., 1990) with the quantizer's own error in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ziggurat.converter import ggml
from ziggurat.converter.trial import restored

if TYPE_CHECKING:
    import torch

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

BLOCK = 256  # values that share a block in K and IQ types (QK_K)

# enum ggml_type
K_AND_IQ = {
    "iq2_xxs": 16, "iq2_xs": 17, "iq2_s": 22, "q2_K": 10, "iq3_xxs": 18, "iq3_s": 21, "q3_K": 11, "iq4_xs": 23,
    "iq4_nl": 20, "q4_K": 12, "q5_K": 13, "q6_K": 14, "q8_0": 8,
}  # fmt: skip
SMALL_BLOCKS = {"q4_0": 2, "iq4_nl": 20, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8}
SMALL_BLOCK = 32


@dataclass(frozen=True)
class LossSettings:
    """On how much of a matrix its losses are measured."""

    share: float = 1 / 16
    """Of its rows,"""
    least_rows: int = 64
    most_rows: int = 256
    least_values: int = 1 << 15
    """Weights that are taken at least, in whole rows, whatever the other bounds say."""
    head_rows: int = 512
    """Rows of the matrix that makes the logits."""

    def rows(self, rows: int, columns: int) -> int:
        """How many of a matrix's rows."""
        wanted = min(max(int(self.share * rows), self.least_rows), self.most_rows)
        return min(rows, max(wanted, -(-self.least_values // columns)))


@dataclass
class Seen:
    """What one matrix read and what gradients came back, by sequence."""

    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    """[n, columns]"""
    gradients: dict[int, torch.Tensor] = field(default_factory=dict)
    """[n, rows]"""


@dataclass(frozen=True)
class Quantizing:
    """How a tensor would be quantized."""

    types: Sequence[int]
    importance: Float32 | None = None
    """Of its scaled columns: [experts or 1, columns]."""
    scales: Float32 | None = None
    """What its columns are multiplied by before: [experts or 1, columns]."""

    def errors(self, rows: torch.Tensor, expert: int, type_id: int, pool: Executor) -> torch.Tensor:
        """What quantization changes in rows of the unscaled tensor: float32, of their shape, where they are."""
        import torch

        values = rows.float().cpu().numpy()
        importance, scales = _of(self.importance, expert), _of(self.scales, expert)
        if scales is None:
            return torch.from_numpy(restored(values, type_id, pool, importance) - values).to(rows.device)
        scaled = values * scales
        return torch.from_numpy((restored(scaled, type_id, pool, importance) - scaled) / scales).to(rows.device)


def _of(values: Float32 | None, expert: int) -> Float32 | None:
    return None if values is None else values[expert % len(values)]


def candidate_types(columns: int, *, importance: bool) -> list[int]:
    """The ggml types of 2 to 8 bits that rows of `columns` values can have; none if they fit no block."""
    found = K_AND_IQ if columns % BLOCK == 0 else SMALL_BLOCKS if columns % SMALL_BLOCK == 0 else {}
    types = [t for t in found.values() if importance or not ggml.needs_importance(t)]
    for type_id in types:
        ggml.prepare(type_id)
    return types


def matrix_losses(
    matrices: Sequence[torch.Tensor], seen: Sequence[Seen], how: Quantizing, tokens: int, settings: LossSettings,
    pool: Executor,
) -> Float64:  # fmt: skip
    """Losses of a tensor by type, measured on rows that matter: those are taken the likelier, and weigh the less.

    Args:
        matrices: one, or one per expert: [rows, columns] each.
        seen: of each of them.
        how: the types, and with what they are quantized.
        tokens: how many went through the model.
        settings: how many rows.
        pool: who quantizes.

    Returns:
        Shape [types], nats per token.
    """
    import torch

    rows, columns = matrices[0].shape
    mass = torch.stack([
        sum((g.double().square().sum(0) for g in s.gradients.values()), torch.zeros((), device=m.device).double())
        * m.float().square().sum(1).double()
        for m, s in zip(matrices, seen, strict=True)
    ])  # fmt: skip
    places, weights = systematic(mass.flatten().cpu().numpy(), settings.rows(mass.numel(), columns))
    total = np.zeros(len(how.types))
    for expert in np.unique(places // rows):
        mine = places // rows == expert
        chosen = torch.from_numpy(places[mine] % rows).to(mass.device)
        weight = torch.from_numpy(weights[mine]).to(mass.device)
        part = matrices[expert][chosen]
        sums = [
            g[:, chosen].T.float() @ seen[expert].inputs[i].float() for i, g in seen[expert].gradients.items()
        ]  # of each sequence G, [chosen, columns]
        for i, type_id in enumerate(how.types):
            errors = how.errors(part, int(expert), type_id, pool)
            total[i] += sum(float(((g * errors).double().sum(1).square() * weight).sum()) for g in sums)
    return total / (2 * tokens)


def head_losses(
    matrix: torch.Tensor, inputs: torch.Tensor, shares: torch.Tensor, places: npt.NDArray[np.int64], weights: Float64,
    how: Quantizing, pool: Executor,
) -> Float64:  # fmt: skip
    """Losses of the matrix that makes the logits: there the mean over labels is known.

    Args:
        matrix: [n_vocab, columns].
        inputs: what it reads: [tokens, columns].
        shares: p (1 - p) of the predictions for the rows at `places`: [tokens, places].
        places: rows to measure on.
        weights: how much each counts.
        how: the types, and with what they are quantized.
        pool: who quantizes.

    Returns:
        Shape [types], nats per token.
    """
    import torch

    rows = matrix[torch.from_numpy(places).to(matrix.device)]
    weight = torch.from_numpy(weights).to(matrix.device)
    total = np.zeros(len(how.types))
    for i, type_id in enumerate(how.types):
        change = inputs @ how.errors(rows, 0, type_id, pool).T
        total[i] = float(((shares * change.square()).double().sum(0) * weight).sum())
    return total / (2 * len(inputs))


def embedding_losses(
    ids: npt.NDArray[np.integer], rows: torch.Tensor, unique: npt.NDArray[np.integer], gradients: torch.Tensor,
    how: Quantizing, pool: Executor,
) -> Float64:  # fmt: skip
    """Losses of the token embedding, whose rows are quantized on their own as well.

    Args:
        ids: [sequences, positions].
        rows: those of the embedding that are in `ids`, [unique, n_embd].
        unique: their ids, ascending.
        gradients: at what the embedding gives: [sequences, positions, n_embd].
        how: the types, and with what they are quantized.
        pool: who quantizes.

    Returns:
        Shape [types], nats per token.
    """
    import torch

    sums = []
    for sequence, gradient in zip(ids, gradients, strict=True):
        mine, places = np.unique(sequence, return_inverse=True)
        g = torch.zeros(len(mine), gradient.shape[-1]).index_add_(0, torch.from_numpy(places), gradient.cpu().float())
        sums.append((torch.from_numpy(np.searchsorted(unique, mine)), g))
    total = np.zeros(len(how.types))
    for i, type_id in enumerate(how.types):
        errors = how.errors(rows, 0, type_id, pool)
        total[i] = sum(float((g * errors[places]).double().sum(1).square().sum()) for places, g in sums)
    return total / (2 * ids.size)


def systematic(mass: Float64, count: int) -> tuple[npt.NDArray[np.int64], Float64]:
    """About `count` places, evenly spread over the cumulated mass, and what each stands for.

    A sum over all places of values that are about proportional to the mass is about the weighted sum over those taken
    (systematic sampling with probability proportional to size).
    """
    if count >= len(mass):
        return np.arange(len(mass)), np.ones(len(mass))
    if not mass.sum() > 0:
        return np.arange(count) * len(mass) // count, np.full(count, len(mass) / count)
    cumulated = np.cumsum(mass / mass.sum())
    hits = np.searchsorted(cumulated, (np.arange(count) + 0.5) / count * cumulated[-1])
    places, times = np.unique(np.minimum(hits, len(mass) - 1), return_counts=True)
    return places, times / (count * (mass[places] / mass.sum()))
