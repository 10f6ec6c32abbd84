"""Files that are attached to messages: read as text, and their names completed."""

from __future__ import annotations

import os
from pathlib import Path

from ziggurat.tui.conversation import Attachment

#: Bytes above which a file is not attached.
LARGEST_FILE = 4 << 20
_MOST_PATHS = 50


class AttachError(ValueError):
    """A file cannot be attached; the message says which and why."""


def read_attachment(path: str) -> Attachment:
    """Return a text file, without its token count. Raises AttachError."""
    place = Path(path.strip().strip("'\"")).expanduser()
    try:
        if not place.is_file():
            raise AttachError(f"{place}: {'is no plain file' if place.exists() else 'there is no such file'}")
        size = place.stat().st_size
        if size > LARGEST_FILE:
            raise AttachError(f"{place}: has {size:,} bytes, and {LARGEST_FILE:,} are the most to attach")
        text = place.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise AttachError(f"{place}: is not text in UTF-8") from None
    except OSError as error:
        raise AttachError(f"{place}: cannot be read ({error.strerror or error})") from None
    if "\0" in text:
        raise AttachError(f"{place}: is not text")
    return Attachment(place.name, text)


def paths(typed: str) -> list[str]:
    """Return files and folders that a path may go on with, folders with a slash; hidden ones if a dot was typed."""
    folder, _, start = typed.rpartition("/")
    base = Path(f"{folder}/" if "/" in typed else ".").expanduser()
    try:
        with os.scandir(base) as entries:
            names = sorted(
                f"{entry.name}/" if entry.is_dir() else entry.name
                for entry in entries
                if entry.name.startswith(start) and (start or not entry.name.startswith("."))
            )
    except OSError:
        return []
    before = typed[: len(typed) - len(start)]
    return [f"{before}{name}" for name in names[:_MOST_PATHS]]
