"""The text of a message, drawn by one widget from lines: finished Markdown, and the tail that still grows."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.segment import Segment
from textual.strip import Strip
from textual.widget import Widget

from ziggurat.tui.widgets.markdown_blocks import Block, BlockSplitter
from ziggurat.tui.widgets.markdown_lines import LineRenderer, Palette, printable
from ziggurat.tui.widgets.tail import TailLines

if TYPE_CHECKING:
    from rich.style import Style
    from textual.geometry import Size
    from textual.selection import Selection

#: Seconds between two looks of a growing message at what has come.
FLUSH_SECONDS = 0.05
#: Lines of a code fence up to which its parts are rendered again as one when it ends.
WHOLE_CODE_LINES = 150


@dataclass
class _Lines:
    """Lines that belong together: those of a block, with an empty one before."""

    block: Block
    strips: list[Strip] = field(default_factory=list)


class MessageBody(Widget):
    """Shows Markdown, or plain text, that may still grow.

    ``append`` takes text as it comes and shows it at the next flush; ``finish`` shows all there is, the tail as
    Markdown as well.
    """

    DEFAULT_CSS = """
    MessageBody { height: auto; width: 1fr; }
    """

    def __init__(self, text: str = "", *, plain: bool = False, id: str | None = None) -> None:
        super().__init__(id=id)
        self.plain = plain
        self._text: list[str] = []
        self._pending: list[str] = []
        self._splitter = BlockSplitter()
        self._lines: list[_Lines] = []
        self._starts: list[int] = []
        self._height = 0
        self._renderer: LineRenderer | None = None
        self._tail = TailLines(80)
        self._drawn: dict[int, Strip] = {}  # finished lines as they go to the screen
        self._stable = 0  # blocks that are where they were when the lines were last placed
        self._style: Style | None = None
        self._finished = False
        self.flushes = 0
        if text:
            self._text.append(text)
            self._add(printable(text))
            self._end()

    @property
    def allow_select(self) -> bool:
        """The text can be selected with the mouse."""
        return True

    @property
    def text(self) -> str:
        """All text so far, as it came."""
        return "".join(self._text)

    def on_mount(self) -> None:
        """Look for new text regularly while it may grow."""
        if not self._finished:
            self._timer = self.set_interval(FLUSH_SECONDS, self.flush)

    def append(self, text: str) -> None:
        """Add text; it is seen at the next flush."""
        self._text.append(text)
        self._pending.append(text)

    def flush(self) -> None:
        """Show what has come since the last flush."""
        if not self._pending:
            return
        text = printable("".join(self._pending))
        self._pending.clear()
        self._add(text)
        self._changed()

    def finish(self) -> None:
        """Show all text as it will stay."""
        self.flush()
        if not self._finished:
            self._end()
            if self.is_mounted:
                self._timer.stop()
            self._changed()

    def notify_style_update(self) -> None:
        """Render anew in the colours of another theme."""
        super().notify_style_update()
        if self._renderer is not None and self._renderer.palette != Palette.of(self.app):
            self._renderer = None
            self.refresh(layout=True)

    def _changed(self) -> None:
        self.flushes += 1
        before = self._height
        if self._renderer is not None:
            self._place()
        self.refresh(layout=self._height != before)

    def _add(self, text: str) -> None:
        if self.plain:
            self._tail.feed(text)
            return
        was_code = self._splitter.in_code
        finished = self._splitter.feed(text)
        self._keep(finished)
        if finished or self._splitter.in_code != was_code or self._splitter.empty:
            self._new_tail()
        else:
            self._tail.feed(text)

    def _end(self) -> None:
        self._finished = True
        if not self.plain:
            self._keep(self._splitter.finish())
            self._tail = TailLines(self._width)

    def _keep(self, blocks: list[Block]) -> None:
        for block in blocks:
            if block.last and block.joined and block.code is not None:
                block = self._whole_code(block)
            strips = self._renderer.render(block) if self._renderer is not None else []
            self._lines.append(_Lines(block, strips))

    def _whole_code(self, last: Block) -> Block:
        """Take the parts of a fence that ends back, for one rendering: a lexer that saw its start colours it right."""
        parts = [last]
        count = 1
        while parts[-1].joined and count <= len(self._lines):
            parts.append(self._lines[-count].block)
            count += 1
        source = "\n".join(part.source for part in reversed(parts))
        if source.count("\n") >= WHOLE_CODE_LINES:
            return last
        del self._lines[len(self._lines) - count + 1 :]
        self._stable = min(self._stable, len(self._lines))
        return Block(source, last.code)

    @property
    def _width(self) -> int:
        return self._renderer.width if self._renderer is not None else 80

    def _tail_width(self) -> int:
        return self._width - 2 if self._splitter.in_code else self._width

    def _new_tail(self) -> None:
        self._tail = TailLines(self._tail_width())
        self._tail.feed(self._splitter.tail())

    def _prepare(self, width: int) -> None:
        """Render everything for a width, if that is not the one it is rendered for."""
        if self._renderer is not None and self._renderer.width == max(width, 4):
            return
        self._renderer = LineRenderer(width, Palette.of(self.app))
        self._stable = 0
        for each in self._lines:
            each.strips = self._renderer.render(each.block)
        if self.plain:
            self._tail = TailLines(self._width)
            self._tail.feed(printable("".join(self._text)))
        elif not self._finished:
            self._new_tail()
        self._place()

    def _place(self) -> None:
        """Find the line at which each block starts, the empty lines between them included."""
        height, self._starts = 0, []
        for each in self._lines:
            height += bool(height) and not each.block.joined
            self._starts.append(height)
            height += len(each.strips)
        self._tail_start = height + (bool(height) and not self._splitter.joined)
        stays = self._starts[self._stable] if self._stable < len(self._starts) else self._tail_start
        self._drawn = {y: strip for y, strip in self._drawn.items() if y < stays}
        self._stable = len(self._lines)
        self._height = self._tail_start + self._tail.rows if not self._tail.empty else height

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Return the number of lines."""
        self._prepare(width)
        return max(self._height, 1)

    def render_line(self, y: int) -> Strip:
        """Return a line, with the selection drawn on it."""
        width = self.size.width
        self._prepare(width)
        style, selection = self.rich_style, self.text_selection
        if style != self._style:
            self._style = style
            self._drawn.clear()
        if selection is None and (drawn := self._drawn.get(y)) is not None:
            return drawn
        strip = self._line(y)
        if selection is not None and (span := selection.get_span(y)) is not None:
            strip = self._selected(strip, *span)
        strip = strip.apply_style(style).crop_extend(0, width, style).apply_offsets(0, y)
        if selection is None and y < self._tail_start:
            self._drawn[y] = strip
        return strip

    def _line(self, y: int) -> Strip:
        if not self._tail.empty and y >= self._tail_start:
            row = y - self._tail_start
            return self._tail_strip(row) if row < self._tail.rows else Strip.blank(0)
        place = bisect_right(self._starts, y) - 1
        if place < 0:
            return Strip.blank(0)
        strips, row = self._lines[place].strips, y - self._starts[place]
        return strips[row] if row < len(strips) else Strip.blank(0)

    def _tail_strip(self, row: int) -> Strip:
        text = self._tail.row(row)
        if self._splitter.in_code and self._renderer is not None:
            return Strip([Segment(f" {text}", self._renderer.code_style)]).extend_cell_length(
                self._width, self._renderer.code_style
            )
        return Strip([Segment(text)])

    def _selected(self, strip: Strip, start: int, end: int) -> Strip:
        length = strip.cell_length
        end = length if end < 0 else min(end, length)
        if start >= end:
            return strip
        before, inside, after = strip.crop(0, start), strip.crop(start, end), strip.crop(end, length)
        style = self.screen.get_component_rich_style("screen--selection")
        return Strip.join(
            [before, Strip([Segment(text, (old + style) if old else style) for text, old, _ in inside]), after]
        )

    def selection_updated(self, selection: Selection | None) -> None:
        """Draw the selection."""
        self.refresh()

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """Return the selected lines as they are seen."""
        text = "\n".join(self._line(y).text.rstrip() for y in range(self._height))
        return selection.extract(text), "\n"
