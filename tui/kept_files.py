"""The files in which conversations' rows are kept: made by the chat's own server, and removed by the chat."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path

from ziggurat.runtime.files import state_file

#: Bytes that the files may take together.
LIMIT = 4 * 2**30


class KeptFiles:
    """The files in one folder, which is made. Failures are not told: the rows can be computed again."""

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder = folder
        self._limit = limit
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def keep_only(self, conversations: Collection[str]) -> None:
        """Remove the files of all other conversations."""
        known = {state_file(self.folder, each) for each in conversations}
        for path in self.folder.glob("*.kv"):
            if path not in known:
                with contextlib.suppress(OSError):
                    path.unlink()

    def prune(self) -> None:
        """Remove the oldest files until the others fit."""
        with contextlib.suppress(OSError):
            found = sorted(self.folder.glob("*.kv"), key=lambda path: path.stat().st_mtime, reverse=True)
            taken = 0
            for path in found:
                taken += path.stat().st_size
                if taken > self._limit:
                    path.unlink()
