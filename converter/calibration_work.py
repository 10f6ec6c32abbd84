"""The folder of a calibration that is under way: what is finished, of which inputs, so that it can be taken up again.

`manifest.json` says of what the calibration is and how many blocks are finished; it changes last and at once, so that
whatever it counts is complete. Beside it lie, for each finished block, its figures (`block-0003.npz`) and a sample of
the hidden states before it (`sample-0003.npy`), and the hidden states before the next block (`hidden-0004.f32`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ziggurat.converter.checkpoint import Checkpoint
from ziggurat.converter.errors import CalibrationError

FORMAT = 1

# Of each file of weights that many pieces of that many bytes are hashed: reading all of a large model takes minutes,
# and a training step or another conversion changes every piece.
PIECES, PIECE_BYTES = 64, 1 << 16


def fingerprint(checkpoint: Checkpoint) -> dict[str, str]:
    """Hashes of what a calibration reads of a checkpoint: the configuration, and samples of the weights.

    The weights' hash covers names and lengths of their files, the files' first bytes (which are the tensor tables, as
    far as they are no longer than a piece) and pieces spread over the rest.
    """
    digest = hashlib.sha256()
    for path in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for i in range(PIECES):
                file.seek(i * max(size - PIECE_BYTES, 0) // (PIECES - 1))
                digest.update(file.read(PIECE_BYTES))
    config = json.dumps(checkpoint.config, sort_keys=True).encode()
    return {"config": hashlib.sha256(config).hexdigest(), "weights": digest.hexdigest()}


def versions() -> dict[str, str]:
    """Versions of the libraries that the figures come from."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}


class WorkFolder:
    """A folder for one calibration; a context manager that keeps others out of it meanwhile."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Open the folder, or make it.

        Args:
            folder: where; made when it does not exist.
            identity: all that decides the figures, as JSON values.

        Raises:
            CalibrationError: the folder holds a calibration of other inputs, or something else, or cannot be written.
        """
        self.folder, self.identity = folder, dict(identity)
        self._lock = self._locked()
        try:
            self.finished = self._read_manifest()
        except BaseException:
            self._lock.close()
            raise

    def _locked(self) -> BinaryIO:
        lock: BinaryIO | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("wb")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except OSError as e:
            if lock is not None:
                lock.close()
            reason = f"cannot be written ({e.strerror}): choose another place"
            if isinstance(e, BlockingIOError):
                reason = "is in use by another calibration: wait for it, or name another"
            raise CalibrationError(f"{self.folder} {reason}") from e

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _read_manifest(self) -> int:
        """Number of finished blocks, after a look whether they are of the same inputs."""
        path = self.folder / "manifest.json"
        if not path.exists():
            return 0
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            old, finished = dict(manifest["identity"]), int(manifest["finished"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise CalibrationError(f"{path} is damaged: remove {self.folder} and start again") from e
        new = json.loads(json.dumps(self.identity))
        changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if changed:
            what = ", ".join(f"{key} ({_short(old.get(key))}, now {_short(new.get(key))})" for key in changed)
            raise CalibrationError(
                f"{self.folder} holds an unfinished calibration that differs in {what}: go back to that, or remove "
                "the folder to start again"
            )
        return finished

    def hidden_path(self, index: int) -> Path:
        """File of the hidden states before block `index`."""
        return self.folder / f"hidden-{index:04}.f32"

    def partial_path(self) -> Path:
        """File that becomes one of hidden states when it is complete."""
        return self.folder / "hidden.partial"

    def finish(self, index: int, arrays: Mapping[str, npt.NDArray[Any]], *, keep: bool) -> None:
        """Note that block `index` is finished; the hidden states behind it have to be in their file.

        Args:
            index: the block.
            arrays: its figures.
            keep: leave the hidden states before it as well.
        """
        partial = self.folder / "block.partial"
        with self._writing():
            with partial.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]  # a keyword of its own has another type
            os.replace(partial, self.folder / f"block-{index:04}.npz")
            self._write_manifest(index + 1)
        if not keep:
            self.hidden_path(index).unlink(missing_ok=True)

    def _write_manifest(self, finished: int) -> None:
        partial = self.folder / "manifest.partial"
        partial.write_text(json.dumps({"finished": finished, "identity": self.identity}, indent=1), encoding="utf-8")
        os.replace(partial, self.folder / "manifest.json")
        self.finished = finished

    def block(self, index: int) -> dict[str, npt.NDArray[Any]]:
        """Figures of a finished block.

        Raises:
            CalibrationError: they are missing or damaged.
        """
        path = self.folder / f"block-{index:04}.npz"
        try:
            with np.load(path) as arrays:
                return dict(arrays)
        except Exception as e:  # zip files fail in many ways
            raise CalibrationError(f"{path} is missing or damaged: remove {self.folder} and start again") from e

    def write_sample(self, index: int, sample: npt.NDArray[np.float32]) -> None:
        """Keep a sample of the hidden states before block `index`, shape [samples, n_embd]."""
        with self._writing():
            np.save(self.folder / f"sample-{index:04}.npy", sample)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Say what to do when the folder's disk is full or gone."""
        try:
            yield
        except OSError as e:
            raise CalibrationError(
                f"{self.folder} cannot be written ({e.strerror}): make room, the calibration goes on from the last "
                "finished block"
            ) from e

    def samples(self, count: int, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows of the first `count` samples: shape [count, stop - start, n_embd]."""
        parts = []
        for index in range(count):
            path = self.folder / f"sample-{index:04}.npy"
            try:
                parts.append(np.array(np.load(path, mmap_mode="r")[start:stop]))
            except (OSError, ValueError) as e:
                raise CalibrationError(f"{path} is missing or damaged: remove {self.folder} and start again") from e
        return np.stack(parts)

    def remove(self) -> None:
        """Delete the files of the calibration, and the folder if nothing else lies in it."""
        for pattern in ("hidden-*.f32", "sample-*.npy", "block-*.npz", "*.partial", "manifest.json", "lock"):
            for path in self.folder.glob(pattern):
                path.unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text[:12]
