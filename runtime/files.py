"""Writes result files so that nobody ever reads half of one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from ziggurat.runtime.errors import InvalidRequestError, ZigguratError


def check_target(path: Path, option: str) -> None:
    """Raise InvalidRequestError when a file cannot be made there, before the work for it begins."""
    if path.is_dir():
        raise InvalidRequestError(f"{option} {path}: is a folder; give a file name")
    if path.exists() and not path.is_file():
        raise InvalidRequestError(f"{option} {path}: is a device or a pipe, which would be replaced; give a file name")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InvalidRequestError(f"{option} {path}: its folder does not exist")
    try:
        tempfile.TemporaryFile(dir=folder).close()  # permissions alone do not tell: read-only file systems, /proc
    except OSError as error:
        raise InvalidRequestError(f"{option} {path}: cannot be written ({error.strerror or error})") from None


def write_atomic(path: Path, content: bytes, option: str) -> None:
    """Write beside the file and rename. Raises ZigguratError naming ``option`` when that fails."""
    partial: str | None = None
    try:
        handle, partial = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
        with open(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)  # mkstemp makes files only their owner can read
        os.replace(partial, path)
    except OSError as error:
        raise ZigguratError(f"{option} {path}: cannot be written ({error.strerror or error})") from None
    finally:
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial)
