"""The unfinished end of a message as plain lines, wrapped as it grows without wrapping anything twice."""

from __future__ import annotations

from rich.cells import cell_len, chop_cells


class TailLines:
    """Wraps text to a width. All rows but the last are final as soon as they are there."""

    def __init__(self, width: int) -> None:
        self._width = max(width, 2)
        self._rows: list[str] = []
        self._last = ""

    def feed(self, text: str) -> None:
        """Add text."""
        for number, line in enumerate(text.split("\n")):
            if number:
                self._rows.append(self._last)
                self._last = ""
            rows = wrap(self._last + line.expandtabs(4), self._width)
            self._rows.extend(rows[:-1])
            self._last = rows[-1]

    @property
    def rows(self) -> int:
        """How many lines there are; none for an empty text."""
        return len(self._rows) + bool(self._last)

    def row(self, number: int) -> str:
        """Return a line."""
        return self._rows[number] if number < len(self._rows) else self._last

    @property
    def empty(self) -> bool:
        """Whether there is nothing to see."""
        return not self._rows and not self._last


def wrap(line: str, width: int) -> list[str]:
    """Return the rows of a line, broken after spaces where it can be; at least one."""
    if len(line) <= width and cell_len(line) <= width:
        return [line]
    rows, row, taken = [], "", 0
    for word in _words(line):
        size = cell_len(word)
        if taken + cell_len(word.rstrip(" ")) > width:
            if row:
                rows.append(row)
            row, taken = "", 0
            if size > width:
                *whole, word = chop_cells(word, width)
                rows.extend(whole)
                size = cell_len(word)
        row += word
        taken += size
    return [*rows, row]


def _words(line: str) -> list[str]:
    """Return the words of a line with the spaces after them."""
    words, start = [], 0
    while start < len(line):
        end = line.find(" ", start)
        if end < 0:
            end = len(line)
        while end < len(line) and line[end] == " ":
            end += 1
        words.append(line[start:end])
        start = end
    return words
