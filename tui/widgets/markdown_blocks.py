"""Cuts Markdown that is still being written into blocks that are finished and a tail that is not.

A finished block never changes, so it is rendered once; only the tail is touched again. A long list or code fence would
be one ever growing tail, so it is cut as well, between the items of the list and between lines of code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Lines after which a list is cut at its next item, and a code fence at its next line.
LIST_LINES, CODE_LINES = 10, 20

_FENCE = re.compile(r"^( {0,3})(`{3,}|~{3,})(.*)$")
_ITEM = re.compile(r"^( {0,3})(?:([-*+])|(\d{1,9})([.)]))(?= |\t|$)")
#: A link's definition, which any block may refer to.
_REFERENCE = re.compile(r"^ {0,3}\[[^\]]*\S[^\]]*\]:\s*\S")
_HEADING = re.compile(r"^ {0,3}#{1,6}(?: |\t|$)")


@dataclass(frozen=True)
class Block:
    """A piece of Markdown. ``code`` is the language of a fence's lines, None for other Markdown.

    ``joined`` blocks go on with the one before: no empty line stands between them. ``last`` ends a run of joined ones.
    ``list_end`` is the number after the last one of a numbered list that was cut, where it is known: all parts are
    indented for it.
    """

    source: str
    code: str | None = None
    joined: bool = False
    last: bool = True
    list_end: int = 0


class BlockSplitter:
    """Takes text as it comes and returns the blocks that it finishes."""

    def __init__(self) -> None:
        #: Definitions of links so far, outside code.
        self.references: list[str] = []
        self._lines: list[str] = []
        self._partial = ""
        self._fence = ""
        self._language = ""
        self._inner_fence = ""
        self._list = ""
        self._number: int | None = None
        self._blank = False
        self._joined = False

    @property
    def partial(self) -> str:
        """The last line, which has no end yet."""
        return self._partial

    @property
    def in_code(self) -> bool:
        """Whether the tail is inside a code fence."""
        return bool(self._fence)

    @property
    def empty(self) -> bool:
        """Whether the tail is."""
        return not self._lines and not self._partial

    @property
    def joined(self) -> bool:
        """Whether the tail goes on with the last finished block."""
        return self._joined

    def tail(self) -> str:
        """Return what belongs to no finished block."""
        return "\n".join([*self._lines, self._partial])

    def feed(self, text: str) -> list[Block]:
        """Add text and return the blocks that are finished with it."""
        *lines, self._partial = (self._partial + text).split("\n")
        finished: list[Block] = []
        for line in lines:
            self._line(line.removesuffix("\r"), finished)
        return finished

    def finish(self) -> list[Block]:
        """Return what is left as blocks: the text has ended."""
        finished: list[Block] = []
        if self._partial:
            self._line(self._partial, finished)
            self._partial = ""
        self._flush(finished)
        self._fence = self._list = ""
        return finished

    def _line(self, line: str, finished: list[Block]) -> None:
        if self._fence:
            self._code_line(line, finished)
        elif self._inner_fence:
            self._lines.append(line)
            if _closes(line.strip(), self._inner_fence):
                self._inner_fence = ""
        elif not line.strip():
            self._blank_line(finished)
        else:
            self._text_line(line, finished)

    def _code_line(self, line: str, finished: list[Block]) -> None:
        if _closes(line.strip(), self._fence):
            self._flush(finished)
            self._fence = ""
            return
        if len(self._lines) >= CODE_LINES:
            self._flush(finished, last=False)
        self._lines.append(line)

    def _blank_line(self, finished: list[Block]) -> None:
        if self._list:  # the list goes on if an item or an indented line comes
            self._lines.append("")
            self._blank = True
        else:
            self._flush(finished)

    def _text_line(self, line: str, finished: list[Block]) -> None:
        item, fence = _ITEM.match(line), _FENCE.match(line)
        if _REFERENCE.match(line):
            self.references.append(line)
        if (
            self._list
            and self._blank
            and not (item and _kind(item) == self._list)
            and not line.startswith(("  ", "\t"))
        ):
            self._flush(finished)
        self._blank = False
        if fence and not (fence[2][0] == "`" and "`" in fence[3]):
            if self._list and fence[1]:
                self._inner_fence = fence[2]
            else:
                self._flush(finished)
                self._fence, self._language = fence[2], fence[3].strip().split(" ")[0]
                return
        elif _HEADING.match(line):
            self._flush(finished)
            self._lines.append(line)
            self._flush(finished)
            return
        elif item and len(item[1]) < 2:
            line = self._item(line, item, finished)
        self._lines.append(line)

    def _item(self, line: str, item: re.Match[str], finished: list[Block]) -> str:
        """Begin an item of a list and cut before it what is long enough. Return its line, numbered on after a cut."""
        kind = _kind(item)
        if not self._list and self._lines and item[3] is not None and int(item[3]) != 1:
            return line  # a paragraph whose line begins with a number
        if kind != self._list:
            self._flush(finished)
            self._list, self._number = kind, int(item[3]) if item[3] is not None else None
        elif len(self._lines) >= LIST_LINES:
            number = self._number
            self._flush(finished, last=False)
            self._list, self._number = kind, number
        if self._number is None:
            return line
        line = f"{item[1]}{self._number}{item[4]}{line[item.end() :]}"
        self._number += 1
        return line

    def _flush(self, finished: list[Block], *, last: bool = True) -> None:
        if self._lines or (self._fence and not self._joined):
            source = "\n".join(self._lines)
            code = self._language or "text" if self._fence else None
            end = self._number if self._joined and last and self._number is not None else 0
            finished.append(Block(source if code else source.rstrip(), code, self._joined, last, end))
        self._lines = []
        self._list, self._number = "", None
        self._inner_fence, self._blank = "", False
        self._joined = not last


def _kind(item: re.Match[str]) -> str:
    return item[2] or item[4]


def _closes(line: str, fence: str) -> bool:
    return len(line) >= len(fence) and not line.strip(fence[0])
