"""Renders finished blocks of Markdown to lines, once for each width and palette.

One widget draws a whole message from such lines. Textual's own Markdown widget makes a widget of every paragraph, item
and cell, which a layout at each flush has to visit; ``tests/benchmarks/chat_frames.py`` compares them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markdown import CodeBlock, Heading, ListElement, Markdown
from rich.segment import Segment
from rich.style import Style
from rich.theme import Theme
from textual.strip import Strip

from ziggurat.tui.widgets.markdown_blocks import Block
from ziggurat.tui.widgets.markdown_code import CodeRenderer

if TYPE_CHECKING:
    from markdown_it.token import Token
    from rich.console import ConsoleOptions, RenderResult
    from textual.app import App

#: Control characters would reach the terminal as they are; the ends of lines and tabs are kept.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Return a text without what a terminal would obey."""
    return _CONTROL.sub("", text.replace("\r\n", "\n"))


@dataclass(frozen=True)
class Palette:
    """The colours of Markdown, as rich knows them, and pygments' style of code."""

    accent: str = "cyan"
    heading: str = "blue"
    quote: str = "magenta"
    code_background: str = "default"
    code_theme: str = "ansi_dark"

    @classmethod
    def of(cls, app: App[Any]) -> Palette:
        """Return the colours of an app's theme."""
        theme = app.current_theme
        code = "ansi_dark" if theme.dark else "ansi_light"
        found = [app.theme_variables.get(name, "") for name in ("accent", "primary", "secondary", "panel")]
        if not all(re.fullmatch(r"#[0-9a-fA-F]{6}", each) for each in found):
            return cls(code_theme=code)
        accent, primary, secondary, panel = found
        return cls(
            accent, primary if not theme.dark else accent, secondary, panel, "monokai" if theme.dark else "default"
        )


class _Code(CodeBlock):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = CodeRenderer(options.max_width, self.theme, console.get_style("ziggurat.code"))
        for row in code.rows(str(self.text).removesuffix("\n"), self.lexer_name):
            yield from row
            yield Segment.line()


class _Heading(Heading):
    LEVEL_ALIGN = {}  # all of them to the left


class _List(ListElement):
    """A list that may be a part of one whose numbers are wider than its own."""

    end = 0

    @classmethod
    def create(cls, markdown: Markdown, token: Token) -> ListElement:
        made = cls(token.type, int(token.attrs.get("start", 1)))
        if isinstance(markdown, _Markdown) and token.level == 0:
            made.end = markdown.list_end
        return made

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.list_type == "bullet_list_open":
            yield from super().__rich_console__(console, options)
            return
        start = 1 if self.list_start is None else self.list_start
        end = max(start + len(self.items), self.end)
        for number, item in enumerate(self.items, start):
            yield from item.render_number(console, options, number, end)


class _Markdown(Markdown):
    elements = {
        **Markdown.elements,
        "fence": _Code,
        "code_block": _Code,
        "heading_open": _Heading,
        "bullet_list_open": _List,
        "ordered_list_open": _List,
    }

    def __init__(self, source: str, code_theme: str, list_end: int) -> None:
        super().__init__(source, code_theme=code_theme)
        self.list_end = list_end


class LineRenderer:
    """Renders blocks for one width and palette."""

    def __init__(self, width: int, palette: Palette) -> None:
        self.width = max(width, 4)
        self.palette = palette
        heading = Style(bold=True, color=palette.heading)
        styles = {
            "markdown.code": Style(bold=True, color=palette.accent),
            "markdown.block_quote": Style(italic=True),
            "markdown.item.bullet": Style(color=palette.accent, bold=True),
            "markdown.item.number": Style(color=palette.accent, bold=True),
            "markdown.table.border": Style(dim=True),
            "markdown.table.header": Style(bold=True),
            "markdown.link": Style(color=palette.accent, underline=True),
            "markdown.link_url": Style(color=palette.accent, underline=True),
            "markdown.h1": heading + Style(underline=True),
            "markdown.h2": heading + Style(underline=True),
            "markdown.h3": heading,
            "markdown.h4": Style(bold=True, italic=True),
            "ziggurat.code": Style(bgcolor=palette.code_background),
        }
        self._console = Console(
            width=self.width,
            file=io.StringIO(),
            force_terminal=True,
            color_system="truecolor",
            legacy_windows=False,
            theme=Theme(styles),
            _environ={},
        )
        self._options = self._console.options.update(width=self.width)
        self.code_style = self._console.get_style("ziggurat.code")
        self._code = CodeRenderer(self.width, palette.code_theme, self.code_style)

    def render(self, block: Block) -> list[Strip]:
        """Return the lines of a block, the empty ones around it not included."""
        return list(self.lines(block))

    def lines(self, block: Block) -> Iterator[Strip]:
        """Return the lines one by one, so that whoever takes them can stop after any line of code."""
        if block.code is not None:
            yield from (Strip(row) for row in self._code.rows(block.source, block.code))
            return
        markdown = _Markdown(block.source, self.palette.code_theme, block.list_end)
        strips = [Strip(line) for line in self._console.render_lines(markdown, self._options, pad=False)]
        while strips and not strips[0].text.strip():
            strips.pop(0)
        while strips and not strips[-1].text.strip():
            strips.pop()
        yield from strips
