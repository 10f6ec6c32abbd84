"""Unified diffs, applied strictly: every line must match where the hunk says, with no fuzz and no offset."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .errors import BuildError

HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


@dataclass(frozen=True)
class Hunk:
    """One change: its lines, each with its mark (` `, `-` or `+`) and its newline, and where they start."""

    old_start: int
    new_start: int
    lines: tuple[str, ...]

    @property
    def old(self) -> list[str]:
        """The lines that the hunk expects."""
        return [line[1:] for line in self.lines if line[0] != "+"]

    @property
    def new(self) -> list[str]:
        """The lines that the hunk leaves."""
        return [line[1:] for line in self.lines if line[0] != "-"]

    def reversed(self) -> Hunk:
        """The hunk that undoes this one."""
        swap = {" ": " ", "-": "+", "+": "-"}
        return Hunk(self.new_start, self.old_start, tuple(swap[line[0]] + line[1:] for line in self.lines))


@dataclass(frozen=True)
class FileDiff:
    """The hunks of one file; `path` is relative to the tree. A created file expects to be absent."""

    path: str
    creates: bool
    hunks: tuple[Hunk, ...]
    removes: bool = False

    def reversed(self) -> FileDiff:
        """The diff that undoes this one."""
        return FileDiff(self.path, self.removes, tuple(h.reversed() for h in self.hunks), self.creates)


@dataclass
class Tree:
    """Lines by path, changed in memory; `None` marks a file that is not there."""

    texts: dict[str, list[str] | None] = field(default_factory=dict)

    def copy(self) -> Tree:
        """A tree whose changes do not touch this one."""
        return Tree(dict(self.texts))


def apply(name: str, diffs: tuple[FileDiff, ...], tree: Tree) -> None:
    """Change `tree` by the diffs of the patch called `name`.

    Raises:
        BuildError: a hunk does not fit; the message names patch, file and hunk. The tree is then half changed.
    """
    for diff in diffs:
        lines = tree.texts.get(diff.path)
        if diff.creates != (lines is None):
            raise BuildError(f"{name}: {diff.path} {'exists already' if diff.creates else 'does not exist'}")
        result: list[str] = []
        position = 0
        for number, hunk in enumerate(diff.hunks, 1):
            old = hunk.old
            # a hunk without old lines states the line after which it inserts
            start = hunk.old_start - 1 if old else hunk.old_start
            if start < position or (lines or [])[start : start + len(old)] != old:
                raise BuildError(f"{name}: hunk {number} of {diff.path} does not fit at line {hunk.old_start}")
            result += (lines or [])[position:start]
            result += hunk.new
            position = start + len(old)
        result += (lines or [])[position:]
        tree.texts[diff.path] = None if diff.removes else result


def parse(name: str, text: str) -> tuple[FileDiff, ...]:
    """Read the diffs of a patch; what stands before the first `--- ` line is its header and is passed over.

    Raises:
        BuildError: a hunk's line counts are not what its head says, or there is no diff at all.
    """
    lines = text.splitlines(keepends=True)
    diffs: list[FileDiff] = []
    at = 0
    while at < len(lines):
        if not (lines[at].startswith("--- ") and at + 1 < len(lines) and lines[at + 1].startswith("+++ ")):
            at += 1
            continue
        old, new = _path(name, lines[at]), _path(name, lines[at + 1])
        at += 2
        hunks: list[Hunk] = []
        while at < len(lines) and lines[at].startswith("@@"):
            hunk, at = _hunk(name, lines, at, len(hunks) + 1)
            hunks.append(hunk)
        path = new if new is not None else old
        if path is None or not hunks:
            raise BuildError(f"{name}: a file without hunks")
        diffs.append(FileDiff(path, old is None, tuple(hunks), new is None))
    if not diffs:
        raise BuildError(f"{name}: no diff in it")
    return tuple(diffs)


def counts(diffs: tuple[FileDiff, ...]) -> tuple[int, int]:
    """How many lines the diffs remove and add."""
    marks = [line[0] for diff in diffs for hunk in diff.hunks for line in hunk.lines]
    return marks.count("-"), marks.count("+")


def _path(name: str, line: str) -> str | None:
    path = line[4:].rstrip("\n").partition("\t")[0]
    if path == "/dev/null":
        return None
    if not path.startswith(("a/", "b/")) or ".." in path.split("/"):
        raise BuildError(f"{name}: {path} is not a path of the form a/... or b/...")
    return path[2:]


def _hunk(name: str, lines: list[str], at: int, number: int) -> tuple[Hunk, int]:
    head = HUNK.match(lines[at])
    if head is None:
        raise BuildError(f"{name}: hunk {number}: malformed head {lines[at].strip()!r}")
    n_old, n_new = (int(head[i]) if head[i] is not None else 1 for i in (2, 4))
    body: list[str] = []
    at += 1
    while at < len(lines) and _fits(body, n_old, n_new):
        line = " \n" if lines[at] == "\n" else lines[at]  # an editor stripped the space of an empty context line
        if line[0] not in " -+":
            break
        body.append(line)
        at += 1
    hunk = Hunk(int(head[1]), int(head[3]), tuple(body))
    if len(hunk.old) != n_old or len(hunk.new) != n_new:
        raise BuildError(f"{name}: hunk {number}: its lines are not the {n_old} old and {n_new} new that it states")
    if at < len(lines) and lines[at].startswith("\\"):
        raise BuildError(f"{name}: hunk {number}: a file without a final newline is not supported")
    return hunk, at


def _fits(body: list[str], n_old: int, n_new: int) -> bool:
    """Whether lines are still to come."""
    return sum(line[0] != "+" for line in body) < n_old or sum(line[0] != "-" for line in body) < n_new
