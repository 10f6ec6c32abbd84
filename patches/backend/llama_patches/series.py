"""The patch series: which patches there are, what their headers say, and applying them to a tree."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from . import diff
from .errors import BuildError

FIELD = re.compile(r"([A-Z][A-Za-z -]*): *(.*)")


@dataclass(frozen=True)
class Patch:
    """One patch file. `header` is the part of `text` before the first diff, `fields` what it states (DEP-3)."""

    name: str
    text: str
    header: str
    fields: dict[str, str]
    diffs: tuple[diff.FileDiff, ...]


def read_series(folder: Path) -> tuple[Patch, ...]:
    """Read the patches named in `series`, one a line, in that order; `#` starts a comment.

    Raises:
        BuildError: a patch is missing or malformed.
    """
    patches = []
    for name in series_names(folder):
        try:
            text = (folder / name).read_text(encoding="utf-8")
        except OSError as error:
            raise BuildError(f"{folder / name}: {error.strerror} (it is listed in series)") from error
        patches.append(read_patch(name, text))
    return tuple(patches)


def series_names(folder: Path) -> list[str]:
    """The file names in `series`.

    Raises:
        BuildError: there is no such file.
    """
    try:
        lines = (folder / "series").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BuildError(f"{folder / 'series'}: {error.strerror}") from error
    return [name for line in lines if (name := line.partition("#")[0].strip())]


def read_patch(name: str, text: str) -> Patch:
    """Take a patch apart.

    Raises:
        BuildError: its diffs are malformed.
    """
    head, separator, _ = text.partition("\n--- ")
    header = head + "\n" if separator else ""
    fields: dict[str, str] = {}
    last = ""
    for line in header.splitlines():
        if match := FIELD.fullmatch(line):
            last = match[1]
            fields[last] = match[2]
        elif line.startswith(" ") and last:
            fields[last] += "\n" + line.strip()
    return Patch(name, text, header, fields, diff.parse(name, text))


def apply_series(patches: tuple[Patch, ...], root: Path) -> int:
    """Apply the patches that are not in the tree yet; either all of them or none. A second call changes nothing.

    Returns:
        How many patches were applied now.

    Raises:
        BuildError: a hunk does not fit exactly where it says; the message names patch, file and hunk.
    """
    tree = diff.Tree({d.path: _read(root / d.path) for patch in patches for d in patch.diffs})
    before = tree.copy()
    applied = _applied(patches, tree)
    for patch in patches[applied:]:
        diff.apply(patch.name, patch.diffs, tree)
    for path, lines in tree.texts.items():
        if lines is None:
            (root / path).unlink(missing_ok=True)
        elif lines != before.texts[path]:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text("".join(lines), encoding="utf-8", newline="")
    return len(patches) - applied


def _applied(patches: tuple[Patch, ...], tree: diff.Tree) -> int:
    """How many of the first patches the tree holds already: the longest run that can be undone."""
    for count in range(len(patches), 0, -1):
        trial = tree.copy()
        try:
            for patch in reversed(patches[:count]):
                diff.apply(patch.name, tuple(d.reversed() for d in patch.diffs), trial)
        except BuildError:
            continue
        return count
    return 0


def _read(path: Path) -> list[str] | None:
    if not path.is_file():
        return None
    return path.read_bytes().decode("utf-8").splitlines(keepends=True)
