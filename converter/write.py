"""Writes a GGUF so that nothing half-written ever carries its final name."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import shutil
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ziggurat.converter.errors import OutputError, UnsupportedModelError
from ziggurat.converter.quantize import stored_bytes

ALIGNMENT = 32  # GGUF's default, which every reader assumes without a general.alignment key


def check_target(path: Path, *, force: bool, special: bool = False) -> None:
    """Refuse an output path that cannot or should not be written, before any work.

    `special` allows what is no regular file, such as /dev/stdout.

    Raises:
        OutputError: the file exists and `force` is off, or its folder is missing or not writable.
    """
    try:
        if not (special and is_special(path)):
            _check_target(path, force=force)
    except OSError as e:  # a name that is too long, links in a circle
        raise OutputError(f"{path} cannot be written ({e.strerror}): choose another place") from e


def _check_target(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise OutputError(f"{path} is a folder: name a file, for example {path / 'model.gguf'}")
    if is_special(path):
        raise OutputError(f"{path} is no regular file: name another")
    if path.exists() and not force:
        raise OutputError(f"{path} exists already: --force replaces it")
    folder = real(path).parent
    if not folder.is_dir():
        raise OutputError(f"{folder} does not exist: create it, or choose another place for {path.name}")
    if not folder.stat().st_mode & 0o222:  # root could, but a folder that nobody may write is closed on purpose
        raise OutputError(f"{folder} is read-only: choose another place for {path.name}")
    probe = partial_name(path)
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT, 0o666))
        probe.unlink()
    except OSError as e:
        raise OutputError(f"{folder} cannot be written ({e.strerror}): choose another place for {path.name}") from e


class GGUFFile:
    """A GGUF being written: header first, then the tensors' bytes in order, then `commit`.

    As a context manager it removes what is there unless committed. The file lives next to its final place, under a
    hidden name, with its full length reserved, so that a lack of space shows at once.
    """

    def __init__(
        self, path: Path, arch: str, metadata: dict[str, Any], tensors: list[tuple[str, tuple[int, ...], int]]
    ) -> None:
        """Lay the file out.

        Args:
            path: final name.
            arch: llama.cpp's name of the architecture.
            metadata: key to gguf value of `llama_cpp._gguf`.
            tensors: name, shape (outermost dimension first) and ggml type id, in file order.
        """
        self.path = path
        self.partial = partial_name(path)
        self._arch, self._metadata, self._tensors = arch, metadata, tensors
        self.sizes = [stored_bytes(shape, type_id) for _, shape, type_id in tensors]
        self.data_bytes = sum(-(-size // ALIGNMENT) * ALIGNMENT for size in self.sizes)
        self.header_bytes = 0  # known once it is written
        self._file: BinaryIO | None = None
        self._lock: BinaryIO | None = None
        self._committed = False
        self._in_tensor = 0
        self._index = 0

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        if not self._committed:
            with contextlib.suppress(OSError):
                self.partial.unlink()
        if self._lock is not None:
            self._lock.close()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise self._write_error(error) from error

    def write_header(self) -> None:
        """Write metadata and tensor table and reserve the space for the rest.

        Raises:
            OutputError: there is not enough space.
            UnsupportedModelError: a metadata value does not fit its type.
        """
        from llama_cpp import _gguf as gguf

        _remove_abandoned(self.path)
        try:
            free = shutil.disk_usage(self.partial.parent).free
        except OSError as e:
            raise self._write_error(e) from e
        if free < self.data_bytes:
            raise OutputError(
                f"{self.partial.parent} has {free / 1e6:.1f} MB free, {self.path.name} needs "
                f"{self.data_bytes / 1e6:.1f} MB: make room or choose another place"
            )
        try:
            self._lock = self.partial.open("wb")
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            writer = gguf.GGUFWriter(path=None, arch=self._arch)
            writer.kv_data = [dict(self._metadata)]
            for (name, shape, type_id), size in zip(self._tensors, self.sizes, strict=True):
                dtype = gguf.GGMLQuantizationType(type_id)
                writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=dtype)
            writer.write_header_to_file(self.partial)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            self._file = self.partial.open("r+b")
            self._file.seek(0, os.SEEK_END)
            self._pad()
            self.header_bytes = self._file.tell()
            self._reserve(self.header_bytes + self.data_bytes)
        except OSError as e:
            raise self._write_error(e) from e
        except (struct.error, TypeError, ValueError) as e:
            raise UnsupportedModelError(f"the metadata {self._unwritable()} of the checkpoint cannot be stored") from e

    def _unwritable(self) -> str:
        """The first metadata key whose value does not fit the type that upstream gives it."""
        from llama_cpp import _gguf as gguf

        writer = gguf.GGUFWriter(path=None, arch=self._arch)
        for key, entry in self._metadata.items():
            try:
                writer._pack_val(entry.value, entry.type, add_vtype=True, sub_type=entry.sub_type)
            except (struct.error, TypeError, ValueError):
                return f"{key} = {entry.value!r}"
        return "or the tensor table"

    def write(self, data: npt.NDArray[np.uint8]) -> None:
        """Append bytes of the current tensor; a finished one is padded to the alignment.

        Raises:
            OutputError: the file system refuses.
        """
        assert self._file is not None
        try:
            self._file.write(data.data)
            self._in_tensor += data.nbytes
            assert self._in_tensor <= self.sizes[self._index]
            if self._in_tensor == self.sizes[self._index]:
                self._pad()
                self._index, self._in_tensor = self._index + 1, 0
        except OSError as e:
            raise self._write_error(e) from e

    def commit(self) -> int:
        """Bring everything to the disk and give the file its final name. Returns its bytes.

        Raises:
            OutputError: the file system refuses.
        """
        assert self._file is not None and self._index == len(self._tensors)
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            size = self._file.tell()
            self._file.truncate(size)
            self._file.close()
            os.replace(self.partial, real(self.path))
        except OSError as e:
            raise self._write_error(e) from e
        self._committed = True
        return size

    def _pad(self) -> None:
        assert self._file is not None
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))

    def _reserve(self, size: int) -> None:
        assert self._file is not None
        self._file.flush()
        try:
            _reserve_blocks(self._file.fileno(), size)
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            self._file.truncate(size)  # a file system that cannot reserve: at least give it its length

    def _write_error(self, error: OSError) -> OutputError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return OutputError(f"no space left for {self.path} ({self.data_bytes / 1e6:.1f} MB): make room, try again")
        return OutputError(f"{self.path} cannot be written ({error.strerror or error}): choose another place")


def _reserve_blocks(fd: int, size: int) -> None:
    """Linux's fallocate.

    Where a file system has none, glibc's posix_fallocate writes into every block instead: millions of requests for a
    large model on a network drive.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if libc.fallocate(fd, 0, 0, size) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def is_special(path: Path) -> bool:
    """Whether it is a device or a pipe: replaced by a file it would be gone for everybody."""
    return path.exists() and not path.is_file() and not path.is_dir()


def real(path: Path) -> Path:
    """The file that `path` leads to, absolute: what is renamed onto a link would take the link's place."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path.absolute()


def partial_name(path: Path) -> Path:
    """Where a file is written before it gets its name: hidden, beside it, of this process."""
    return real(path).with_name(f".{real(path).name}.{os.getpid()}.part")


def _remove_abandoned(path: Path) -> None:
    """Remove partial files of conversions to `path` that were killed: nobody holds their lock."""
    for left in real(path).parent.glob(f".{glob.escape(real(path).name)}.*.part"):
        with contextlib.suppress(OSError), left.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()
