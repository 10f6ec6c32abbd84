"""The pinned upstream release: `pin.json` and `upstream.sha256`."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import BuildError

HASH_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


@dataclass(frozen=True)
class Pin:
    """Which upstream source distribution is built, and under which local label."""

    project: str
    version: str
    label: str
    archive: str
    sha256: str

    @property
    def full_version(self) -> str:
        """The version of the wheel: upstream's with the local label, e.g. `0.3.36+ziggurat.1`."""
        return f"{self.version}+{self.label}"

    @classmethod
    def read(cls, folder: Path) -> Pin:
        """Read `pin.json` of the patches folder.

        Raises:
            BuildError: the file is missing or not of this form.
        """
        path = folder / "pin.json"
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise BuildError(f"{path}: {error}") from error


def read_hashes(path: Path) -> dict[str, str]:
    """Read a list in the format of `sha256sum`: relative path to hex digest, in the file's order.

    Raises:
        BuildError: the file is missing, or a line is not of that format.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BuildError(f"{path}: {error.strerror}") from error
    hashes: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = HASH_LINE.fullmatch(line)
        if match is None:
            raise BuildError(f"{path}:{number}: not a line of sha256sum: {line!r}")
        hashes[match[2]] = match[1]
    return hashes


def file_sha256(path: Path) -> str:
    """The hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
