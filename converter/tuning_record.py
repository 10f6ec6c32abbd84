"""What a quantization was fitted on, as the report and the GGUF's metadata tell it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
