"""Hidden states of all calibration tokens between two blocks: in memory, or in a file of which windows are mapped."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from ziggurat.converter.errors import CalibrationError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, int, int]


def nbytes(shape: Shape) -> int:
    """Bytes of hidden states of a shape [sequences, positions, n_embd]."""
    return 4 * shape[0] * shape[1] * shape[2]


def fits_memory(shape: Shape, share: float) -> bool:
    """Whether hidden states of this shape take less than `share` of the memory that is free now."""
    return bool(nbytes(shape) <= share * psutil.virtual_memory().available)


class HiddenStates:
    """float32 of shape [sequences, positions, n_embd]; 16-bit states are kept without loss.

    In memory when `path` is None. In a file, only the sequences being read or written are mapped, and only while they
    are: neither the number of sequences nor that of blocks shows in the process's memory.
    """

    def __init__(self, shape: Shape, path: Path | None = None, *, create: bool = True) -> None:
        """Make room for hidden states, or open those in a file.

        Raises:
            CalibrationError: the file is missing or of another size, or there is no room for it.
        """
        self.shape, self.path = shape, path
        self._array: np.ndarray[Any, np.dtype[np.float32]] | None = None
        if path is None:
            self._array = np.empty(shape, np.float32)
        elif create:
            try:
                with path.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, max(nbytes(shape), 1))
            except OSError as e:
                raise CalibrationError(
                    f"{path.parent} has no room for {nbytes(shape) / 1e6:.1f} MB of hidden states ({e.strerror}): make "
                    "room, choose another place, or use fewer calibration tokens"
                ) from e
        elif not path.is_file() or path.stat().st_size != nbytes(shape):
            raise CalibrationError(f"{path} is missing or damaged: remove {path.parent} and start again")

    def _window(self, start: int, stop: int) -> Any:
        if self._array is not None:
            return self._array[start:stop]
        shape = (stop - start, *self.shape[1:])
        assert self.path is not None
        return np.memmap(self.path, np.float32, "r+", offset=nbytes((start, *self.shape[1:])), shape=shape)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """A copy of the sequences from `start` up to `stop`, on the CPU."""
        import torch

        window = torch.empty((stop - start, *self.shape[1:]))
        np.copyto(window.numpy(), self._window(start, stop))
        return window

    def write(self, start: int, values: torch.Tensor) -> None:
        """Set the sequences from `start` on."""
        np.copyto(self._window(start, start + len(values)), values.detach().float().cpu().numpy())

    def save(self, path: Path) -> None:
        """Copy into a file that is there whole or not at all, or give that name to the file they are in already."""
        if self.path is None:
            self.copy_to(path, [(i, i + 1) for i in range(self.shape[0])])
        else:
            os.replace(self.path, path)
            self.path = path

    def copy_to(self, path: Path, windows: Iterable[tuple[int, int]]) -> None:
        """Copy the sequences of `windows` into a file that is there whole or not at all; it has zeros for others."""
        partial = path.with_suffix(".partial")
        copy = HiddenStates(self.shape, partial)
        for start, stop in windows:
            np.copyto(copy._window(start, stop), self._window(start, stop))
        os.replace(partial, path)
