"""Reads llama.cpp's importance matrix (its GGUF form): how much each column of each matrix matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ziggurat.converter.errors import ImatrixError

SUMS, COUNTS = ".in_sum2", ".counts"


def read_imatrix(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Mean squared activation of each input column, per tensor name: shape [experts, columns], experts 1 if dense.

    Experts that no token reached count all columns alike, as llama.cpp does.

    Raises:
        ImatrixError: the file is missing, damaged, in the legacy format, or holds non-finite values.
    """
    from llama_cpp import _gguf as gguf

    if path.is_dir():
        raise ImatrixError(f"{path} is a folder: name the file that llama-imatrix made")
    if not path.is_file():
        raise ImatrixError(f"{path} does not exist: make it with llama-imatrix")
    with path.open("rb") as f:
        if f.read(4) != b"GGUF":
            raise ImatrixError(f"{path} is not in GGUF form: convert a legacy file with `llama-imatrix --in-file`")
    try:
        tensors: dict[str, Any] = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    except (ValueError, IndexError, KeyError, OSError) as e:
        raise ImatrixError(f"{path} is damaged ({e}): make it again with llama-imatrix") from e
    importance: dict[str, npt.NDArray[np.float32]] = {}
    for name, sums in tensors.items():
        if not name.endswith(SUMS):
            continue
        stem = name.removesuffix(SUMS)
        counts = tensors.get(stem + COUNTS)
        if counts is None or np.size(counts) == 0 or np.size(sums) % np.size(counts):
            raise ImatrixError(f"{path}: the entry of {stem} has no counts that fit: make the file again")
        count = np.asarray(counts, np.float32).reshape(-1, 1)
        total = np.asarray(sums, np.float32).reshape(len(count), -1)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = np.where(count > 0, total / count, np.float32(1)).astype(np.float32)
        if not np.isfinite(mean).all():
            raise ImatrixError(f"{path}: the entry of {stem} has non-finite values: make the file again")
        importance[stem] = mean
    if not importance:
        raise ImatrixError(f"{path} holds no importance data: make it with llama-imatrix")
    return importance
