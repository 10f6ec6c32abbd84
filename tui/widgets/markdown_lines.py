"""Renders finished blocks of Markdown to lines, once for each width and palette.

One widget draws a whole message from such lines. Textual's own Markdown widget makes a widget of every paragraph, item
and cell, which a layout at each flush has to visit; ``tests/benchmarks/chat_frames.py`` compares them.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markdown import CodeBlock, Heading, Markdown
from rich.style import Style
from rich.syntax import Syntax
from rich.theme import Theme
from textual.strip import Strip

from ziggurat.tui.widgets.markdown_blocks import Block

if TYPE_CHECKING:
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
        yield _code(str(self.text).rstrip("\n"), self.lexer_name, self.theme, console)


class _Heading(Heading):
    LEVEL_ALIGN = {}  # all of them to the left


class _Markdown(Markdown):
    elements = {**Markdown.elements, "fence": _Code, "code_block": _Code, "heading_open": _Heading}


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

    def render(self, block: Block) -> list[Strip]:
        """Return the lines of a block, the empty ones around it not included."""
        if block.code is not None:
            renderable: Any = _code(block.source, block.code, self.palette.code_theme, self._console)
        else:
            renderable = _Markdown(block.source, code_theme=self.palette.code_theme)
        lines = self._console.render_lines(renderable, self._options, pad=False)
        strips = [Strip(line) for line in lines]
        if block.code is None:
            while strips and not strips[0].text.strip():
                strips.pop(0)
            while strips and not strips[-1].text.strip():
                strips.pop()
        return strips


def _code(source: str, language: str, theme: str, console: Console) -> Syntax:
    background = console.get_style("ziggurat.code").bgcolor
    return Syntax(
        source.expandtabs(4),
        language,
        theme=theme,
        word_wrap=True,
        padding=(0, 1),
        background_color=background.name if background is not None else "default",
    )
