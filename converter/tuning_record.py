"""What a quantization was fitted on, as the report and the GGUF's metadata tell it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ziggurat.converter.compensate_step import TensorLoss
from ziggurat.converter.scale import LOSSES

PREFIX = "ziggurat.calibration."
IMATRIX = "quantize.imatrix."


@dataclass(frozen=True)
class CalibrationRecord:
    """The text that went through the model."""

    source: str
    """`built-in`, or the file or folder."""
    tokens: int
    sequence: int
    """Tokens in each sequence."""
    sha256: str
    """Hash of the tokens."""

    def metadata(self) -> dict[str, Any]:
        """Key to gguf value, as `upstream.Plan.metadata` has them: `ziggurat.calibration.*`."""
        from llama_cpp import _gguf as gguf

        kinds = gguf.GGUFValueType
        return {
            f"{PREFIX}source": gguf.GGUFValue(self.source, kinds.STRING),
            f"{PREFIX}tokens": gguf.GGUFValue(self.tokens, kinds.UINT32),
            f"{PREFIX}sequence": gguf.GGUFValue(self.sequence, kinds.UINT32),
            f"{PREFIX}hash": gguf.GGUFValue(self.sha256, kinds.STRING),
        }


@dataclass(frozen=True)
class ImportanceRecord:
    """An importance matrix that was gathered on it."""

    tensors: int
    """How many it has data for."""
    chunks: int
    dataset: str
    exported: str | None = None
    """Name of the file it was exported to."""
    unrouted: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Experts that no token came to, by tensor: the mean of the others' stands for theirs."""

    def metadata(self) -> dict[str, Any]:
        """What llama.cpp's quantizer notes about an importance matrix: `quantize.imatrix.*`."""
        from llama_cpp import _gguf as gguf

        kinds = gguf.GGUFValueType
        entries = {
            f"{IMATRIX}dataset": gguf.GGUFValue(self.dataset, kinds.STRING),
            f"{IMATRIX}entries_count": gguf.GGUFValue(self.tensors, kinds.UINT32),
            f"{IMATRIX}chunks_count": gguf.GGUFValue(self.chunks, kinds.UINT32),
        }
        if self.exported is not None:
            entries[f"{IMATRIX}file"] = gguf.GGUFValue(self.exported, kinds.STRING)
        return entries


@dataclass(frozen=True)
class ScalesRecord:
    """Activation-aware scales that were searched."""

    searched: int
    """Groups of tensors, all blocks together."""
    kept: int
    """Those whose scales lowered the error on held-out activations; the others have none."""
    loss: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By kind of group: mean relative squared error on them without and with the scales."""

    @classmethod
    def of(cls, found: Mapping[int, Mapping[str, npt.NDArray[Any]]]) -> ScalesRecord:
        """Sum up what `scale.ScaleSearch` found for each block."""
        losses: dict[str, list[npt.NDArray[Any]]] = {}
        for arrays in found.values():
            for key, value in arrays.items():
                if key.endswith(LOSSES):
                    losses.setdefault(key.removesuffix(LOSSES), []).append(value)
        means = {name: np.mean(values, axis=0) for name, values in losses.items()}
        return cls(
            searched=sum(len(values) for values in losses.values()),
            kept=sum(not key.endswith(LOSSES) for arrays in found.values() for key in arrays),
            loss={name: (float(mean[0]), float(mean[1])) for name, mean in means.items()},
        )

    def metadata(self) -> dict[str, Any]:
        """Key to gguf value: `ziggurat.scales.*`."""
        return _counts("scales", {"searched": self.searched, "kept": self.kept})


@dataclass(frozen=True)
class CompensationRecord:
    """Tensors whose codes were chosen with their errors compensated."""

    tensors: int
    """Quantized in the pass."""
    compensated: int
    """Those of them for which that lowered the error on held-out activations; the others are ggml's own."""
    loss: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By kind of tensor: mean relative squared error of the layer's output on them, by ggml alone and as written."""

    @classmethod
    def of(cls, losses: Sequence[TensorLoss]) -> CompensationRecord:
        """Sum up what `compensate_step.Compensation` did for each tensor."""
        kinds: dict[str, list[TensorLoss]] = {}
        for loss in losses:
            kinds.setdefault(loss.tensor.split(".")[2], []).append(loss)
        return cls(
            tensors=len(losses),
            compensated=sum(loss.loss < loss.plain for loss in losses),
            loss={
                kind: (float(np.mean([x.plain for x in of_kind])), float(np.mean([x.loss for x in of_kind])))
                for kind, of_kind in kinds.items()
            },
        )

    def metadata(self) -> dict[str, Any]:
        """Key to gguf value: `ziggurat.compensation.*`."""
        return _counts("compensation", {"tensors": self.tensors, "compensated": self.compensated})


def _counts(section: str, entries: Mapping[str, int]) -> dict[str, Any]:
    from llama_cpp import _gguf as gguf

    kind = gguf.GGUFValueType.UINT32
    return {f"ziggurat.{section}.{name}": gguf.GGUFValue(value, kind) for name, value in entries.items()}
