"""Where a conversion keeps what is finished of its long stages, so that a killed one is taken up again.

Each stage that runs the calibration text has a folder of its own in the work folder: `calibration`, the greedy search's
`perplexity`, `repair`. There `manifest.json` says of what inputs the stage is and how many of its steps (a block, a
removal) are finished; it changes last and at once, so that whatever it counts is complete. Beside it lie, for each
finished step, its figures (`block-0003.npz`) and, in a calibration, a sample of the hidden states before it
(`sample-0003.npy`), and the hidden states before the next step (`hidden-0004.f32`; a repair has several streams).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ziggurat.converter.checkpoint import Checkpoint
from ziggurat.converter.errors import CalibrationError

if TYPE_CHECKING:
    from ziggurat.converter.calibrate import CalibrateSettings
    from ziggurat.converter.calibration_text import CalibrationTokens

# Changes when a stage computes something else, or keeps it otherwise.
FORMAT = 2

MANIFEST, LOCK, SCRATCH, STATES = "manifest.json", "lock", "scratch", "*-[0-9][0-9][0-9][0-9].f32"

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


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the libraries that the figures come from."""
    return {name: importlib.metadata.version(name) for name in ("ziggurat", "torch", "transformers")}


def identity(
    checkpoint: Checkpoint, tokens: CalibrationTokens, settings: CalibrateSettings, **more: Any
) -> dict[str, Any]:
    """All that decides the figures of a stage, as JSON values; `more` is what that one looks at beyond the common.

    The number of threads is left out: a resumed conversion may have others.
    """
    return {
        "format": FORMAT,
        **fingerprint(checkpoint),
        "text": tokens.sha256,
        "sequences": len(tokens.ids),
        "sequence length": tokens.ids.shape[1],
        "device": settings.device.partition(":")[0],
        "dtype": settings.dtype,
        "batch": settings.batch_tokens,
        **{name.replace("_", " "): value for name, value in more.items()},
        **versions(),
    }


class WorkFolder:
    """A folder for one stage; a context manager that keeps others out of it meanwhile.

    Attributes:
        folder: where it is.
        finished: how many steps are finished, those of an earlier run included.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], what: str = "calibration") -> None:
        """Open the folder, or make it.

        Args:
            folder: where; made when it does not exist.
            identity: all that decides the figures, as JSON values.
            what: the stage, as messages call it.

        Raises:
            CalibrationError: the folder holds a stage of other inputs, or something else, or cannot be written.
        """
        self.folder, self.identity, self._what = folder, dict(identity), what
        self._lock = self._locked()
        try:
            self.finished = self._read_manifest()
            self._lock.write(str(os.getpid()).encode())  # `kept_text` asks who came so far
            self._lock.flush()
        except BaseException:
            self._lock.close()
            raise

    def _locked(self) -> BinaryIO:
        lock: BinaryIO | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / LOCK).open("ab")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            return lock
        except OSError as e:
            if lock is not None:
                lock.close()
            reason = f"cannot be written ({e.strerror}): choose another place"
            if isinstance(e, BlockingIOError):
                reason = "is in use by another conversion: wait for it, or name another output"
            raise CalibrationError(f"{self.folder} {reason}") from e

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if not (self.folder / MANIFEST).exists():  # nothing in it is of use
            with contextlib.suppress(OSError):
                _remove(self.folder)
        self._lock.close()

    def _read_manifest(self) -> int:
        """Number of finished steps, after a look whether they are of the same inputs."""
        path = self.folder / MANIFEST
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
                f"{self.folder} holds an unfinished {self._what} that differs in {what}: go back to that, or remove "
                "the folder to start again"
            )
        return finished

    def hidden_path(self, index: int, stream: str = "hidden") -> Path:
        """File of the hidden states before step `index`."""
        return self.folder / f"{stream}-{index:04}.f32"

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder for files that are of no use afterwards."""
        folder = self.folder / SCRATCH
        shutil.rmtree(folder, ignore_errors=True)  # a kill left it
        with self._writing():
            folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def partial_path(self) -> Path:
        """File that becomes one of hidden states when it is complete."""
        return self.folder / "hidden.partial"

    def finish(self, index: int, arrays: Mapping[str, npt.NDArray[Any]], *, keep: bool = False) -> None:
        """Note that step `index` is finished; the hidden states behind it have to be in their files.

        Args:
            index: the step.
            arrays: its figures.
            keep: leave the hidden states before it as well.
        """
        assert index == self.finished
        partial = self.folder / "block.partial"
        with self._writing():
            with partial.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]  # a keyword of its own has another type
            os.replace(partial, self.folder / f"block-{index:04}.npz")
            self._write_manifest(index + 1)
        if not keep:
            for path in self.folder.glob(STATES):
                if path.stem.rpartition("-")[2] != f"{index + 1:04}":
                    path.unlink()

    def _write_manifest(self, finished: int) -> None:
        partial = self.folder / "manifest.partial"
        partial.write_text(json.dumps({"finished": finished, "identity": self.identity}, indent=1), encoding="utf-8")
        os.replace(partial, self.folder / MANIFEST)
        self.finished = finished

    def block(self, index: int, wanted: Callable[[str], bool] | None = None) -> dict[str, npt.NDArray[Any]]:
        """Figures of a finished step: all, or those whose names are wanted; the others are not read.

        Raises:
            CalibrationError: they are missing or damaged.
        """
        path = self.folder / f"block-{index:04}.npz"
        try:
            with np.load(path) as arrays:
                return {name: arrays[name] for name in arrays if wanted is None or wanted(name)}
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
                f"{self.folder} cannot be written ({e.strerror}): make room, the {self._what} goes on from the last "
                "finished step"
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


def _remove(stage: Path) -> None:
    """Delete a stage's files and, if nothing else is in them, its folder and the work folder."""
    shutil.rmtree(stage / SCRATCH, ignore_errors=True)
    for pattern in (STATES, "sample-*.npy", "block-*.npz", "*.partial", MANIFEST, LOCK):
        for path in stage.glob(pattern):
            path.unlink()
    stage.rmdir()
    stage.parent.rmdir()


def discard(work: Path) -> None:
    """Delete a work folder whose output is written, or will never be; stages that others are at stay."""
    for stage in _stages(work):
        with contextlib.suppress(OSError), (stage / LOCK).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(stage)
    if not _stages(work):
        shutil.rmtree(work, ignore_errors=True)


def kept_text(work: Path) -> str:
    """For the end of a message: what this process leaves in a work folder when it fails; "" if nothing."""
    for stage in _stages(work):
        with contextlib.suppress(OSError):
            if (stage / MANIFEST).exists() and (stage / LOCK).read_text() == str(os.getpid()):
                return f"; {work} keeps what is finished for the same command to go on from"
    return ""


def _stages(work: Path) -> list[Path]:
    return [lock.parent for lock in work.glob(f"*/{LOCK}")]


def _short(value: Any) -> str:
    """A value for a message; hashes are told apart by their beginnings."""
    text = "nothing" if value is None else str(value)
    return text[:12] if len(text) == 2 * hashlib.sha256().digest_size else text
