"""Writes result files so that nobody ever reads half of one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from ziggurat.runtime.errors import InvalidRequestError, ZigguratError


def check_target(path: Path, option: str, *, special: bool = False) -> None:
    """Raise InvalidRequestError when a file cannot be made there, before the work for it begins.

    ``special`` allows devices and pipes, such as /dev/stdout.
    """
    try:
        if path.is_dir():
            raise InvalidRequestError(f"{option} {path}: is a folder; give a file name")
        if _is_special(path):
            if special:
                return
            raise InvalidRequestError(
                f"{option} {path}: is a device or a pipe, which would be replaced; give a file name"
            )
        folder = _real(path).parent
        if not folder.is_dir():
            raise InvalidRequestError(f"{option} {path}: its folder does not exist")
        tempfile.TemporaryFile(dir=folder).close()  # permissions alone do not tell: read-only file systems, /proc
    except OSError as error:  # a name that is too long as well
        raise InvalidRequestError(f"{option} {path}: cannot be written ({error.strerror or error})") from None


def write_atomic(path: Path, content: bytes, option: str) -> None:
    """Write beside the file and rename; into a pipe or device, such as /dev/stdout, directly.

    Raises ZigguratError naming ``option`` when that fails.
    """
    partial: str | None = None
    try:
        if _is_special(path):  # renaming a file onto it would take it away from everybody
            path.write_bytes(content)
            return
        target = _real(path)
        handle, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with open(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)  # mkstemp makes files only their owner can read
        os.replace(partial, target)
    except OSError as error:
        raise ZigguratError(f"{option} {path}: cannot be written ({error.strerror or error})") from None
    finally:
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial)


def state_file(folder: Path, conversation: str) -> Path:
    """Return where a server keeps a conversation's rows: names are whatever clients choose."""
    return folder / f"{hashlib.sha256(conversation.encode('utf-8', 'surrogatepass')).hexdigest()}.kv"


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _real(path: Path) -> Path:
    """Return the file a link leads to: what is renamed onto a link would take its place."""
    return Path(os.path.realpath(path))
