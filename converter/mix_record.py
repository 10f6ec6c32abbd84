"""What a mix of types is made of, and why, as the report and the GGUF's metadata tell it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ziggurat.converter import ggml
from ziggurat.converter.mix import Candidate


@dataclass(frozen=True)
class MixedTensor:
    """The type of one tensor."""

    type: str
    bytes: int
    loss: float
    """Measured, in nats per token: about the divergence of the model's predictions if it alone is quantized."""
    share: float
    """Of the summed loss."""


@dataclass(frozen=True)
class MixedKind:
    """Tensors of one kind, those of all blocks together."""

    types: dict[str, int]
    """How many have each type, the smallest first."""
    bytes: int
    loss: float
    share: float


@dataclass(frozen=True)
class MixRecord:
    """Types chosen so that the summed loss is smallest at a size."""

    target: str
    """What was asked for."""
    capacity: int
    """Bytes that all tensors could have."""
    bytes: int
    """That they have."""
    loss: float
    """Summed over the tensors."""
    kinds: dict[str, MixedKind]
    """By name without its block and `.weight`, the largest loss first."""
    tensors: dict[str, MixedTensor]
    """By name, in the file's order."""
    note: str | None = None
    """What the user should know."""

    @classmethod
    def of(
        cls, target: str, capacity: int, bytes_: int, chosen: Mapping[str, Candidate], note: str | None
    ) -> MixRecord:
        """Sum up a choice; `bytes_` is what all tensors take, those without a choice too."""
        total = sum(c.loss for c in chosen.values())
        tensors = {
            name: MixedTensor(ggml.type_name(c.type_id), c.bytes, c.loss, c.loss / total if total else 0.0)
            for name, c in chosen.items()
        }
        kinds: dict[str, list[Candidate]] = {}
        for name, candidate in chosen.items():
            kinds.setdefault(_kind(name), []).append(candidate)
        of_kinds = {kind: _sum_up(candidates, total) for kind, candidates in kinds.items()}
        by_loss = dict(sorted(of_kinds.items(), key=lambda item: (-item[1].loss, item[0])))
        return cls(target, capacity, bytes_, total, by_loss, tensors, note)

    @staticmethod
    def metadata(target: str) -> dict[str, Any]:
        """Key to gguf value: `ziggurat.mix.*`."""
        from llama_cpp import _gguf as gguf

        return {"ziggurat.mix.target": gguf.GGUFValue(target, gguf.GGUFValueType.STRING)}


def _kind(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[2:] if parts[0] == "blk" else parts)


def _sum_up(candidates: list[Candidate], total: float) -> MixedKind:
    counts: dict[int, int] = {}
    for candidate in sorted(candidates, key=lambda c: c.bytes):
        counts[candidate.type_id] = counts.get(candidate.type_id, 0) + 1
    loss = sum(c.loss for c in candidates)
    return MixedKind(
        types={ggml.type_name(type_id): count for type_id, count in counts.items()},
        bytes=sum(c.bytes for c in candidates),
        loss=loss,
        share=loss / total if total else 0.0,
    )
