"""Calibration text to tokens: the text that ships with the package, or a file or folder of one's own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class CalibrationTokens:
    """Sequences of token ids, and where they come from."""

    ids: npt.NDArray[np.int32]
    """Shape [sequences, positions]."""
    source: str = "built-in"
    """The built-in text, or the file or folder it was read from."""

    @cached_property
    def sha256(self) -> str:
        """Hash of the ids."""
        return hashlib.sha256(np.ascontiguousarray(self.ids, np.int32).tobytes()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """What a record of a conversion says about them."""
        sequences, positions = self.ids.shape
        return {"source": self.source, "sequences": sequences, "positions": positions, "sha256": self.sha256}
