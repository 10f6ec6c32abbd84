"""llama.cpp's importance matrix (its GGUF form): how much each column of each matrix matters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ziggurat.converter.errors import ImatrixError
from ziggurat.converter.quantize import F32
from ziggurat.converter.write import GGUFFile

SUMS, COUNTS = ".in_sum2", ".counts"
ARCH = "imatrix"

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ImportanceMatrix:
    """Sums over the inputs of matrices, as the file holds them."""

    sums: Mapping[str, Float32]
    """Per tensor name the sum of squares in each column: shape [experts, columns], experts 1 if dense."""
    counts: Mapping[str, Float32]
    """How many inputs, whole numbers: shape [experts, 1]."""
    datasets: tuple[str, ...] = ()
    """Where the text is from."""
    chunks: int = 0
    """Sequences of it."""
    chunk_size: int = 0
    """Tokens in each."""

    @property
    def means(self) -> dict[str, Float32]:
        """Mean square per column, as quantizers take it: of the shape of the sums.

        Experts that no token reached count all columns alike, as in llama.cpp.
        """
        result: dict[str, Float32] = {}
        for name, total in self.sums.items():
            count = self.counts[name]
            with np.errstate(divide="ignore", invalid="ignore"):
                result[name] = np.where(count > 0, total / count, np.float32(1)).astype(np.float32)
        return result

    def with_entry(self, name: str, mean: Float32) -> ImportanceMatrix:
        """The matrix with one of its own for a tensor, shape [columns]."""
        return dataclasses.replace(
            self,
            sums={**self.sums, name: mean.reshape(1, -1)},
            counts={**self.counts, name: np.ones((1, 1), np.float32)},
        )


def read_imatrix(path: Path) -> dict[str, Float32]:
    """Mean squared activation of each input column, per tensor name: `ImportanceMatrix.means`.

    Raises:
        ImatrixError: the file is missing, damaged, in the legacy format, or holds non-finite values.
    """
    from llama_cpp import _gguf as gguf

    if path.is_dir():
        raise ImatrixError(f"{path} is a folder: name the file that llama-imatrix made")
    if not path.is_file():
        raise ImatrixError(f"{path} does not exist: make it with --export-imatrix or llama-imatrix")
    with path.open("rb") as f:
        if f.read(4) != b"GGUF":
            raise ImatrixError(f"{path} is not in GGUF form: convert a legacy file with `llama-imatrix --in-file`")
    try:
        tensors: dict[str, Any] = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    except (ValueError, IndexError, KeyError, OSError) as e:
        raise ImatrixError(f"{path} is damaged ({e}): make it again with llama-imatrix") from e
    sums: dict[str, Float32] = {}
    counts: dict[str, Float32] = {}
    for name, total in tensors.items():
        if not name.endswith(SUMS):
            continue
        stem = name.removesuffix(SUMS)
        count = tensors.get(stem + COUNTS)
        if count is None or np.size(count) == 0 or np.size(total) % np.size(count):
            raise ImatrixError(f"{path}: the entry of {stem} has no counts that fit: make the file again")
        counts[stem] = np.asarray(count, np.float32).reshape(-1, 1)
        sums[stem] = np.asarray(total, np.float32).reshape(np.size(count), -1)
    if not sums:
        raise ImatrixError(f"{path} holds no importance data: make it with llama-imatrix")
    means = ImportanceMatrix(sums, counts).means
    for stem, mean in means.items():
        if not np.isfinite(mean).all():
            raise ImatrixError(f"{path}: the entry of {stem} has non-finite values: make the file again")
    return means


def write_imatrix(path: Path, matrix: ImportanceMatrix) -> None:
    """Write a matrix as llama-imatrix does, so that it is there whole or not at all.

    Raises:
        OutputError: the place cannot be written.
    """
    from llama_cpp import _gguf as gguf

    kinds = gguf.GGUFValueType
    metadata = {
        "general.type": gguf.GGUFValue("imatrix", kinds.STRING),
        "imatrix.datasets": gguf.GGUFValue(list(matrix.datasets), kinds.ARRAY, kinds.STRING),
        "imatrix.chunk_count": gguf.GGUFValue(matrix.chunks, kinds.UINT32),
        "imatrix.chunk_size": gguf.GGUFValue(matrix.chunk_size, kinds.UINT32),
    }
    arrays: dict[str, Float32] = {}
    for name in sorted(matrix.sums):
        arrays[name + SUMS], arrays[name + COUNTS] = matrix.sums[name], matrix.counts[name]
    with GGUFFile(path, ARCH, metadata, [(name, a.shape, F32) for name, a in arrays.items()]) as file:
        file.write_header()
        for array in arrays.values():
            file.write(np.ascontiguousarray(array, np.float32).reshape(-1).view(np.uint8))
        file.commit()
