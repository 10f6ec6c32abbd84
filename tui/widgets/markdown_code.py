"""Renders code row by row, so that whoever draws a long fence can stop in between.

rich's ``Syntax`` renders a text at once, in about three times the time: it styles, splits and measures it anew for
each line. Here pygments' tokens become segments as they come.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound
from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from rich.syntax import Syntax, SyntaxTheme

from ziggurat.tui.widgets.tail import wrap

_TAB = 4

_Token = tuple[tuple[str, ...], str]


class CodeRenderer:
    """Renders code to rows of ``width`` cells, one of which is free at either side.

    ``theme`` names a style of pygments or rich, ``background`` is the style of rows.
    """

    def __init__(self, width: int, theme: str, background: Style) -> None:
        self._width = width
        self._theme: SyntaxTheme = Syntax.get_theme(theme)
        self._background = background
        self._styles: dict[tuple[str, ...], Style] = {}

    def rows(self, source: str, language: str) -> Iterator[list[Segment]]:
        """Yield the rows of a text, wrapped after spaces; a language that pygments does not know has no colours."""
        for tokens in _lines(_lexer(language), source.expandtabs(_TAB)):
            segments = [Segment(text, self._style(kind)) for kind, text in tokens]
            for row in wrap("".join(text for _, text in tokens), max(self._width - 2, 2)):
                inside, segments = _cut(segments, len(row))
                yield self._row(inside, row)

    def _row(self, segments: list[Segment], text: str) -> list[Segment]:
        free = max(self._width - 1 - cell_len(text), 0)
        return [Segment(" ", self._background), *segments, Segment(" " * free, self._background)]

    def _style(self, kind: tuple[str, ...]) -> Style:
        style = self._styles.get(kind)
        if style is None:
            style = self._styles[kind] = self._theme.get_style_for_token(kind) + self._background
        return style


def _lines(lexer: Lexer, source: str) -> Iterator[list[_Token]]:
    """Yield the tokens of each line."""
    line: list[_Token] = []
    for kind, text in lexer.get_tokens(source + "\n"):
        first, *others = text.split("\n")
        if first:
            line.append((kind, first))
        for part in others:
            yield line
            line = [(kind, part)] if part else []
    if line:
        yield line


def _cut(segments: list[Segment], characters: int) -> tuple[list[Segment], list[Segment]]:
    inside: list[Segment] = []
    for place, (text, style, _) in enumerate(segments):
        if len(text) >= characters:
            inside.append(Segment(text[:characters], style))
            rest = [Segment(text[characters:], style)] if len(text) > characters else []
            return inside, [*rest, *segments[place + 1 :]]
        inside.append(segments[place])
        characters -= len(text)
    return inside, []


@lru_cache(64)
def _lexer(language: str) -> Lexer:
    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=True)
    except ClassNotFound:
        return get_lexer_by_name("text", stripnl=False, ensurenl=True)
